"""One loader of `data.py`, in a process of its own: python data_peers.py LOADER make|run|restore|mix FOLDER WORKERS.

Each loader reads the same 20,000 samples from its own format and yields shuffled batches of 64 latents (64, 215) in
float16. The loader's modules are imported before any clock starts.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

SAMPLES, SHAPE, BATCH = 20_000, (64, 215), 64
SHARD_BYTES = 1_600_000  # gives hundreds of shards, as many as a large set has
IN_SHARD = 54  # samples in a shard of that size, as a tar
RESTORE_AT = int(0.9 * SAMPLES) // BATCH * BATCH
Loader = Callable[[Path, int, int], Iterator[Any]]


def samples() -> Iterator[np.ndarray]:
    """Yield the samples, which are the same in each run and too random for a file system to compress."""
    return map(sample, range(SAMPLES))


def sample(number: int) -> np.ndarray:
    """Return a sample of noise whose first two values hold its number."""
    x0 = np.random.default_rng(number).standard_normal(SHAPE).astype(np.float16)
    x0[0, :2] = divmod(number, 1000)
    return x0


def numbers(batch: Any) -> np.ndarray:
    """Return the numbers of the samples in a loader's batch."""
    if hasattr(batch, "x0"):
        batch = batch.x0
    elif isinstance(batch, dict):
        batch = batch["x0"]
    elif isinstance(batch, list | tuple):
        batch = batch[0]
    thousands, ones = np.asarray(batch)[:, 0, :2].astype(np.int64).T
    return 1000 * thousands + ones


class Ours:
    """This project: plain tars with an index."""

    modules = ("torch", "trainer.data.stream")
    crop_frames = SHAPE[1]

    def make(self, folder: Path) -> None:
        from trainer.data.shards import SetInfo, ShardWriter, scan_shard, write_index

        with ShardWriter(folder, max_bytes=SHARD_BYTES) as writer:
            for number, x0 in enumerate(samples()):
                writer.write(f"{number:06d}", x0, {"caption": "a sound"})
        info = SetInfo("a", {}, sample_rate=48_000, hop=480, latent_channels=SHAPE[0], clip_seconds=2.15)
        write_index(folder, info, {name: scan_shard(folder / name) for name in writer.names})

    def batches(self, folder: Path, workers: int, start: int) -> Iterator[Any]:
        from trainer.data.shard_set import ShardSet
        from trainer.data.stream import LatentStream

        stream = LatentStream(ShardSet(folder), crop_frames=self.crop_frames, global_batch=BATCH, seed=0)
        yield from stream.iterate(start, ahead=2 * workers, threads=workers)


class Crops(Ours):
    """This project, with random crops that are four frames shorter than the clips, as in the recipes for 5 s."""

    crop_frames = SHAPE[1] - 4


class Npy:
    """One .npy file per sample, read by torch's DataLoader; Accelerate's `skip_first_batches` restores the position."""

    modules = ("accelerate", "torch.utils.data")

    def make(self, folder: Path) -> None:
        for number, x0 in enumerate(samples()):
            np.save(folder / f"{number:06d}.npy", x0)

    def batches(self, folder: Path, workers: int, start: int) -> Iterator[Any]:
        import torch
        from accelerate import Accelerator
        from torch.utils.data import DataLoader

        class Files(torch.utils.data.Dataset):
            def __len__(self) -> int:
                return SAMPLES

            def __getitem__(self, number: int) -> torch.Tensor:
                return torch.from_numpy(np.load(folder / f"{number:06d}.npy", allow_pickle=False))

        accelerator = Accelerator(cpu=True)
        loader = accelerator.prepare(DataLoader(Files(), BATCH, shuffle=True, num_workers=workers))
        yield from accelerator.skip_first_batches(loader, start // BATCH) if start else loader


class WebDataset:
    """WebDataset on this project's tars, with a shuffle buffer of 1,000; to restore, it reads up to the position."""

    modules = ("webdataset",)

    def make(self, folder: Path) -> None:
        Ours().make(folder)

    def batches(self, folder: Path, workers: int, start: int) -> Iterator[Any]:
        import webdataset as wds

        tars = sorted(map(str, folder.glob("*.tar")))
        dataset = wds.WebDataset(tars, shardshuffle=len(tars), seed=0, empty_check=False)
        dataset = dataset.shuffle(1000).decode().to_tuple("x0.npy").batched(BATCH)
        yield from islice(wds.WebLoader(dataset, batch_size=None, num_workers=workers), start // BATCH, None)


class Wids:
    """The wids package (of webdataset 0.2.111) on this project's tars."""

    modules = ("wids", "torch.utils.data")

    def make(self, folder: Path) -> None:
        Ours().make(folder)

    def batches(self, folder: Path, workers: int, start: int) -> Iterator[Any]:
        import wids
        from torch.utils.data import DataLoader

        description = json.loads((folder / "set.json").read_text())["shards"]
        shards = [{"url": str(folder / shard["name"]), "nsamples": shard["samples"]} for shard in description]
        dataset = wids.ShardListDataset(shards, cache_dir=str(folder / "cache"), keep=True, transformations=[_npy])
        sampler = wids.ChunkedSampler(dataset, chunksize=2000, shuffle=True)
        yield from islice(DataLoader(dataset, BATCH, sampler=sampler, num_workers=workers), start // BATCH, None)


def _npy(sample: dict[str, Any]) -> np.ndarray:
    return np.load(sample[".x0.npy"], allow_pickle=False)


class LitData:
    """LitData on its own chunks; its state restores the position."""

    modules = ("litdata",)

    def make(self, folder: Path) -> None:
        from litdata import optimize

        source = list(range(SAMPLES))
        optimize(_indexed, source, str(folder), chunk_bytes=SHARD_BYTES, num_workers=1, mode="overwrite", verbose=False)

    def batches(self, folder: Path, workers: int, start: int) -> Iterator[Any]:
        from litdata import StreamingDataLoader, StreamingDataset

        def loader() -> Any:
            dataset = StreamingDataset(str(folder), shuffle=True)
            return StreamingDataLoader(dataset, batch_size=BATCH, num_workers=workers)

        if not start:
            yield from loader()
            return
        first = loader()
        for _ in islice(first, start // BATCH):
            pass
        state = first.state_dict()
        yield "ready"
        again = loader()
        again.load_state_dict(state)
        yield from again


def _indexed(number: int) -> dict[str, np.ndarray]:
    return {"x0": sample(number)}


class Mosaic:
    """MosaicML streaming on its own MDS files, shuffled by its py1e algorithm."""

    modules = ("streaming",)

    def __init__(self) -> None:
        _without_torchvision()

    def make(self, folder: Path) -> None:
        from streaming import MDSWriter

        columns = {"x0": f"ndarray:float16:{SHAPE[0]},{SHAPE[1]}"}
        with MDSWriter(out=str(folder), columns=columns, size_limit=SHARD_BYTES, exist_ok=True) as writer:
            for x0 in samples():
                writer.write({"x0": x0})

    def batches(self, folder: Path, workers: int, start: int) -> Iterator[Any]:
        from streaming import StreamingDataLoader, StreamingDataset

        dataset = StreamingDataset(local=str(folder), shuffle=True, batch_size=BATCH, shuffle_seed=0)
        loader = StreamingDataLoader(dataset, batch_size=BATCH, num_workers=workers)
        if start:
            loader.load_state_dict(
                {
                    "epoch": 0,
                    "sample_in_epoch": start,
                    "num_canonical_nodes": 64,
                    "shuffle_seed": 0,
                    "initial_physical_nodes": 1,
                }
            )
        yield from loader


def _without_torchvision() -> None:
    """Put a stub in place of torchvision if its wheel does not match torch's; streaming needs it only for images."""
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        from importlib.machinery import ModuleSpec
        from types import ModuleType

        def attribute(name: str) -> type:
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (), {})

        for name in ("", ".datasets", ".transforms", ".transforms.functional", ".datasets.folder"):
            stub = ModuleType(f"torchvision{name}")
            stub.__spec__ = ModuleSpec(stub.__name__, None)
            stub.__getattr__ = attribute  # type: ignore[method-assign]
            sys.modules[stub.__name__] = stub


LOADERS: dict[str, Any] = {
    "ours": Ours,
    "crops": Crops,
    "npy": Npy,
    "webdataset": WebDataset,
    "wids": Wids,
    "litdata": LitData,
    "mosaicml": Mosaic,
}


def run(batches: Iterator[Any]) -> dict[str, float]:
    """Measure the speed over the first 90 % of an epoch, the CPU time (µs per sample) and the peak memory (MiB)."""
    before = time.perf_counter()
    next(batches)
    first = time.perf_counter()
    cpu = _cpu()
    seen = sum(BATCH for _ in islice(batches, RESTORE_AT // BATCH - 1))
    seconds = time.perf_counter() - first
    if hasattr(batches, "close"):
        batches.close()
    own, children = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return {
        "samples_per_second": seen / seconds,
        "cpu_us": (_cpu() - cpu) / seen * 1e6,
        "first_batch_s": first - before,
        "memory_mib": (own + children) / 1024,
    }


def mix(batches: Iterator[Any]) -> dict[str, float]:
    """Count the distinct shards in 256 consecutive samples; shards are those of the order of writing."""
    seen = np.concatenate([numbers(batch) for batch in islice(batches, SAMPLES // BATCH)])
    groups = seen[: len(seen) // 256 * 256].reshape(-1, 256) // IN_SHARD
    return {"distinct_shards": float(np.mean([len(np.unique(group)) for group in groups]))}


def restore(batches: Iterator[Any]) -> dict[str, float]:
    """Measure the seconds until the first batch after 90 % of an epoch."""
    before = time.perf_counter()
    if isinstance(next(batches), str):  # LitData reads up to the position first, untimed, to get a state to restore
        before = time.perf_counter()
        next(batches)
    return {"restored_s": time.perf_counter() - before}


def _cpu() -> float:
    """Return the CPU seconds of this process and of its workers."""
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in both) + _living_children()


def _living_children() -> float:
    ticks, total = os.sysconf("SC_CLK_TCK"), 0.0
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            if int(fields[1]) == os.getpid():
                total += (int(fields[11]) + int(fields[12])) / ticks
    return total


if __name__ == "__main__":
    name, action, folder, workers = sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
    loader = LOADERS[name]()
    for module in loader.modules:
        importlib.import_module(module)
    import torch

    torch.set_num_threads(1)
    if action == "make":
        loader.make(folder)
        result: dict[str, float] = {}
    elif action in ("run", "mix"):
        result = {"run": run, "mix": mix}[action](loader.batches(folder, workers, 0))
    else:
        result = restore(loader.batches(folder, workers, RESTORE_AT))
    print("RESULT " + json.dumps(result), flush=True)
    os._exit(0)
