"""Traces of a running training: what is in them, that they change no number, and that their failures end nothing."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch.autograd import DeviceType

from launch.local import train_here
from trainer.log import step_tracer
from trainer.log.kernel_table import STEP_PARTS, kernel_table
from trainer.log.metrics import read_metrics
from trainer.log.step_tracer import StepTracer
from trainer.log.trace_request import (
    TraceRequest,
    read_request,
    table_beside,
    trace_folder,
    trace_path,
    traces,
    write_request,
)
from trainer.loop import train

PRETRAIN = ("pretrain.samples=96", "log.every=8", "log.samples_every=0", "checkpoint.every=96")


def curve(run: Path) -> dict[int, float]:
    return {
        line["samples"]: line["loss"]
        for line in read_metrics(run / "pretrain/metrics.jsonl")
        if line["kind"] == "train"
    }


@pytest.fixture(scope="module")
def untraced(prepared, tmp_path_factory) -> dict[int, float]:
    """The curve of a run that nobody traces."""
    from trainer.recipes.reading import load_recipe

    run_dir = tmp_path_factory.mktemp("untraced")
    paths = [f"run_dir={run_dir}", f"data.latents={prepared / 'latents'}", f"data.audio={prepared / 'audio'}"]
    train(load_recipe("tiny", [*paths, "parallel.threads=1", "parallel.device=cpu", *PRETRAIN]), "pretrain")
    assert not trace_folder(run_dir / "pretrain").exists()
    return curve(run_dir)


def test_a_new_run_is_traced_once_and_learns_the_same_to_the_bit(untraced, tiny, tmp_path):
    stage = tmp_path / "run/pretrain"
    assert train(tiny(*PRETRAIN, "log.profile_steps=2"), "pretrain") == "done"
    assert curve(tmp_path / "run") == untraced
    # three steps settle, and one warms the profiler up
    assert traces(stage) == [trace_path(stage, "step_000000000032")]
    with gzip.open(traces(stage)[0]) as file:
        events = json.load(file)["traceEvents"]
    names = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    assert [names.count(part) for part in STEP_PARTS] == [2] * len(STEP_PARTS)
    assert any(event["name"] == "aten::mm" for event in events)
    table = table_beside(traces(stage)[0]).read_text()
    assert table.startswith("pretrain: 2 step(s) after 32 samples, rank 0, CPU\n")
    assert "aten::mm\n" in table
    first = traces(stage)[0].stat().st_mtime_ns
    assert train(tiny(*PRETRAIN, "log.profile_steps=2", "pretrain.samples=160"), "pretrain") == "done"
    assert [path.stat().st_mtime_ns for path in traces(stage)] == [first]


def test_a_request_is_seen_with_a_line_of_the_log_answered_and_removed(untraced, tiny, tmp_path):
    stage = tmp_path / "run/pretrain"
    write_request(stage, TraceRequest(steps=3, asked=1.0))
    assert train(tiny(*PRETRAIN), "pretrain") == "done"
    assert curve(tmp_path / "run") == untraced
    assert [path.name for path in sorted(trace_folder(stage).iterdir())] == [
        "step_000000000016.kernels.txt",
        "step_000000000016.trace.json.gz",
    ]


def test_of_several_ranks_rank_0_is_traced(tiny, tmp_path):
    config = tiny(*PRETRAIN, "pretrain.samples=64", "log.profile_steps=1", "parallel.processes=2")
    assert train_here(config, "pretrain") == "done"
    [trace] = traces(tmp_path / "run/pretrain")
    with gzip.open(trace) as file:
        assert json.load(file)["distributedInfo"]["rank"] == 0


def test_a_profiler_that_fails_ends_no_training(untraced, tiny, tmp_path, monkeypatch):
    def failing(*unused: object, **options: object) -> None:
        raise RuntimeError("Kineto is broken")

    monkeypatch.setattr("trainer.log.step_trace.StepTrace.write", failing)
    stage = tmp_path / "run/pretrain"
    write_request(stage, TraceRequest(steps=1, asked=1.0))
    assert train(tiny(*PRETRAIN), "pretrain") == "done"
    assert curve(tmp_path / "run") == untraced
    assert "no trace of its steps is made: Kineto is broken" in (stage / "logs/rank_0.log").read_text()
    assert list(trace_folder(stage).iterdir()) == []


class Recorded:
    """Stands for a trace, and counts how often it is stopped."""

    def __init__(self, device: object, steps: int) -> None:
        self.steps, self.traced, self.complete, self.samples, self.stopped = steps, -1, False, 0, 0

    def step_ended(self, samples: int) -> None:
        self.traced += 1

    def stop(self) -> None:
        self.stopped += 1


@pytest.fixture
def tracer(tmp_path, monkeypatch) -> StepTracer:
    monkeypatch.setattr(step_tracer, "StepTrace", Recorded)
    run = SimpleNamespace(path=tmp_path, stage="pretrain", require_ownership=lambda: None)
    return StepTracer(run, SimpleNamespace(type="cpu"), None, main=True, at_start=0)  # type: ignore[arg-type]


def test_a_step_without_a_request_reads_no_file_and_makes_no_range(tracer, monkeypatch):
    def forbidden(*unused: object) -> None:
        pytest.fail("this is for a step that is traced")

    for name in ("read_request", "write_request", "remove_request", "record_function", "StepTrace"):
        monkeypatch.setattr(step_tracer, name, forbidden)
    for samples in range(0, 64, 8):
        with tracer.range("forward"):
            tracer.step_ended(samples)


def test_a_trace_notes_how_far_it_is_and_is_given_up_at_the_end(tracer, tmp_path):
    write_request(tmp_path, TraceRequest(steps=3, asked=5.0))
    tracer.look()
    noted = []
    for samples in (8, 16, 24):
        tracer.step_ended(samples)
        noted.append(read_request(tmp_path).traced)
    assert noted == [0, 0, 1]
    recorded = tracer._trace
    tracer.close()
    assert recorded.stopped == 1
    assert read_request(tmp_path) is None


def test_a_damaged_request_is_removed_with_a_warning(tracer, tmp_path, caplog):
    write_request(tmp_path, TraceRequest(steps=21, asked=5.0))
    tracer.look()
    tracer.step_ended(8)
    assert tracer._trace is None
    assert "request.json is damaged (`steps`" in caplog.text
    assert not list(trace_folder(tmp_path).iterdir())


def entry(key: str, kind: DeviceType, microseconds: float, count: int, *, annotation: bool = False) -> SimpleNamespace:
    return SimpleNamespace(
        key=key,
        device_type=kind,
        count=count,
        cpu_time_total=microseconds,
        self_cpu_time_total=microseconds,
        self_device_time_total=microseconds,
        is_user_annotation=annotation,
    )


def test_the_table_of_a_device_has_its_kernels_and_no_ranges():
    entries = [
        entry("forward", DeviceType.CPU, 4000, 2, annotation=True),
        entry("forward", DeviceType.CUDA, 9000, 2, annotation=True),
        entry("aten::mm", DeviceType.CPU, 500, 10),
        entry("k" * 200, DeviceType.CUDA, 3000, 4),
        entry("gemm", DeviceType.CUDA, 1000, 2),
    ]
    assert kernel_table(entries, steps=2, on_device=True).splitlines() == [
        "part of a step  host ms",
        "forward           2.000",
        "",
        "ms a step   share  calls a step  µs a call  kernel",
        f"    1.500  75.0 %           2.0      750.0  {'k' * 90}…",
        "    0.500  25.0 %           1.0      500.0  gemm",
    ]
