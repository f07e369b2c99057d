"""Snapshots of the averages along a run, and the export of the one with the lowest held-out loss."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.trainer import rank_processes
from tests.trainer.test_loop import PRETRAIN, stop_after, tensors
from trainer.checkpoints import snapshots
from trainer.checkpoints.checkpoint import read_manifest
from trainer.checkpoints.disk_space import checkpoint_bytes
from trainer.checkpoints.names import checkpoints, folder_name, samples_of
from trainer.checkpoints.profiles import Profile, combine
from trainer.choose_average import Tried, chosen, table
from trainer.log.metrics import read_metrics
from trainer.loop import train
from trainer.recipes.reading import load_recipe

PROFILES = (*PRETRAIN, "pretrain.ema_profiles=[0.05,0.1]", "log.held_out=8", "log.clips=1", "sampling.steps=1")


def work(rank: int, run_dir: str, prepared: str, steps: int, *overrides: str) -> None:
    paths = [f"run_dir={run_dir}", f"data.latents={prepared}/latents", f"data.audio={prepared}/audio"]
    cpu = ("parallel.threads=1", "parallel.device=cpu")
    train(load_recipe("tiny", [*paths, *PROFILES, *cpu, *overrides]), "pretrain", stop=stop_after(steps))


def taken(run: Path) -> list[int]:
    return [samples_of(path) for path in checkpoints(run / "pretrain/averages")]


def status(run: Path) -> dict:
    return json.loads((run / "pretrain/status.json").read_text())


def exported(run: Path) -> dict[str, torch.Tensor]:
    return load_file(str(run / "pretrain/export/dit.safetensors"))


@pytest.fixture(scope="module")
def straight(prepared, tmp_path_factory) -> Path:
    """A run with two profiles that nothing interrupted."""
    run = tmp_path_factory.mktemp("straight")
    work(0, str(run), str(prepared), 10**6)
    return run


def test_snapshots_hold_the_two_averages_alone(straight):
    assert taken(straight) == [16, 24, 40, 48, 64, 72, 88]
    for samples in (64, 88):
        names = read_manifest(straight / "pretrain/averages" / folder_name(samples))["tensors"]
        assert {name.partition("/")[0] for name in names} == {"ema", "ema_wide"}
    whole = tensors(straight / "pretrain/checkpoints" / folder_name(64))
    snapshot = tensors(straight / "pretrain/averages" / folder_name(64))
    assert all(torch.equal(whole[name], value) for name, value in snapshot.items())
    assert {name.partition("/")[0] for name in whole} == {"param", "exp_avg", "exp_avg_sq", "ema", "ema_wide"}


def test_the_width_with_the_lowest_loss_is_exported(straight):
    tried, width = status(straight)["averages"], status(straight)["average"]
    assert {0.05, 0.1} < {row["width"] for row in tried}
    assert all(row["error"] <= 0.1 for row in tried)
    assert width == min(tried, key=lambda row: row["loss"])["width"]
    lines = [line for line in read_metrics(straight / "pretrain/metrics.jsonl") if line["kind"] == "average"]
    assert [line["loss"] for line in lines] == [row["loss"] for row in tried]
    stored = [
        *(tensors(straight / "pretrain/averages" / folder_name(samples)) for samples in taken(straight)),
        tensors(straight / "pretrain/checkpoints" / folder_name(96)),
    ]
    profiles = [Profile(kept, time) for kept in (0.05, 0.1) for time in (*taken(straight), 96)]
    factors = iter(combine(profiles, Profile(width, 96)).factors)
    weights = {name: torch.zeros_like(value).flatten() for name, value in exported(straight).items()}
    for kind in ("ema", "ema_wide"):
        for held in stored:
            factor = next(factors)
            for name, value in weights.items():
                value += factor * held[f"{kind}/dit.{name}"]
    for name, value in exported(straight).items():
        torch.testing.assert_close(value.flatten(), weights[name], rtol=1e-4, atol=1e-6)


def test_kept_averages_have_the_loss_that_training_measured(straight):
    """The narrow one is what the checkpoint's held-out loss was measured with."""
    lines = read_metrics(straight / "pretrain/metrics.jsonl")
    [last] = [line["loss"] for line in lines if line["kind"] == "held_out" and line["samples"] == 96]
    [narrow] = [row["loss"] for row in status(straight)["averages"] if row["width"] == 0.05]
    assert narrow == pytest.approx(last, rel=1e-5)


def test_a_run_that_was_killed_exports_the_same_bits(straight, prepared, tmp_path):
    run = tmp_path / "run"
    work(0, str(run), str(prepared), 10)
    stage = run / "pretrain"
    assert taken(run) == [16, 24, 40, 48, 64, 72]
    shutil.rmtree(stage / "checkpoints" / folder_name(80))  # as a kill leaves it: the run goes on from 64
    (stage / "averages/tmp_step_000000000088_0a1b2c3d").mkdir()
    work(0, str(run), str(prepared), 10**6)
    assert taken(run) == taken(straight)
    assert not list((stage / "averages").glob("tmp_*"))
    assert status(run)["averages"] == status(straight)["averages"]
    assert all(torch.equal(exported(run)[name], value) for name, value in exported(straight).items())


def test_an_export_that_is_gone_is_made_again(straight, prepared, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    shutil.rmtree(run / "pretrain/export")
    work(0, str(run), str(prepared), 10**6)
    assert all(torch.equal(exported(run)[name], value) for name, value in exported(straight).items())


def test_any_strategy_and_world_size_exports_the_same(straight, prepared, tmp_path):
    run = tmp_path / "run"
    for strategy, ranks, steps in (("zero3", 2, 4), ("fsdp2", 2, 4), ("zero1", 1, 3), ("zero2", 2, 10**6)):
        arguments = (str(run), str(prepared), steps, f"parallel.strategy={strategy}")
        assert rank_processes.run(work, ranks, *arguments) == [0] * ranks
    assert taken(run) == taken(straight)
    assert [row["loss"] for row in status(run)["averages"]] == pytest.approx(
        [row["loss"] for row in status(straight)["averages"]], rel=1e-5
    )
    for name, value in exported(run).items():
        assert torch.allclose(value, exported(straight)[name], rtol=1e-3, atol=1e-5), name


def test_a_damaged_snapshot_is_left_out_with_a_warning(straight, prepared, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    shutil.rmtree(run / "pretrain/export")
    file = run / "pretrain/averages" / folder_name(64) / "rank_00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    work(0, str(run), str(prepared), 10**6)
    log = (run / "pretrain/logs/rank_0.log").read_text()
    assert "step_000000000064 are damaged and left out" in log
    assert status(run)["averages"] != status(straight)["averages"]


def test_a_stop_while_averages_are_tried_keeps_the_run(straight, prepared, tmp_path):
    run = tmp_path / "run"
    work(0, str(run), str(prepared), 12)  # the twelfth step is the last
    assert status(run)["state"] == "stopped"
    assert not (run / "pretrain/export").exists()
    work(0, str(run), str(prepared), 10**6)
    assert all(torch.equal(exported(run)[name], value) for name, value in exported(straight).items())


def test_a_resumed_run_deletes_later_snapshots(straight, prepared, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    shutil.rmtree(run / "pretrain/checkpoints" / folder_name(96))
    work(0, str(run), str(prepared), 1)
    assert taken(run) == [16, 24, 40, 48, 64, 72]  # the one at 72 was taken anew


def test_a_longer_run_thins_its_snapshots(tmp_path):
    for samples in (*range(12, 97, 12), 108, 144):
        (tmp_path / folder_name(samples)).mkdir()
    snapshots.prune(tmp_path, 12)
    assert len(checkpoints(tmp_path)) == 10
    snapshots.prune(tmp_path, 30)
    assert [samples_of(path) for path in checkpoints(tmp_path)] == [12, 36, 60, 96, 144]


def test_a_run_without_profiles_takes_no_snapshots(tiny, tmp_path):
    assert train(tiny(*PRETRAIN, "pretrain.samples=32", "log.clips=1", "sampling.steps=1"), "pretrain") == "done"
    assert not (tmp_path / "run/pretrain/averages").exists()
    names = read_manifest(tmp_path / "run/pretrain/checkpoints" / folder_name(32))["tensors"]
    assert not any(name.startswith("ema_wide/") for name in names)
    assert "averages" not in status(tmp_path / "run")


def test_the_disk_space_counts_the_second_average_and_the_snapshots(tiny):
    plain, profiled = (checkpoint_bytes(tiny(*overrides), "pretrain") for overrides in (PRETRAIN, PROFILES))
    numbers = plain // (16 * 3)
    assert profiled == numbers * (20 * 3 + 8 * 8)


@pytest.mark.parametrize("widths", ["[0.05]", "[0.1,0.05]", "[0.1,0.1]", "[0.05,0.1,0.2]"])
def test_profiles_are_two_widths(tiny, widths):
    with pytest.raises(ValueError, match=r"pretrain\.ema_profiles=.* must be two widths, narrow then wide"):
        tiny(f"pretrain.ema_profiles={widths}")


def test_the_table_marks_what_is_exported():
    tried: Tried = [
        {"width": 0.05, "error": 0.0, "loss": 0.5},
        {"width": 0.075, "error": 0.012, "loss": 0.25},
        {"width": 0.1, "error": 0.0, "loss": float("nan")},
    ]
    assert chosen(tried) == 0.075
    assert table(tried).splitlines()[2].split() == ["0.075", "1.2%", "0.250000", "exported"]
