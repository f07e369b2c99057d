"""A stage is a row and a Task: what else there is to do with stages is derived from the rows."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch

from launch import pipeline
from launch.plan import plan
from launch.slurm import submit
from launch.status import table
from tests.trainer.test_loop import losses, stop_after, tensors
from tests.trainer.toys.stage import POLISH
from trainer import stages
from trainer.checkpoints import inventory
from trainer.checkpoints.names import checkpoints
from trainer.loop import train
from trainer.recipes.reading import load_recipe
from trainer.recipes.schema import recipe_schema
from trainer.stages import STAGES
from trainer.tasks import make_task

SHORT = tuple(
    f"{stage}.samples={samples}" for stage, samples in (("pretrain", 16), ("autoencode", 16), ("finetune", 16))
)
POLISHED = (
    *("polish.samples=64", "polish.global_batch=8", "polish.crop_frames=63", "polish.warmup=0"),
    *("log.every=8", "log.samples_every=0", "checkpoint.every=32"),
)


@pytest.fixture
def polish(monkeypatch):
    """The toy stage, registered until the test ends."""
    monkeypatch.setattr(stages, "STAGES", stages.STAGES)
    before = dict(STAGES)
    stages.register(POLISH, before="evaluate")
    yield POLISH
    STAGES.clear()
    STAGES.update(before)


def test_a_sixth_stage_goes_through_plan_run_status_checkpoint_and_resume(polish, tiny, tmp_path):
    config = tiny(*SHORT, *POLISHED)
    run = tmp_path / "run"
    assert config.stages[-4:] == ["finetune", "polish", "evaluate", "page"]

    planned = "\n".join(plan(config))
    assert "polish: 64 samples = 8 steps × 8" in planned

    for stage in config.stages[: config.stages.index("polish")]:
        assert pipeline.run_stage(config, stage) == "done"
    planned = "\n".join(plan(config))
    assert "# memory: polish\nMiB on each of 1 rank(s), for micro batches of 8 clips of 63 frames" in planned

    assert train(config, "polish", stop=stop_after(5)) == "stopped"
    assert [path.name for path in checkpoints(run / "polish/checkpoints")] == ["step_000000000032", "step_000000000040"]
    assert "polish" in inventory.explanation(checkpoints(run / "polish/checkpoints")[-1])
    assert re.search(r"polish .* stopped .* 40 of 64", table.report(run))

    assert pipeline.run(config) == "done"
    assert re.search(r"polish .* done .* 64 of 64", table.report(run))
    assert list(losses(run, "polish")) == [8, 16, 24, 32, 40, 48, 56, 64]

    # The same as without the stop, to the bit.
    straight = tiny(*SHORT, *POLISHED, run_dir=tmp_path / "straight")
    for stage in straight.stages[: straight.stages.index("polish") + 1]:
        pipeline.run_stage(straight, stage)
    assert losses(tmp_path / "straight", "polish") == losses(run, "polish")
    ours, theirs = (tensors(checkpoints(at / "polish/checkpoints")[-1]) for at in (run, tmp_path / "straight"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_sixth_stage_becomes_a_job_between_those_beside_it(polish, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load_recipe(
        "tiny", ["cluster=slurm", "polish.samples=8", "polish.crop_frames=63", "cluster.stages.polish.time=7"]
    )
    scripts = dict(submit.scripts(config))
    names = list(scripts)
    assert names[names.index("polish") - 1 : names.index("polish") + 2] == ["finetune", "polish", "evaluate"]
    assert "afterok:<finetune>" in scripts["polish"]
    assert "#SBATCH --nodes=1" in scripts["polish"]
    assert "#SBATCH --time=7" in scripts["polish"]


def test_its_settings_are_refused_where_there_is_no_such_stage():
    with pytest.raises(ValueError, match=r"unknown key polish"):
        load_recipe("tiny", ["polish.samples=8"])
    assert "polish" not in {item.name for item in dataclasses.fields(recipe_schema())}


def test_every_trained_stage_has_settings_and_a_task():
    fields = {item.name for item in dataclasses.fields(recipe_schema())}
    assert set(stages.trained_stages()) <= fields
    for name in stages.trained_stages():
        module, _, task = STAGES[name].task.partition(":")
        assert hasattr(__import__(module, fromlist=[task]), task)


def test_keys_that_a_row_names_are_keys_of_the_schema():
    fields = {item.name for item in dataclasses.fields(recipe_schema())}
    for stage in STAGES.values():
        assert {key.partition(".")[0] for key in (*stage.learned_from, stage.crop_unit)} <= fields
        assert {*stage.builds_on, *stage.evaluates} <= set(stages.trained_stages())


def test_the_readme_shows_the_rows():
    text = (Path(__file__).parents[2] / "README.md").read_text()
    shown = [line for line in text.splitlines() if line.startswith("| `")]
    assert shown == [f"| `{stage.name}` | {stage.help} |" for stage in STAGES.values()]


# --- a condition, and a loss term -------------------------------------------------------------------------------------


def with_task(monkeypatch, task: str) -> None:
    row = dataclasses.replace(STAGES["pretrain"], task=task)
    monkeypatch.setitem(STAGES, "pretrain", row)


SHORT_PRETRAIN = ("pretrain.samples=32", "pretrain.warmup=0", "log.every=8", "log.samples_every=0")


def test_a_second_condition_reaches_d(monkeypatch, tiny, tmp_path):
    with_task(monkeypatch, "tests.trainer.toys.conditioned:PretrainWithGain")
    assert train(tiny(*SHORT_PRETRAIN), "pretrain") == "done"
    learned = tensors(checkpoints(tmp_path / "run/pretrain/checkpoints")[-1])
    assert learned["param/dit.of_gain"].abs().max() > 0


def test_a_second_loss_term_is_weighed_and_has_a_curve(monkeypatch, tiny, tmp_path):
    plain, weighted = tmp_path / "plain", tmp_path / "weighted"
    assert train(tiny(*SHORT_PRETRAIN, run_dir=plain), "pretrain") == "done"
    with_task(monkeypatch, "tests.trainer.toys.term:PretrainOnMagnitudes")
    config = tiny(*SHORT_PRETRAIN, "pretrain.loss_weights={magnitudes: 0.5}", run_dir=weighted)
    assert train(config, "pretrain") == "done"
    from trainer.log.metrics import read_metrics

    lines = [line for line in read_metrics(weighted / "pretrain/metrics.jsonl") if line["kind"] == "train"]
    for line in lines:
        terms = line["loss_terms"]
        assert line["loss"] == pytest.approx(terms["denoising"] + 0.5 * terms["magnitudes"], rel=1e-6)
        assert terms["magnitudes"] > 0
    [first] = [line for line in read_metrics(plain / "pretrain/metrics.jsonl") if line["samples"] == 8]
    assert first["loss_terms"] == {"denoising": first["loss"]}
    assert lines[0]["loss_terms"]["denoising"] == first["loss"]  # nothing was learned yet that could differ
    assert curve(weighted / "pretrain/tensorboard", "train_terms/magnitudes") == pytest.approx(
        {line["samples"]: line["loss_terms"]["magnitudes"] for line in lines}, rel=1e-6
    )


def curve(folder: Path, tag: str) -> dict[int, float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {event.step: event.value for event in events.Scalars(tag)}


def test_a_weight_of_no_term_is_refused(tiny):
    config = tiny(*SHORT_PRETRAIN, "pretrain.loss_weights={magnitude: 0.5}")
    with pytest.raises(ValueError, match=r"loss_weights names magnitude, but the stage's loss has the terms denoising"):
        train(config, "pretrain")


def test_the_estimate_of_x0_in_a_term_is_the_one_of_sampling(tiny):
    task = make_task(tiny(), "pretrain")
    diffusion, x0, noise = task.module.diffusion, torch.randn(3, 128, 9), torch.randn(3, 128, 9)
    t = diffusion.noise_level(torch.tensor([0.2, 0.5, 0.9]))

    def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return 0.3 * x

    prediction = diffusion.prediction(network, x0, noise, t)
    assert torch.equal(prediction.x0, diffusion.denoise(network, diffusion.corrupt(x0, noise, t), t))
