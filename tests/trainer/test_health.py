"""Steps that would spoil a run: skipped, gone back from, written down; and the same after any interruption."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
import torch

from tests.trainer.test_loop import PRETRAIN, stop_after, tensors
from trainer.checkpoints import checkpoint
from trainer.feed import Feed
from trainer.health import Health
from trainer.log.metrics import read_metrics
from trainer.loop import train
from trainer.losses import Losses
from trainer.objectives import Denoiser
from trainer.ranks.gate import Gate
from trainer.ranks.parallel import Parallel
from trainer.recipes.schema import HealthConfig
from trainer.run_directory import RunDirectory

RUN = (*PRETRAIN, "pretrain.samples=128", "checkpoint.every=16", "checkpoint.keep_last=3", "health.rewind_after=3")


def judge(health: Health, *steps: tuple[float, float]) -> list[bool]:
    return [health.record(8 * number, loss, norm) for number, (loss, norm) in enumerate(steps)]


def test_what_is_not_finite_is_not_accepted():
    health = Health(HealthConfig(), scaled=False)
    bad = [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)]
    assert judge(health, (1.0, 1.0), *bad) == [True, False, False, False, False]
    assert not health.good
    faults = [step["why"].split()[1] for step in health.skipped]
    assert faults == ["loss", "loss", "gradient", "gradient"]
    assert health.record(40, 1.0, 1.0)
    assert health.good


def test_a_spike_is_far_above_the_median_of_what_was_accepted():
    health = Health(HealthConfig(spike=10, spike_window=16), scaled=False)
    assert judge(health, (1.0, 99.0), *[(1.0, 1.0)] * 6) == [True] * 7  # the first ones tell nothing yet
    assert judge(health, (1.0, 9.9), (1.0, 10.1), (1.0, 10.1), (1.0, 1.0)) == [True, False, False, True]
    assert "10 times its median" in Health.__dict__["_fault"](health, 1.0, 10.4)
    assert judge(Health(HealthConfig(spike=0), scaled=False), *[(1.0, 1.0)] * 64, (1.0, 1e9))[-1]


def test_the_device_takes_the_steps_that_the_host_records_as_taken():
    chosen = random.Random(5)
    health = Health(HealthConfig(spike=2, spike_window=8), scaled=False)
    taken = []
    for number in range(500):
        loss = chosen.choice([1.0, 1.0, 1.0, math.nan, math.inf])
        # float32 norms, some of them at twice the median or next to it
        limit = health.largest_norm() if health.norms else 2.0
        norm = chosen.choice([chosen.uniform(0.5, 2.5), min(limit, 9.0), min(limit, 9.0) * (1 + 1e-6), math.nan])
        norm_ = torch.tensor(norm)
        gate = Gate(torch.tensor(loss, dtype=torch.float64), health.largest_norm())
        closed, on_host = bool(gate.closed(norm_)), gate.passes(float(norm_))
        taken.append(health.record(number, loss, float(norm_)))
        assert (closed, on_host) == (not taken[-1], taken[-1])
    assert 50 < sum(taken) < 450


def test_hopeless_after_so_many_in_a_row():
    health = Health(HealthConfig(rewind_after=3), scaled=False)
    judge(health, (math.nan, 1.0), (math.nan, 1.0), (1.0, 1.0), (math.nan, 1.0), (math.nan, 1.0))
    assert not health.hopeless
    judge(health, (math.nan, 1.0))
    assert health.hopeless
    health.rewound(0)
    assert (health.good, health.hopeless, health.rewinds) == (True, False, 1)


def test_overflow_of_fp16_lowers_the_scale_and_is_no_incident():
    health = Health(HealthConfig(), scaled=True)
    start = health.scale
    assert judge(health, (1.0, math.inf), (1.0, math.nan), (1.0, 1.0)) == [False, False, True]
    assert health.scale == start / 4
    assert health.good
    assert judge(health, (math.nan, math.nan)) == [False]
    assert not health.good  # a loss that is not finite is not the scale's fault
    judge(health, *[(1.0, 1.0)] * 2000)
    assert health.scale == start / 2
    health.scale = 1.0
    assert judge(health, (1.0, math.inf)) == [False]
    assert not health.good
    again = Health(HealthConfig(), scaled=True)
    again.restore(health.state())
    assert again.scale == 1.0


def test_its_state_goes_through_json():
    settings = HealthConfig(spike_window=8)
    health, again = Health(settings, scaled=True), Health(settings, scaled=True)
    judge(health, *[(1.0, 1.0)] * 20, (1.0, math.inf), (math.nan, 1.0), (1.0, 50.0))
    health.rewinds = 2
    again.restore(json.loads(json.dumps(health.state())))
    assert again.state() == health.state()
    assert len(again.norms) == 8
    unscaled = Health(settings, scaled=False)
    unscaled.restore(health.state())
    assert unscaled.scale == 1.0


@pytest.fixture
def poison(monkeypatch):
    """Makes the loss of some positions of the stream not a number; tells which were trained on."""
    seen: set[int] = set()

    def make(*positions: int) -> set[int]:
        plain = Denoiser.forward

        def forward(self, inputs):
            losses = plain(self, inputs)
            if self.training:
                seen.update(inputs.positions.tolist())
            bad_B = torch.isin(inputs.positions, torch.tensor(positions))
            poisoned_B = torch.where(bad_B, float("nan"), 1.0) * losses.terms["denoising"]
            return Losses({"denoising": poisoned_B}, losses.quantiles)

        monkeypatch.setattr(Denoiser, "forward", forward)
        return seen

    return make


def incidents(run: Path) -> list[dict]:
    return json.loads((run / "pretrain/incident.json").read_text())


def test_a_bad_step_is_skipped_and_its_samples_are_named(tiny, tmp_path, poison):
    poison(43)
    config = tiny(*RUN, "checkpoint.every=8", "checkpoint.keep_last=9", "pretrain.samples=64")
    assert train(config, "pretrain") == "done"
    [incident] = incidents(tmp_path / "run")
    assert (incident["what"], incident["samples"], incident["position"]) == ("skipped a step", 40, 40)
    assert incident["why"] == "the loss is not finite"
    feed = Feed(config, config.pretrain, Parallel(config.parallel), errors=tmp_path / "errors.jsonl")
    assert incident["sample_ids"] == feed.samples_at(40)
    assert sum(map(len, incident["sample_ids"].values())) == 8
    # its samples count, its weights don't change; no checkpoint of a run in trouble
    folder = tmp_path / "run/pretrain/checkpoints"
    assert [checkpoint.samples_of(path) for path in checkpoint.checkpoints(folder)] == [8, 16, 24, 32, 40, 56, 64]
    assert checkpoint.read_manifest(folder / "step_000000000064")["meta"]["steps"] == 7


def test_a_run_in_trouble_goes_back_and_passes_over_the_data(tiny, tmp_path, poison):
    seen = poison(41, 50, 62)  # the steps at 40, 48 and 56
    config = tiny(*RUN)
    assert train(config, "pretrain") == "done"
    *skipped, back = incidents(tmp_path / "run")
    assert [incident["samples"] for incident in skipped] == [40, 48, 56]
    assert (back["what"], back["from_samples"], back["samples"], back["position"]) == ("went back", 64, 32, 64)
    stage = tmp_path / "run/pretrain"
    last = checkpoint.newest_on_all_ranks(stage / "checkpoints")
    meta = checkpoint.read_manifest(last)["meta"]
    assert (meta["samples"], meta["passed_over"], meta["steps"]) == (128, 32, 16)
    assert meta["health"]["rewinds"] == 1
    assert max(seen) == 128 + 32 - 1
    curve = [line["samples"] for line in read_metrics(stage / "metrics.jsonl") if line["kind"] == "train"]
    assert curve == list(range(8, 129, 8))


def test_a_run_that_goes_back_deletes_later_snapshots(tiny, tmp_path, poison):
    poison(41, 50, 62)  # it goes back from 64 to 32
    config = tiny(*RUN, "pretrain.ema_profiles=[0.05,0.1]")
    assert train(config, "pretrain", stop=stop_after(7)) == "stopped"
    folder = tmp_path / "run/pretrain/averages"
    assert [checkpoint.samples_of(path) for path in checkpoint.checkpoints(folder)] == [16, 32, 48]
    assert train(config, "pretrain", stop=stop_after(2)) == "stopped"
    assert [checkpoint.samples_of(path) for path in checkpoint.checkpoints(folder)] == [16, 32]


@pytest.mark.parametrize(
    ("bad", "every", "stops"),
    [
        ((41, 50, 62), 16, (5,)),  # before it, where nothing was due
        ((41, 50, 62), 16, (7,)),  # after the second skipped step
        ((41, 50, 62), 32, (7, 1, 3)),  # after the second, the third, and where the second was
        ((41, 50, 62), 16, (10,)),  # some steps after having gone back
        ((41, 57, 65, 73), 16, (6,)),  # after a step that was skipped where a checkpoint was due
    ],
)
@pytest.mark.parametrize(("keep_last", "log_every"), [(1, 8), (3, 8), (3, 1000)])
def test_interrupted_in_trouble_it_comes_out_the_same(tiny, tmp_path, poison, bad, every, stops, keep_last, log_every):
    """Where no line of the log is due, the host reads only at the next step whether a step was taken."""
    poison(*bad)
    settings = (*RUN, f"checkpoint.every={every}", f"checkpoint.keep_last={keep_last}")
    assert train(tiny(*settings, run_dir=tmp_path / "straight"), "pretrain") == "done"
    config = tiny(*settings, f"log.every={log_every}")
    for steps in stops:
        assert train(config, "pretrain", stop=stop_after(steps)) == "stopped"
        status = RunDirectory(tmp_path / "run/pretrain", "pretrain").status
        assert checkpoint.newest(tmp_path / "run/pretrain/checkpoints").name == f"step_{status['samples']:012d}"
    assert train(config, "pretrain") == "done"
    ours, theirs = (
        checkpoint.newest_on_all_ranks(tmp_path / run / "pretrain/checkpoints") for run in ("run", "straight")
    )
    assert all(torch.equal(value, tensors(theirs)[name]) for name, value in tensors(ours).items())
    what = [(incident["what"], incident["position"]) for incident in incidents(tmp_path / "run")]
    assert what == [(incident["what"], incident["position"]) for incident in incidents(tmp_path / "straight")]


def test_trouble_before_the_first_checkpoint_ends_the_run(tiny, poison):
    poison(*range(16))
    with pytest.raises(ValueError, match=r"no checkpoint to rewind to.*lower pretrain\.lr"):
        train(tiny(*RUN, "health.rewind_after=2"), "pretrain")


def test_a_run_does_not_go_back_for_ever(tiny, tmp_path, poison):
    poison(*range(40, 4000))
    with pytest.raises(ValueError, match="after 2 rewinds"):
        train(tiny(*RUN, "health.max_rewinds=2"), "pretrain")
    assert [incident["what"] for incident in incidents(tmp_path / "run")].count("went back") == 2
    assert checkpoint.newest_on_all_ranks(tmp_path / "run/pretrain/checkpoints").name == "step_000000000032"
