"""The training that the sections of `gpu.py` measure: step 1 by the product's own loop, on data that is noise.

D has the size of the public Woosh release and random weights, made on the device, so that no gigabyte is written or
read. Everything else is what a run has: the reader and its shards, the strategy, the log, the health and the average.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from unittest import mock

import numpy as np
import torch
from gpu_cases import NotAvailable, Setting, slug
from step import RELEASED

from models.autoencoder import AudioAE
from models.backbones.pretrained import load_autoencoder
from models.sizes import DiTConfig
from models.weights import save_weights
from trainer.data.shards import SetInfo, ShardWriter, scan_shard, write_index
from trainer.log.throughput import peak_tflops
from trainer.loop import train_step
from trainer.memory.outline import OutlinedModels
from trainer.recipes.reading import load_recipe
from trainer.recipes.schema import Config
from trainer.stop import Stop
from trainer.tasks import Task, make_task
from trainer.training import Training, set_up

STAGE = "autoencode"
SMALL = DiTConfig(
    channels=128,
    width=32,
    depth=2,
    multistream_depth=1,
    heads=2,
    hidden_width=64,
    text_width=16,
    text_tokens=7,
    patch_size=3,
)
_NEVER = 10**12
_QUIET = (
    *(f"{STAGE}.samples={_NEVER}", f"log.every={_NEVER}", f"checkpoint.every={_NEVER}", "log.samples_every=0"),
    *("log.least_steps=1", "checkpoint.least_steps=1"),
    *(
        "log.held_out=4",
        "log.clips=1",
        "sampling.steps=1",
        "distill.samples=0",
        "health.spike=0",
        "parallel.micro_batch=null",
    ),
)
_TINY = (
    *("latent_encoder.width=32", "latent_encoder.encoder_depth=1", "latent_encoder.upsampler_depth=1"),
    *("latent_encoder.heads=2", "latent_encoder.patch_size=3", "lora.rank=4", f"{STAGE}.crop_frames=45"),
    "parallel.threads=1",
)
TEXT = {False: (f"{STAGE}.text_dropout=1",), True: (f"{STAGE}.text_dropout=0",)}


def sizes_of_dit(setting: Setting) -> DiTConfig:
    """Return the sizes of D."""
    return SMALL if setting.small else RELEASED


def recipe(setting: Setting, name: str, *overrides: str) -> Config:
    """Return the recipe of step 1 at the released size, on the set that `write_set` wrote.

    Args:
        setting: what the cases share.
        name: a name for the run's folder.
        overrides: settings of the recipe.

    Raises:
        NotAvailable: the product refuses the settings; the message is the product's.
    """
    folder = setting.folder
    here = (f"run_dir={folder / 'runs' / slug(name)}", f"data.latents={folder / 'latents'}")
    base = ("autoencoder={kind: magnitude, folder: null}", f"pretrained.folder={folder / 'outline'}")
    device = (f"parallel.device={setting.device}", "parallel.processes=1", *(_TINY if setting.small else ()))
    try:
        return load_recipe("spresso_11hz", [*here, *base, *_QUIET, *device, *overrides], released=False)
    except ValueError as refusal:
        raise NotAvailable(str(refusal).splitlines()[0]) from None


def write_outline(setting: Setting) -> None:
    """Write the file of a base model that has D's sizes in its header, and no weights."""
    folder = setting.folder / "outline"
    folder.mkdir(parents=True)
    save_weights(folder / "dit.safetensors", {"none": torch.zeros(1)}, dataclasses.asdict(sizes_of_dit(setting)))


def write_set(setting: Setting, *, samples: int) -> None:
    """Write a training set and a held-out set of clips of noise, with text of noise."""
    write_outline(setting)
    config, dit = recipe(setting, "set"), sizes_of_dit(setting)
    autoencoder = load_autoencoder(**dataclasses.asdict(config.autoencoder))
    assert dit.text_width is not None
    info = SetInfo(
        ae_identity=autoencoder.identity(),
        ae_options=dataclasses.asdict(config.autoencoder),
        sample_rate=autoencoder.sample_rate,
        hop=autoencoder.hop,
        latent_channels=dit.channels,
        clip_seconds=config.data.clip_seconds,
        text={"encoder": "noise", "tokens": dit.text_tokens, "width": dit.text_width},
    )
    frames = 50 if setting.small else 500
    for name, count in (("train", samples), ("test", 8)):
        with ShardWriter(setting.folder / "latents" / name) as writer:
            for number in range(count):
                noise = np.random.default_rng(number)
                x0_CT = noise.standard_normal((dit.channels, frames), np.float32).astype(np.float16)
                text_NE = noise.standard_normal((dit.text_tokens, dit.text_width), np.float32).astype(np.float16)
                writer.write(f"{number:06d}", x0_CT, {"caption": "a sound"}, text_NE=text_NE)
        shards = {shard: scan_shard(setting.folder / "latents" / name / shard) for shard in writer.names}
        write_index(setting.folder / "latents" / name, info, shards)


class RandomModels(OutlinedModels):
    """Models of given sizes with random weights, beside the recipe's AudioAE."""

    def autoencoder(self) -> AudioAE:
        with torch.device("cpu"):
            return load_autoencoder(**dataclasses.asdict(self.config.autoencoder))


def random_task(config: Config, stage: str, device: torch.device, dit: DiTConfig) -> Task:
    """Make a stage's Task on a device, with random weights."""
    with device:
        return make_task(config, stage, models=RandomModels(config, dit))


@contextmanager
def random_weights(setting: Setting) -> Iterator[None]:
    """Let the product's code make its Task with random weights; of tiny sizes, blocks are not compiled either."""

    def on_device(config: Config, stage: str) -> Task:
        return random_task(config, stage, torch.device(setting.device), sizes_of_dit(setting))

    with ExitStack() as changed:
        changed.enter_context(mock.patch("trainer.training.make_task", on_device))
        if setting.small:  # which would take most of the time
            changed.enter_context(mock.patch.object(torch.nn.Module, "compile"))
        yield


@contextmanager
def training(setting: Setting, config: Config) -> Iterator[Training]:
    """Set a training up by the product's own code, but for the weights of D, which are random."""
    with random_weights(setting), set_up(config, STAGE, Stop(), lambda: None) as prepared:
        try:
            yield prepared
        finally:
            prepared.strategy.close()


def take_step(prepared: Training) -> None:
    """Take one step of the loop."""
    if train_step(prepared) is None:
        raise RuntimeError("the loop made no step")


def times(step: Callable[[], None], device: str, *, count: int) -> list[float]:
    """Return the seconds between the ends of `count` steps, by the device's own clock."""
    if device != "cuda":
        marks = [time.perf_counter()]
        for _ in range(count):
            step()
            marks.append(time.perf_counter())
        return [after - before for before, after in pairwise(marks)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) / 1000 for before, after in pairwise(events)]


def alternating(steps: dict[str, Callable[[], None]], device: str, *, rounds: int, count: int) -> dict[str, float]:
    """Return the median seconds of each kind of step; the kinds take turns, so that what changes meets all of them."""
    found: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        times(step, device, count=count)  # the first ones compile and allocate
    for _ in range(rounds):
        for name, step in steps.items():
            found[name] += times(step, device, count=count)[1:]
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def peak_gib(device: str) -> float | None:
    """Return the most memory that tensors took since the last reset; None on a CPU."""
    return torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None


def utilisation(flops: float, seconds: float, device: str) -> dict[str, float]:
    """Return TFLOP/s, and MFU if the device's peak in half precision is known."""
    tflops = flops / seconds / 1e12
    peak = peak_tflops(torch.cuda.get_device_name(), "bf16") if device == "cuda" else None
    return {"TFLOP/s": tflops} | ({} if peak is None else {"MFU": tflops / peak})
