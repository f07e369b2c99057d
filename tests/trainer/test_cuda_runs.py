"""Whole runs of the loop on a GPU: their curves are a CPU's, whatever the batch holds, and a kill costs nothing.

Each run has a process of its own, because Accelerate keeps the first device that a process has used.
"""

from __future__ import annotations

import os
import signal
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from models.backbones.pretrained import load_autoencoder
from tests.trainer import rank_processes
from trainer import randomness
from trainer.checkpoints.names import checkpoints
from trainer.data.shards import SetInfo, ShardWriter, scan_shard, write_index
from trainer.log.metrics import read_metrics
from trainer.loop import train
from trainer.recipes.reading import load_recipe
from trainer.recipes.schema import Config
from trainer.stop import Stop

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
TOKENS, WIDTH = 7, 16
TEXT = (f"dit.text_width={WIDTH}", f"dit.text_tokens={TOKENS}", "dit.multistream_depth=1", "pretrain.text_dropout=0.5")
LENGTHS = ("data.latents=LATENTS/mixed", "data.buckets=[18,36]")
EAGER, GRAPHS = "parallel.compile=false", "parallel.graph=true"
BATCHES: dict[str, tuple[str, ...]] = {
    "compiled": ("parallel.compile=true",),
    "accumulated": (EAGER, "parallel.micro_batch=2"),
    "of several lengths": (EAGER, *LENGTHS),
    "with text": (EAGER, *TEXT),
    "graphs": (EAGER, GRAPHS),
    "graphs in bf16": (EAGER, GRAPHS, "parallel.precision=bf16"),
    "graphs of compiled blocks": ("parallel.compile=true", GRAPHS),
    "graphs, accumulated": (EAGER, GRAPHS, "parallel.micro_batch=2"),
    "graphs of several lengths": (EAGER, GRAPHS, *LENGTHS),
    "graphs with text": (EAGER, GRAPHS, *TEXT),
}
ON_CPU = ("parallel.device=cpu", EAGER, "parallel.graph=false")


def recipe(folder: Path, run: str, *overrides: str) -> Config:
    """A run of `pretrain` that logs each step and saves every fourth."""
    places = (f"run_dir={folder / run}", f"data.latents={folder / 'long'}")
    cadence = ("pretrain.samples=96", "log.every=8", "log.samples_every=0", "checkpoint.every=32", "log.held_out=4")
    chosen = [override.replace("LATENTS", str(folder)) for override in overrides]
    return load_recipe("tiny", [*places, *cadence, "parallel.threads=1", *chosen])


def write_latents(folder: Path, name: str, lengths: list[int]) -> None:
    """Write a training set and a held-out set of clips of noise, of these lengths in frames, with text of noise."""
    config = recipe(folder, "none")
    autoencoder = load_autoencoder(**asdict(config.autoencoder))
    info = SetInfo(
        ae_identity=autoencoder.identity(),
        ae_options=asdict(config.autoencoder),
        sample_rate=autoencoder.sample_rate,
        hop=autoencoder.hop,
        latent_channels=config.dit.channels,
        clip_seconds=config.data.clip_seconds,
        text={"encoder": "noise", "tokens": TOKENS, "width": WIDTH},
    )
    for part in ("train", "test"):
        with ShardWriter(folder / name / part) as writer:
            for number, length in enumerate(lengths):
                noise = np.random.default_rng(number)
                x0_CT = noise.standard_normal((config.dit.channels, length)).astype(np.float16)
                text_NE = noise.standard_normal((1 + number % TOKENS, WIDTH)).astype(np.float16)
                writer.write(f"{number:04d}", x0_CT, {"caption": "a sound"}, text_NE=text_NE)
        shards = {shard: scan_shard(folder / name / part / shard) for shard in writer.names}
        write_index(folder / name / part, info, shards)


class KillAfter(Stop):
    """Kills the process in a step after so many samples, once there is a checkpoint."""

    def __init__(self, samples: int, folder: Path) -> None:
        self.samples, self.folder, self.now = samples, folder, 0

    def before_step(self, samples: int) -> None:
        self.now = samples

    def __call__(self) -> bool:
        if self.now >= self.samples and checkpoints(self.folder):
            os.kill(os.getpid(), signal.SIGKILL)
        return False


def run(rank: int, config: Config, killed_after: int | None = None) -> None:
    folder = Path(config.run_dir) / "pretrain" / "checkpoints"
    train(config, "pretrain", stop=Stop() if killed_after is None else KillAfter(killed_after, folder))


def curve(config: Config) -> dict[int, float]:
    lines = read_metrics(Path(config.run_dir) / "pretrain" / "metrics.jsonl")
    return {line["samples"]: line["loss"] for line in lines if line["kind"] == "train"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cuda_runs")
    write_latents(folder, "long", [100] * 32)
    write_latents(folder, "mixed", [15 + 11 * (number % 8) for number in range(64)])
    return folder


@pytest.mark.parametrize("batch", BATCHES)
def test_a_batch_gives_the_cpus_curve(batch, folder):
    ours = recipe(folder, f"{batch} here", *BATCHES[batch], f"parallel.device={DEVICE}")
    theirs = recipe(folder, f"{batch} on a CPU", *BATCHES[batch], *ON_CPU)
    assert [rank_processes.run(run, 1, config) for config in (ours, theirs)] == [[0], [0]]
    assert list(curve(ours)) == list(range(8, 97, 8))
    assert curve(ours) == pytest.approx(curve(theirs), rel=2e-2 if "bf16" in batch else 1e-3)
    if GRAPHS in BATCHES[batch]:
        log = (Path(ours.run_dir) / "pretrain" / "logs" / "rank_0.log").read_text()
        assert log.count("are CUDA graphs") == (3 if "lengths" in batch else 1)
        assert "without CUDA graphs" not in log


@pytest.mark.parametrize("graph", ["false", "true"])
def test_a_killed_run_goes_on_as_if_nothing_had_been(graph, folder):
    device = (f"parallel.device={DEVICE}", EAGER, f"parallel.graph={graph}")
    whole, killed = (recipe(folder, f"{name}, graph={graph}", *device) for name in ("whole", "killed"))
    assert rank_processes.run(run, 1, whole) == [0]
    assert rank_processes.run(run, 1, killed, 40) == [-signal.SIGKILL]
    assert max(curve(killed)) < 96
    assert rank_processes.run(run, 1, killed) == [0]
    assert curve(killed) == pytest.approx(curve(whole), rel=1e-4)


@pytest.mark.parametrize(("batch", "shape"), [(1, (1,)), (3, (7,)), (32, (128, 495))])
def test_noise_is_the_cpus_to_the_bit(batch, shape):
    keys = randomness.keys(5, "noise", torch.arange(batch) + 10**12)
    drawn = randomness.normal(keys.to(DEVICE), *shape)
    assert torch.equal(drawn.cpu(), randomness.normal(keys, *shape))


def test_noise_is_drawn_by_one_kernel():
    pytest.importorskip("triton")
    assert randomness._kernel_works(torch.device(DEVICE))
