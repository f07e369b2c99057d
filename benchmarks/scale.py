"""Count what a run costs at 8 to 1,024 ranks, without such a machine: python benchmarks/scale.py.

One process plays the ranks in turn. The names and shapes are those of step 1 at the size of the public Woosh release,
and the code that cuts ranges, groups ranks into files, writes the manifest and decides what a rank reads is the
program's own. A real load runs as rank 0 of a fake process group, from files without blocks on the disk: its
collectives copy memory and wait for nobody. "Before" is what the same ranks did as of 0.1.0: each wrote a file, and
each read all that it wanted. Times are those of this machine. Nothing here has run on so many ranks.

The second table predicts weak scaling under DDP from counted FLOPs and bytes, and from rates that are assumed.
"""

from __future__ import annotations

import argparse
import json
import math
import pickle
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from step import RELEASED, count  # noqa: E402

from trainer.checkpoints.cover import ends  # noqa: E402
from trainer.checkpoints.loading import load, overlaps, read_by_rank  # noqa: E402
from trainer.checkpoints.manifest import read_manifest, signed, uncovered  # noqa: E402
from trainer.checkpoints.writers import Spans, joined, spans_of, writer_of  # noqa: E402
from trainer.data.order import Order  # noqa: E402
from trainer.memory.outline import outlined_task  # noqa: E402
from trainer.ranks.flat_ranges import FlatRange, split_among_copies  # noqa: E402
from trainer.ranks.gloo import MOST_CONNECTED  # noqa: E402
from trainer.recipes.reading import load_recipe  # noqa: E402
from trainer.recipes.schema import Config  # noqa: E402

RANKS = (8, 64, 512, 1024)
STAGE, KINDS = "autoencode", ("param", "exp_avg", "exp_avg_sq", "ema")
OPENS = 2  # of each file that a rank reads: once for its header, once for its numbers
PLAYED = 8  # ranks whose loads are counted
CLIPS = 8  # of a rank's micro batch
META = {"samples": 0, "steps": 0, "world_size": 1, "base": "", "strategy": "ddp"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS, help="default: %(default)s")
    parser.add_argument("--tflops", type=float, default=445.0, help="assumed of a GPU (default: %(default)s)")
    parser.add_argument(
        "--gigabytes", type=float, default=40.0, help="assumed, a second and GPU (default: %(default)s)"
    )
    parser.add_argument("--microseconds", type=float, default=20.0, help="assumed, a message (default: %(default)s)")
    options = parser.parse_args()
    config = load_recipe("spresso_11hz", ["autoencoder={kind: magnitude, folder: null}"], released=False)
    shapes = shapes_of(config)
    rows: dict[str, list[str]] = {}
    for ranks in options.ranks:
        for name, value in counted(shapes, ranks):
            rows.setdefault(name, []).append(value)
    say("done")
    print(table("a run of this many ranks", options.ranks, rows))
    print()
    trained = sum(math.prod(shape) for name, shape in shapes.items() if name.startswith("param/"))
    print(table("predicted", options.ranks, predicted(config, trained, options)))


def say(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


def table(title: str, ranks: list[int], rows: dict[str, list[str]]) -> str:
    lines = [f"| {title} | {' | '.join(f'{number:,}' for number in ranks)} |", "|---" * (len(ranks) + 1) + "|"]
    return "\n".join([*lines, *(f"| {name} | {' | '.join(values)} |" for name, values in rows.items())])


def shapes_of(config: Config) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of a checkpoint's tensors."""
    task = outlined_task(config, STAGE, RELEASED)
    trained = {name: tuple(value.shape) for name, value in task.learned.items()}
    statistics = {f"statistics/{name}": tuple(value.shape) for name, value in task.statistics.items()}
    return statistics | {f"{kind}/{name}": shape for name, shape in trained.items() for kind in KINDS}


@dataclass
class Strategy:
    """What each rank owns of a checkpoint, and wants of one."""

    shapes: dict[str, tuple[int, ...]]
    ranks: int
    sharded: bool
    """Whether the rows of each trained tensor are dealt to the ranks, as under FSDP2; otherwise all hold all."""

    def wanted(self, rank: int) -> dict[str, FlatRange]:
        """Return the ranges that a rank loads, as tensors without memory."""
        return {name: self._held(name, shape, rank) for name, shape in self.shapes.items()}

    def owned(self, rank: int) -> dict[str, FlatRange]:
        """Return the ranges that a rank saves."""
        wanted = self.wanted(rank)
        whole = {name: part for name, part in wanted.items() if self._is_shared(name)}
        return wanted | split_among_copies(whole, index=rank, copies=self.ranks)

    def shared(self, wanted: dict[str, FlatRange]) -> dict[str, FlatRange]:
        return {name: part for name, part in wanted.items() if self._is_shared(name)}

    def _is_shared(self, name: str) -> bool:
        return not self.sharded or name.startswith("statistics/")

    def _held(self, name: str, shape: tuple[int, ...], rank: int) -> FlatRange:
        if self._is_shared(name):
            return FlatRange(torch.empty(math.prod(shape), device="meta"), shape)
        rows, row = shape[0], math.prod(shape[1:])
        each = -(-rows // self.ranks)
        start, stop = min(rows, rank * each), min(rows, (rank + 1) * each)
        return FlatRange(torch.empty((stop - start) * row, device="meta"), shape, start * row)


def counted(shapes: dict[str, tuple[int, ...]], ranks: int) -> Iterator[tuple[str, str]]:
    """Yield the rows of one number of ranks."""
    numbers = sum(math.prod(shape) for shape in shapes.values())
    yield "bytes of a checkpoint", size(4 * numbers)
    for title, sharded in (("DDP", False), ("FSDP2", True)):
        strategy = Strategy(shapes, ranks, sharded)
        spans = [spans_of(strategy.owned(rank)) for rank in range(ranks)]
        say(f"{ranks} ranks, {title}: cut")
        before = [each for each in spans if each]
        files = grouped(spans, numbers)
        bytes_of = [
            [4 * sum(stop - start for start, stop in file.values()) for file in kind] for kind in (before, files)
        ]
        yield f"{title}: files, before", f"{len(before):,}"
        yield f"{title}: files", f"{len(files):,}"
        yield f"{title}: bytes of the largest, which its writer gathers", size(max(bytes_of[1]))
        yield f"{title}: save, bytes of ranges that each rank got, before", size(ranks * largest(spans))
        yield f"{title}: save, bytes of ranges that rank 0 gets", size(sum(len(pickle.dumps(file)) for file in files))
        yield (
            f"{title}: cover check, bytes that each rank got, before",
            size(ranks * largest(map(with_shapes(shapes), spans))),
        )
        here = [(0, ends((name, *span) for name, span in spans[0].items()))]
        yield f"{title}: cover check, bytes that each rank gets", size(ranks * largest(here))
        for when, kind in ((", before", before), ("", files)):
            seconds, peak, text = manifest_costs(shapes, kind)
            yield f"{title}: manifest{when}", size(text)
            yield f"{title}: manifest, seconds and memory of a reader{when}", f"{seconds:.2f} s, {size(peak)}"
        yield from loads(title, strategy, before, files)
    yield "real load as rank 0 under DDP, seconds, collectives copy only", f"{load_as_rank_0(shapes, ranks):.2f} s"
    yield f"order: microseconds for {CLIPS} clips of a rank, of 10⁹", f"{order_microseconds(ranks):.0f} µs"
    yield "sockets of Gloo a rank for one group, before: one to each other rank", f"{ranks - 1:,}"
    now = f"{ranks - 1:,}" if ranks <= MOST_CONNECTED else f"≤ {2 + 2 * math.ceil(math.log2(ranks))}"
    yield "sockets of Gloo a rank for one group; of many ranks those of a ring and of a tree", now


def grouped(spans: list[Spans], numbers: int) -> list[Spans]:
    """Return the files that the ranks write, each with its spans."""
    groups: dict[int, list[Spans]] = {}
    for rank, each in enumerate(spans):
        groups.setdefault(writer_of(rank, ranks=len(spans), numbers=numbers), []).append(each)
    return [file for group in groups.values() for file in joined(group)]


def loads(title: str, strategy: Strategy, before: list[Spans], files: list[Spans]) -> Iterator[tuple[str, str]]:
    """Yield what all ranks together open and read of a checkpoint that as many ranks saved.

    A few ranks, evenly spaced, stand for all, because to find what each of a thousand ranks reads of a thousand files
    takes too long.
    """
    played = range(0, strategy.ranks, max(1, strategy.ranks // PLAYED))
    for when, stored in ((", before", before), ("", files)):
        opens, read = [], 0
        for rank in played:
            reads = wanted = strategy.wanted(rank)
            if not when:
                reads = read_by_rank(wanted, strategy.shared(wanted), rank=rank, ranks=strategy.ranks)
            parts = [shared for file in stored if (shared := overlaps(file, reads))]  # type: ignore[arg-type]
            opens.append(OPENS * len(parts))
            read += 4 * sum(stop - start for part in parts for start, stop in part.values())
        of_all = sum(opens) * strategy.ranks // len(played)
        yield f"{title}: load, opens of all ranks{when}", f"{of_all:,} (at most {max(opens):,} a rank)"
        yield f"{title}: load, bytes read by all ranks{when}", size(read * strategy.ranks // len(played))


def with_shapes(shapes: dict[str, tuple[int, ...]]) -> Callable[[Spans], Any]:
    """Return a function that gives a rank's spans in the form in which all ranks exchanged them."""
    return lambda spans: {name: (shape, *spans.get(name, (0, 0))) for name, shape in shapes.items()}


def largest(values: Any) -> int:
    """Return the most bytes that a value takes on the way, to which a gathering of objects pads all others."""
    return max(len(pickle.dumps(value)) for value in values)


def document_of(shapes: dict[str, tuple[int, ...]], files: list[Spans]) -> dict[str, Any]:
    entries = {
        f"rank_{number:05d}.safetensors": {
            "bytes": 0,
            "sha256": "0" * 64,
            "ranges": {n: [*span] for n, span in file.items()},
        }
        for number, file in enumerate(files)
    }
    return {"format": 1, "meta": META, "tensors": {n: [*shape] for n, shape in shapes.items()}, "files": entries}


def manifest_costs(shapes: dict[str, tuple[int, ...]], files: list[Spans]) -> tuple[float, int, int]:
    """Return the seconds and the peak memory of reading a manifest, and its bytes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "manifest.json"
        path.write_text(signed(document_of(shapes, files)))
        begun = time.perf_counter()
        assert uncovered(read_manifest(Path(folder))) == []
        seconds = time.perf_counter() - begun
        tracemalloc.start()
        read_manifest(Path(folder))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return seconds, peak, path.stat().st_size


def load_as_rank_0(shapes: dict[str, tuple[int, ...]], ranks: int) -> float:
    """Load a checkpoint of zeros as rank 0 of a fake process group; return the seconds."""
    numbers = sum(math.prod(shape) for shape in shapes.values())
    strategy = Strategy(shapes, ranks, sharded=False)
    files = grouped([spans_of(strategy.owned(rank)) for rank in range(ranks)], numbers)
    document = document_of(shapes, files)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        with tempfile.TemporaryDirectory() as folder:
            for name, entry in document["files"].items():
                entry["bytes"] = write_hollow(Path(folder) / name, entry["ranges"])
            (Path(folder) / "manifest.json").write_text(signed(document))
            tensors = {name: FlatRange(torch.ones(math.prod(shape)), shape) for name, shape in shapes.items()}
            begun = time.perf_counter()
            load(Path(folder), tensors)
            seconds = time.perf_counter() - begun
            assert not any(part.data.any() for part in tensors.values())
            return seconds
    finally:
        dist.destroy_process_group()


def write_hollow(path: Path, ranges: dict[str, list[int]]) -> int:
    """Write a file of ranges that are all zero, without their blocks; return its size."""
    header, position = {}, 0
    for name, (start, stop) in ranges.items():
        end = position + 4 * (stop - start)
        header[name] = {"dtype": "F32", "shape": [stop - start], "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + position)
    return 8 + len(text) + position


def order_microseconds(ranks: int) -> float:
    """Return how long a rank takes to compute the samples of its micro batch."""
    order = Order(10**9, "benchmark", 0, "windowed", lanes=64)
    times = []
    for number in range(200):
        positions = number * CLIPS * ranks + np.arange(CLIPS, dtype=np.int64) * ranks
        begun = time.perf_counter()
        order.ids(positions)
        times.append(time.perf_counter() - begun)
    return 1e6 * sorted(times)[len(times) // 2]


def predicted(config: Config, trained: int, options: argparse.Namespace) -> dict[str, list[str]]:
    """Return the rows of weak scaling under DDP: the same clips on each rank, float32 gradients, a ring.

    The gradients' sum either waits for the whole step or overlaps with the backward pass. FLOPs grow with the clips.
    """
    parts = count(config, STAGE, RELEASED, clips=CLIPS, frames=495)
    rows: dict[str, list[str]] = {}
    for ranks in options.ranks:
        sent = 2 * 4 * trained * (ranks - 1) / ranks
        seconds = sent / (1e9 * options.gigabytes) + 2 * math.ceil(math.log2(ranks)) * 1e-6 * options.microseconds
        found = {"gradients that a rank sends a step": f"{size(int(sent))}, {1000 * seconds:.1f} ms"}
        for clips in (CLIPS, 4 * CLIPS):
            flops = [parts[name].flops * clips / CLIPS for name in ("forward", "backward")]
            forward, backward = (each / (1e12 * options.tflops) for each in flops)
            compute = forward + backward
            found[f"{clips} clips a rank: computing"] = f"{sum(flops) / 1e12:.1f} TFLOP, {1000 * compute:.1f} ms"
            found[f"{clips} clips a rank: efficiency, nothing overlaps"] = f"{compute / (compute + seconds):.0%}"
            behind = forward + max(backward, seconds)
            found[f"{clips} clips a rank: efficiency, behind the backward pass"] = f"{compute / behind:.0%}"
        for name, value in found.items():
            rows.setdefault(name, []).append(value)
    return rows


def size(number: int) -> str:
    """Return a number of bytes with its unit."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if number >= unit:
            return f"{number / unit:.1f} {name}"
    return f"{number} B"


if __name__ == "__main__":
    main()
