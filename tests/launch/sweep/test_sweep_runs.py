"""A sweep on this machine, with a recipe so small that its stages are really trained."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from launch import owner, pipeline
from launch.cli import main
from launch.signals import STOPPED
from launch.sweep import directory, here, outcomes, part
from launch.sweep.plan import Plan, SharedStage, SweepPoint, make_plan, recorded_plan
from models.atomic_write import write_whole
from tests.cluster.slurm_nodes import until
from trainer.recipes.reading import load_recipe
from trainer.recipes.schema import Config

ROOT = Path(__file__).parents[3]
SMALL = (
    *("pretrain.samples=16", "autoencode.samples=16", "finetune.samples=16", "quantizer.size=8", "log.trackers=[]"),
    *("log.samples_every=0", "log.clips=1", "log.held_out=2", "parallel.threads=1", "parallel.device=cpu"),
    *("evaluate.clips=2", "evaluate.page_clips=1", "evaluate.decodes=1", "evaluate.curve=0", "sampling.steps=2"),
)
GRID = ("autoencode.lr=1e-4,3e-4", "finetune.lr=1e-4,3e-4")
TRAINED = ("pretrain", "autoencode", "quantize", "finetune")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def plan(prepared: Path) -> Callable[..., Plan]:
    """Return a function that plans a sweep of the small recipe, on latents that exist."""

    def make(*overrides: str) -> Plan:
        given = [*SMALL, f"data.latents={prepared / 'latents'}", *overrides]
        return make_plan("tiny", given, points=None, folder=Path("s"))

    return make


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Run parts in this process, where torch is imported already; return how often each stage was really trained."""
    counted = Counter[str]()
    train_here = pipeline.train_here

    def counting(config: Config, stage: str) -> str:
        counted[stage] += 1
        return train_here(config, stage)

    def run_part(plan: Plan, part_: SweepPoint | SharedStage, stages: Sequence[str], label: str, stop: object) -> int:
        monkeypatch.setattr(sys, "argv", ["part", str(plan.folder), directory.folder_of(part_), *stages])
        return part.main()

    monkeypatch.setattr(pipeline, "train_here", counting)
    monkeypatch.setattr(here, "_run_part", run_part)
    monkeypatch.setattr(part, "_end_with_parent", lambda: None)
    for stage, file in (("evaluate", "evaluation.json"), ("page", "index.html")):
        monkeypatch.setitem(pipeline.UNTRAINED, stage, _leaving(f"{stage}/{file}"))
    return counted


def _leaving(file: str) -> Callable[[Config], None]:
    """Return a stage that leaves a file, in place of an evaluation that would take as long as all the training."""

    def run(config: Config) -> None:
        write_whole(Path(config.run_dir) / file, "")

    return run


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "export").glob("*.safetensors"))}


def test_shared_stages_are_trained_once_and_points_end_as_they_would_alone(plan, trained, prepared, tmp_path, capsys):
    assert here.run(plan(*GRID)) == 0
    assert trained == {"pretrain": 1, "autoencode": 2, "quantize": 2, "finetune": 4}
    points = sorted((tmp_path / "s/points").iterdir())
    assert len(points) == 4
    assert all(
        (point / "page/index.html").is_file() and (point / "evaluate/evaluation.json").is_file() for point in points
    )
    told = capsys.readouterr().err
    assert "point 4 of 4: autoencode.lr=3e-4,finetune.lr=3e-4" in told

    # one of the points alone, to the bit
    given = [*SMALL, f"data.latents={prepared / 'latents'}", "autoencode.lr=3e-4", "finetune.lr=1e-4"]
    alone = load_recipe("tiny", [*given, f"run_dir={tmp_path / 'alone'}", "name=alone"])
    pipeline.run(alone, TRAINED)
    for stage in TRAINED:
        shared = weights(tmp_path / "s/points/autoencode.lr=3e-4,finetune.lr=1e-4" / stage)
        assert shared == weights(tmp_path / "alone" / stage)
        assert shared

    # the same again trains nothing; a further value trains one point; the point alone is done, too
    trained.clear()
    assert here.run(plan(*reversed(GRID))) == 0
    assert trained == {}
    assert here.run(plan("autoencode.lr=3e-4", "finetune.lr=5e-4")) == 0
    assert trained == {"finetune": 1}
    trained.clear()
    assert pipeline.run(load_recipe(str(points[0] / "config.yaml"), []), TRAINED) == "done"
    assert trained == {}
    assert main(["status", "s"]) == 0
    shown = capsys.readouterr().out
    assert "s, a sweep: 5 of 5 points done" in shown
    assert shown.count("shared/") == 5


def test_a_shared_stage_without_its_export_is_made_again(plan, trained, tmp_path):
    """A checkpoint is there, so that nothing is trained again but the export."""
    assert here.run(plan("finetune.lr=1e-4,3e-4")) == 0
    trained.clear()
    [export] = tmp_path.glob("s/shared/autoencode-*/autoencode/export")
    made = {path.name: path.read_bytes() for path in export.glob("*.safetensors")}
    for path in export.glob("*.safetensors"):
        path.unlink()
    assert here.run(plan("finetune.lr=1e-4,3e-4")) == 0
    assert trained == {}  # no point needs it any more
    assert here.run(plan("finetune.lr=5e-4")) == 0
    assert trained == {"autoencode": 1, "finetune": 1}
    assert {path.name: path.read_bytes() for path in export.glob("*.safetensors")} == made


def test_a_point_that_fails_is_named_and_the_others_go_on(plan, trained, tmp_path, capsys):
    grid = plan("finetune.lr=1e-4,1e15,3e-4", "health.max_rewinds=0")
    assert here.run(grid) == 1
    told = capsys.readouterr().err
    assert "2 of 3 points are done; failed: finetune.lr=1e15" in told
    assert "not finite" in outcomes.latest(Path("s"))["points/finetune.lr=1e15"]["why"]
    assert main(["status", "s"]) == 0
    shown = capsys.readouterr().out
    assert "2 of 3 points done, 1 failed" in shown
    assert "finetune.lr=1e15: the audio has values that are not finite" in shown
    trained.clear()
    assert here.run(grid) == 1
    assert trained == {"finetune": 1}


class Scripted:
    """Parts that end as a test says, by their run directories, without being run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ran: list[str] = []
        self.statuses: dict[str, int] = {}
        monkeypatch.setattr(here, "_run_part", self.run)
        monkeypatch.setattr(directory, "is_done", lambda part_: False)

    def run(self, plan: Plan, part_: SweepPoint | SharedStage, stages: Sequence[str], label: str, stop: object) -> int:
        self.ran.append(directory.folder_of(part_))
        return self.statuses.get(self.ran[-1], 0)


def test_what_needs_a_failed_stage_is_not_run_and_the_rest_is(plan, monkeypatch, capsys):
    scripted = Scripted(monkeypatch)
    two = plan("dit.depth=2,3", "finetune.lr=1e-4,3e-4")
    failing = next(shared.folder for shared in two.shared if shared.stage == "autoencode")
    scripted.statuses[failing] = 1
    assert here.run(two) == 1
    ran = [name for name in scripted.ran if name.startswith("points/")]
    assert len(ran) == 2
    assert len([name for name in scripted.ran if name.startswith("shared/quantize")]) == 1
    told = capsys.readouterr().err
    assert "2 of 4 points are done; failed: " in told
    assert "not run, because autoencode, which it shares, failed" in told


def test_status_75_of_a_part_stops_the_whole_with_75(plan, monkeypatch, capsys):
    scripted = Scripted(monkeypatch)
    scripted.statuses["points/finetune.lr=1e-4"] = STOPPED
    assert here.run(plan("finetune.lr=1e-4,3e-4")) == STOPPED
    assert [Path(place).name.partition("-")[0] for place in scripted.ran[:3]] == ["pretrain", "autoencode", "quantize"]
    assert scripted.ran[3:] == ["points/finetune.lr=1e-4"]
    assert "stopped and saved, 0 of 2 points are done; repeat the command" in capsys.readouterr().err


def test_a_second_sweep_in_the_directory_is_refused_while_the_first_lives(plan, trained):
    two = plan("finetune.lr=1e-4,3e-4")
    holds = f"owner.holding(Path({str(two.folder.resolve())!r}))"
    program = "import time\nfrom pathlib import Path\nfrom launch import owner\n"
    program += f"with {holds}:\n    print('holds', flush=True)\n    time.sleep(600)"
    other = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "holds\n"
        with pytest.raises(ValueError, match=f"in use by .*{other.pid}"):
            here.run(two)
        assert trained == {}
        assert not (two.folder / "sweep.json").exists()
    finally:
        other.kill()
        other.wait()
    assert owner.at_work(two.folder) is None


def spresso(*arguments: str, **options: object) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "launch.cli", *arguments]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, **options)  # type: ignore[call-overload]


def steps(folder: Path) -> list[int]:
    """Return the samples of each line of the log."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    entries = [json.loads(line) for line in lines if line.endswith("\n")]
    return [entry["samples"] for entry in entries if entry["kind"] == "train"]


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_it_resumes_after_a_signal_or_a_kill(how: signal.Signals, plan, trained, prepared, tmp_path):
    long = ["pretrain.samples=40000", "pretrain.decay=0", "checkpoint.every=64", "finetune.lr=1e-4,3e-4"]
    given = [*SMALL, f"data.latents={prepared / 'latents'}", *long]
    process = spresso("sweep", "tiny", *given, "--dir", "s")
    try:
        until(lambda: any(tmp_path.glob("s/shared/pretrain-*/pretrain/checkpoints/step_*")), 120, "a checkpoint")
        [stage] = tmp_path.glob("s/shared/pretrain-*/pretrain")
        process.send_signal(how)
        told = process.communicate(timeout=60)[1]
        # the part saves and ends with its parent, even if that was killed
        until(lambda: owner.at_work(stage.parent) is None and owner.holder(stage) is None, 60, "the end of the part")
    finally:
        process.kill()
        process.wait()
    if how == signal.SIGTERM:
        assert process.returncode == STOPPED, told
    seen = steps(stage)
    assert 0 < seen[-1] < 40000
    assert json.loads((stage / "status.json").read_text())["state"] == "stopped"
    with pytest.MonkeyPatch.context() as patch:  # the rest, up to where the first point begins
        patch.setattr(here, "_run_points", lambda *_: iter(()))
        patch.setattr(pipeline, "train_here", _shorter(pipeline.train_here))
        here.run(plan(*long))
    again = steps(stage)
    assert again[: len(seen)] == seen
    assert len(set(again)) == len(again) > len(seen)


def _shorter(train_here: Callable[[Config, str], str]) -> Callable[[Config, str], str]:
    """Return a training that goes on for a little while only."""

    def train(config: Config, stage: str) -> str:
        folder = Path(config.run_dir) / stage
        getattr(config, stage).samples = (steps(folder) or [0])[-1] + 64
        return train_here(config, stage)

    return train


def test_what_is_done_stays_done_elsewhere_and_under_another_log(plan, trained, tmp_path, monkeypatch):
    assert here.run(plan("finetune.lr=1e-4,3e-4")) == 0
    trained.clear()
    again = plan("finetune.lr=1e-4,3e-4", "log.every=8")
    again.folder = tmp_path / "s"
    assert here.run(again) == 0
    assert here.run(recorded_plan(tmp_path / "s")) == 0
    (tmp_path / "s").rename(tmp_path / "t")
    monkeypatch.chdir("/")
    assert all(map(directory.is_done, recorded_plan(tmp_path / "t").points))
    assert here.run(recorded_plan(tmp_path / "t")) == 0
    assert trained == {}
    # another evaluation is made again, also if the first attempt at it was killed before it began
    other = make_plan("tiny", [*SMALL, *_given(tmp_path / "t"), "evaluate.clips=3"], points=None, folder=tmp_path / "t")
    directory.make(other)
    assert not any(map(directory.is_done, other.points))


def _given(sweep: Path) -> list[str]:
    """Return the settings by which a sweep was begun, besides the small ones."""
    config = recorded_plan(sweep).points[0].config
    return [f"data.latents={config.data.latents}", "finetune.lr=1e-4,3e-4"]
