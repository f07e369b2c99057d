"""Measure what uploads beside training cost a step: python benchmarks/upload.py [--mib 2] [--blocks 40] [--steps 100].

One run of the recipe `tiny` takes blocks of steps in turn: with nothing beside, with the upload of a checkpoint to an
S3 server on this machine (moto's, from the extra `dev`), and with a bare `s3fs` that puts the same bytes onto the same
server, in a process that steps back as far as ours does. A block has as many steps as lie between two checkpoints at
least, so that its mean step is what a run with the closest checkpoints pays. The neighbouring blocks of a round give
one ratio each, and the medians of all count, with their standard errors. *CPU* is the processor time of the thread that
trains; *wall* also has what the uploading process and the server take from the cores; on a cluster, the server runs
elsewhere. The last row is what an upload takes of the training process, to begin and in any other thread. The program
prints a table.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ["OMP_NUM_THREADS"] = "1"

import psutil
import ranks
import torch
from ranks import say

from launch import pipeline
from tests.stores import ENVIRONMENT, S3
from trainer.checkpoints import checkpoint
from trainer.loop import train_step
from trainer.ranks.flat_ranges import whole_ranges
from trainer.recipes.reading import load_recipe
from trainer.recipes.schema import CheckpointConfig
from trainer.stop import Stop
from trainer.training import Training, set_up

KINDS, BAR = ("nothing", "ours", "bare"), 1.005
BARE = """
import os, sys, s3fs
os.nice(10)
store = s3fs.S3FileSystem(endpoint_url=os.environ["AWS_ENDPOINT_URL"])
for line in sys.stdin:
    store.put(line.strip(), sys.argv[1], recursive=True)
    print(flush=True)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    least = CheckpointConfig().least_steps
    parser.add_argument("--mib", type=int, default=2, help="size of a checkpoint (default: the recipe's own)")
    parser.add_argument("--blocks", type=int, default=40, help="rounds of blocks (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=least, help="steps of a block (default: %(default)s)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work, S3() as server:
        os.environ |= {**ENVIRONMENT, "AWS_ENDPOINT_URL": server.url}
        config = load_recipe(
            "tiny",
            [
                f"run_dir={work}/run",
                f"checkpoint.upload=s3://{server.bucket}/run",
                *("parallel.threads=1", "parallel.device=cpu", "data.workers=1"),
                *("pretrain.samples=1000000", "pretrain.global_batch=32"),
            ],
        )
        pipeline.synth(config)
        pipeline.prepare_latents(config)
        with (
            set_up(config, "pretrain", _InAHurry(), lambda: None) as training,
            Bare(f"{server.bucket}/bare") as bare,
        ):
            rounds = [measure(training, bare, server, number, options) for number in range(options.blocks + 1)]
    print(table(rounds[1:], options))  # the first round also starts the processes


class _InAHurry(Stop):
    """Lets the end of the run wait for no upload."""

    def __call__(self) -> bool:
        return False

    def has_less_than(self, seconds: float) -> bool:
        return True


class Bare:
    """A process that puts folders onto the server with nothing but `s3fs`."""

    def __init__(self, place: str) -> None:
        words = [sys.executable, "-c", BARE, place]
        self._process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._in, self._out = self._process.stdin, self._process.stdout

    def begin(self, path: Path) -> None:
        print(path, file=self._in, flush=True)

    def wait(self) -> None:
        if not self._out.readline():
            raise SystemExit("the bare s3fs failed")

    def __enter__(self) -> Bare:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()


def measure(t: Training, bare: Bare, server: S3, number: int, options: argparse.Namespace) -> dict[str, Any]:
    """Measure a round of blocks, each with something else beside; the one that goes first alternates."""
    values = {f"param/{i}": torch.randn(options.mib << 16) for i in range(4)}  # 4 × 4 bytes × 2^16 are a MiB
    path = checkpoint.save(t.run.checkpoints, 10**9 + number, whole_ranges(values), t.facts)
    os.sync()
    block(t, 10)
    found: dict[str, Any] = {}
    turn = number % len(KINDS)
    for kind in KINDS[turn:] + KINDS[:turn]:
        if kind == "ours":
            found |= upload(t, server, path, options.steps)
        elif kind == "bare":
            bare.begin(path)
            found[kind] = block(t, options.steps)
            bare.wait()
        else:
            found[kind] = block(t, options.steps)
    checkpoint.discard([path])
    say(f"round {number} of {options.blocks}: {found}")
    return found


def upload(t: Training, server: S3, path: Path, steps: int) -> dict[str, Any]:
    """Upload a checkpoint beside some steps; return these steps' times and the CPU seconds of each process."""
    process = t.uploads._process
    others = {
        "uploading": psutil.Process(process.pid if process else None),  # the first round starts it
        "serving": psutil.Process(server._process.pid),
    }
    before = {name: sum(other.cpu_times()[:2]) for name, other in others.items()}
    listened, begun = _listener_seconds(t), time.thread_time()
    t.uploads.checkpoint(path)
    asked = time.thread_time() - begun
    times = block(t, steps)
    whole = not t.uploads.held
    while t.uploads.held:
        time.sleep(0.01)
    spent = {name: sum(other.cpu_times()[:2]) - before[name] for name, other in others.items()}
    return {"ours": times, "here": asked + _listener_seconds(t) - listened, "whole": whole, **spent}


def _listener_seconds(t: Training) -> float:
    """Return the CPU seconds of the thread that listens to the uploading process."""
    ident = t.uploads._listener.ident
    assert ident is not None
    return time.clock_gettime(time.pthread_getcpuclockid(ident))


def block(t: Training, steps: int) -> tuple[float, float]:
    """Take some steps; return the mean wall and CPU seconds of one."""
    wall, begun = time.perf_counter(), time.thread_time()
    for _ in range(steps):
        train_step(t)
    return (time.perf_counter() - wall) / steps, (time.thread_time() - begun) / steps


def table(rounds: list[dict[str, Any]], options: argparse.Namespace) -> str:
    """Return the ratios as a Markdown table."""
    rows = []
    for title, index in (("CPU of the training thread", 1), ("wall", 0)):
        step = statistics.median(each["nothing"][index] for each in rounds)
        ratios = [_ratio([each[kind][index] / each["nothing"][index] for each in rounds]) for kind in ("ours", "bare")]
        rows.append(f"| {title} | {1000 * step:.2f} | {' | '.join(ratios)} |")
    here = _ratio([1 + each["here"] / (options.steps * each["nothing"][1]) for each in rounds])
    rows.append(f"| CPU of the training process for the upload | | {here} | |")
    spent = [f"{1000 * statistics.median(each[name] for each in rounds):.0f} ms" for name in ("uploading", "serving")]
    whole = sum(each["whole"] for each in rounds)
    return "\n".join(
        [
            ranks.describe(ranks.conditions("torch", "s3fs", "fsspec")),
            f"{len(rounds)} rounds of blocks of {options.steps} steps, checkpoints of {options.mib} MiB; {whole} of "
            f"{len(rounds)} uploads were whole before their block had ended. The uploading process takes {spent[0]} of "
            f"CPU for one, the server {spent[1]}. The bar is {BAR}.",
            "",
            "| of a step | ms, with nothing beside | with an upload: × ± standard error | with a bare `s3fs`: × |",
            "|---|---|---|---|",
            *rows,
        ]
    )


def _ratio(ratios: list[float]) -> str:
    error = 1.253 * statistics.stdev(ratios) / len(ratios) ** 0.5  # of a median of normal values
    return f"{statistics.median(ratios):.4f} ± {error:.4f}"


if __name__ == "__main__":
    main()
