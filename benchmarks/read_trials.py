"""Compare ways to read shuffled samples: python benchmarks/read_trials.py FOLDER; prints a Markdown table.

FOLDER holds the samples that `benchmarks/data.py` writes: `sets/ours` below its `--work`. Each way is a loop without
the rest of a stream, so that it can be judged before it is built. All ways run in turn on the same samples from the
page cache; the ratios are to the bare read of the same turn, and the medians count.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
from data import SAMPLE
from isal.isal_zlib import crc32

CHANNELS, LENGTH, FRAMES, START, BATCH = 64, 215, 211, 2, 64
PIECE = 4096  # isal computes checksums of at most 5 KiB without releasing the GIL
Place = tuple[int, int]
"""A sample's file descriptor and offset."""
Way = Callable[[Sequence[Place]], None]
TURN = threading.Lock()
KEPT = threading.local()


def whole(places: Sequence[Place], check: Callable[[memoryview], object] = len, flags: int = 0) -> None:
    """Read samples into their rows of a batch, and check each after its read."""
    rows = _memory("rows", BATCH * CHANNELS, LENGTH).reshape(-1).view(np.uint8).data
    for row, (file, offset) in enumerate(places):
        values = rows[row * SAMPLE : (row + 1) * SAMPLE]
        try:
            os.preadv(file, (values,), offset, flags)
        except BlockingIOError:  # with RWF_NOWAIT: a page is not in the cache, or locked
            os.preadv(file, (values,), offset)
        check(values)


def pieces(values: memoryview) -> int:
    """Return the checksum of a sample, computed piece by piece."""
    checksum = 0
    for start in range(0, len(values), PIECE):
        checksum = crc32(values[start : start + PIECE], checksum)
    return checksum


def cut_at_the_end(places: Sequence[Place], *, windows: bool = False) -> None:
    """Read all samples of a batch, then cut their crops."""
    out, clips = _memory("out", BATCH, CHANNELS, FRAMES), _memory("clips", BATCH, CHANNELS, LENGTH)
    rows = clips.reshape(-1).view(np.uint8).data
    for row, (file, offset) in enumerate(places):
        values = rows[row * SAMPLE : (row + 1) * SAMPLE]
        os.preadv(file, (values,), offset)
        crc32(values)
    sources, targets = (_windows(clips), _crops(out)) if windows else (clips, out)
    for row in range(len(places)):
        first = row * CHANNELS * LENGTH + START
        if windows:
            targets[row] = sources[first : first + CHANNELS * LENGTH : LENGTH]
        else:
            targets[row] = sources[row][:, START : START + FRAMES]


def cut_at_once(places: Sequence[Place], *, windows: bool = False) -> None:
    """Read all samples into the same memory, and cut the crop of each after its read."""
    out, clip = _memory("out", BATCH, CHANNELS, FRAMES), _memory("clip", CHANNELS, LENGTH)
    values = clip.reshape(-1).view(np.uint8).data
    sources, targets = _windows(clip), _crops(out)
    for row, (file, offset) in enumerate(places):
        os.preadv(file, (values,), offset)
        crc32(values)
        if windows:
            targets[row] = sources[START : START + CHANNELS * LENGTH : LENGTH]
        else:
            out[row] = clip[:, START : START + FRAMES]


def only_the_crop(places: Sequence[Place], *, calls: int = CHANNELS) -> None:
    """Read a third of each clip, nothing checked: a clip is a row of each channel, so that each has a call of its own.

    With one call, the values in between are read into memory that nobody looks at.
    """
    third = LENGTH // 3 * 2
    rows = _memory("thirds", BATCH * CHANNELS, third // 2).reshape(-1).view(np.uint8).data
    waste = memoryview(bytearray(2 * LENGTH))[: 2 * LENGTH - third]
    for row, (file, offset) in enumerate(places):
        begin = row * CHANNELS * third
        targets = [rows[begin + channel * third : begin + (channel + 1) * third] for channel in range(CHANNELS)]
        if calls == 1:
            os.preadv(file, [part for target in targets for part in (target, waste)], offset)
            continue
        for channel, target in enumerate(targets):
            os.preadv(file, (target,), offset + 2 * LENGTH * channel)


def _memory(name: str, *shape: int) -> np.ndarray:
    """Return an array of a thread, which is made once: the kernel clears each new page."""
    if not hasattr(KEPT, name):
        setattr(KEPT, name, np.zeros(shape, np.float16))
    return getattr(KEPT, name)


def _windows(clips: np.ndarray) -> np.ndarray:
    return np.ndarray(clips.size - FRAMES + 1, f"V{2 * FRAMES}", clips.data, 0, (2,))


def _crops(out: np.ndarray) -> np.ndarray:
    return out.view(f"V{2 * FRAMES}")[..., 0]


def run(way: Way, places: Sequence[Place], threads: int, turn: AbstractContextManager[object]) -> tuple[float, float]:
    """Return the µs of CPU and of wall clock a sample, if threads take every n-th batch."""

    def read(number: int) -> None:
        for start in range(number * BATCH, len(places), threads * BATCH):
            with turn:
                way(places[start : start + BATCH])

    workers = [threading.Thread(target=read, args=(number,)) for number in range(1, threads)]
    cpu, clock = time.process_time(), time.perf_counter()
    for worker in workers:
        worker.start()
    read(0)
    for worker in workers:
        worker.join()
    each = 1e6 / len(places)
    return (time.process_time() - cpu) * each, (time.perf_counter() - clock) * each


BARE = "bare read"
WAYS: dict[str, Way] = {
    BARE: whole,
    "read and check": lambda places: whole(places, crc32),
    "the same, from the page cache alone (RWF_NOWAIT)": lambda places: whole(places, crc32, os.RWF_NOWAIT),
    "the same, checked in pieces that keep the GIL": lambda places: whole(places, pieces),
    "crops, all cut at the end": cut_at_the_end,
    "crops, all cut at the end, as windows": lambda places: cut_at_the_end(places, windows=True),
    "crops, each cut at once": cut_at_once,
    "crops, each cut at once, as windows": lambda places: cut_at_once(places, windows=True),
    "a third of each clip, a call a channel, nothing checked": only_the_crop,
    "a third of each clip, one call, nothing checked": lambda places: only_the_crop(places, calls=1),
}
THREADED = [*list(WAYS)[:4], "crops, all cut at the end", "crops, each cut at once, as windows"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--repeat", type=int, default=7, help="default: %(default)s")
    parser.add_argument("--samples", type=int, default=200 * BATCH, help="default: %(default)s")
    options = parser.parse_args()
    places = []
    for path in sorted(options.folder.glob("*.tar")):
        size = len(path.read_bytes())  # in the page cache from now on
        file = os.open(path, os.O_RDONLY)
        places += [(file, offset) for offset in range(0, size - SAMPLE, SAMPLE)]
    random.Random(0).shuffle(places)
    places = places[: options.samples]
    rounds: list[dict[str, tuple[float, float]]] = []
    for _ in range(options.repeat):
        figures = {name: run(way, places, 1, nullcontext()) for name, way in WAYS.items()}
        for name in THREADED:
            figures[f"2 threads: {name}"] = run(WAYS[name], places, 2, nullcontext())
            figures[f"2 threads in turns: {name}"] = run(WAYS[name], places, 2, TURN)
        rounds.append(figures)
    print("| way | CPU µs a sample | × a bare read's | samples/s of a bare read's |\n|---|---|---|---|")
    for name in rounds[0]:
        cpu = statistics.median(figures[name][0] for figures in rounds)
        of_cpu = statistics.median(figures[name][0] / figures[BARE][0] for figures in rounds)
        of_speed = statistics.median(figures[BARE][1] / figures[name][1] for figures in rounds)
        print(f"| {name} | {cpu:.1f} | {of_cpu:.2f} | {of_speed:.2f} |")


if __name__ == "__main__":
    main()
