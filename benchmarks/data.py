"""Compare data loaders: python benchmarks/data.py [--json FILE] [--work DIR]; prints Markdown tables.

The program writes the same 20,000 samples in each loader's format, installs each peer in a virtual environment of its
own below DIR, and measures the loaders in turn, `--repeat` times; the median counts. All files are in the page cache,
so that the loaders are compared and not the disk. Each run of a loader follows a bare random read, and the ratios to it
are given, too. A second table has the shuffled order and the index at 10⁹ samples.

With `--before DIR`, another checkout of this project is measured in turn with this one, on the same samples.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
PEERS = {
    "webdataset": ["webdataset==1.0.2"],
    "wids": ["webdataset==0.2.111"],
    "litdata": ["litdata==0.2.76"],
    "mosaicml": ["mosaicml-streaming==0.13.0"],
}
HERE = ("ours", "before", "crops", "crops-before", "npy")
BEFORE = {"before": "ours", "crops-before": "crops"}  # loaders that are run with the code of `--before`
TITLES = {
    "ours": "this project",
    "before": "this project, before",
    "crops": "this project, crops of 211 frames",
    "crops-before": "this project, crops of 211 frames, before",
    "npy": "plain .npy, DataLoader",
    "webdataset": "WebDataset",
    "wids": "wids",
    "litdata": "LitData",
    "mosaicml": "MosaicML streaming",
}
SAMPLE = 2 * 64 * 215  # bytes
GROUPS = 371
IDEAL = GROUPS * (1 - (1 - 1 / GROUPS) ** 256)
FORMAT = dict.fromkeys(("before", "crops", "crops-before", "webdataset", "wids"), "ours")
"""Loaders that read the files of another loader."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="a file to write the figures to")
    parser.add_argument(
        "--work",
        type=Path,
        default=Path(tempfile.gettempdir()) / "spresso-benchmark-data",
        help="a folder for the samples and environments, which later runs reuse (default: %(default)s)",
    )
    parser.add_argument("--repeat", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--only", nargs="+", choices=list(TITLES), default=list(TITLES), help="default: all")
    parser.add_argument("--before", type=Path, help="another checkout of this project to compare with")
    options = parser.parse_args()
    if not options.before:
        options.only = [name for name in options.only if name not in BEFORE]
    options.work.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Any] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {name: version for name in ("torch", "numpy") if (version := importlib.metadata.version(name))},
        "loaders": {},
    }
    for name in options.only:
        install(name, options.work)
        make(name, options.work)
    for repeat in range(options.repeat):
        for name in options.only:
            for workers in (0, 2):
                say(f"{repeat + 1} of {options.repeat}: {TITLES[name]}, {workers} workers")
                row = figures["loaders"].setdefault(name, {}).setdefault(str(workers), {})
                warm(folder_of(name, options.work))
                for kind, measured in bare_reads(folder_of("ours", options.work)).items():
                    figures.setdefault("reads", {}).setdefault(kind, []).append(measured)
                    for key, value in measured.items() if kind == "at random" else ():
                        row.setdefault(f"bare_{key}", []).append(value)
                for action in ("run", "restore"):
                    for key, value in call(name, action, options.work, workers, before=options.before).items():
                        row.setdefault(key, []).append(value)
    for name in options.only:
        mixed = call(name, "mix", options.work, 0, before=options.before)
        figures["loaders"][name]["0"]["distinct_shards"] = [mixed["distinct_shards"]]
    say("the order at 10⁹ samples")
    figures["orders"] = [order_of_a_billion(kind, options.work) for kind in ("global", "windowed")]
    figures["mixing"] = mixing()
    print(table(figures))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


def install(name: str, work: Path) -> None:
    """Make a peer's virtual environment, with this environment's version of torch."""
    if name in HERE or python_of(name, work).exists():
        return
    say(f"installing {TITLES[name]}")
    torch = importlib.metadata.version("torch").split("+")[0]
    constraints = work / "constraints.txt"
    constraints.write_text(f"torch=={torch}\n")
    subprocess.run([sys.executable, "-m", "venv", work / name], check=True)
    packages = [f"torch=={torch}", *PEERS[name]]
    command = [python_of(name, work), "-m", "pip", "install", "--quiet", "-c", constraints, *packages]
    subprocess.run(command, check=True)


def make(name: str, work: Path) -> None:
    """Write the samples in a loader's format, unless an earlier run did."""
    folder = folder_of(name, work)
    done = folder / ".made"
    if done.exists():
        return
    say(f"writing the samples for {TITLES[name]}")
    folder.mkdir(parents=True, exist_ok=True)
    call(name, "make", work, 0)
    done.write_text("")


def folder_of(name: str, work: Path) -> Path:
    """Return the folder of a loader's files."""
    return work / "sets" / FORMAT.get(name, name)


def python_of(name: str, work: Path) -> Path:
    """Return the Python interpreter of the environment that has the loader."""
    return Path(sys.executable) if name in HERE else work / name / "bin" / "python"


def call(name: str, action: str, work: Path, workers: int, *, before: Path | None = None) -> dict[str, float]:
    """Run `data_peers.py` in its own process and return its result; `before` has the code of loaders in `BEFORE`."""
    command = [
        python_of(name, work),
        ROOT / "benchmarks/data_peers.py",
        BEFORE.get(name, name),
        action,
        folder_of(name, work),
        str(workers),
    ]
    code = before if before and name in BEFORE else ROOT
    environment = os.environ | {"PYTHONPATH": str(code), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = [line for line in result.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        raise SystemExit(f"data_peers.py {name} {action} failed:\n{result.stderr[-2000:]}")
    return json.loads(lines[0].removeprefix("RESULT "))


def warm(folder: Path) -> None:
    """Read all files of a loader once, so that they are in the page cache."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while file.read(1 << 20):
                    pass


def bare_reads(folder: Path) -> dict[str, dict[str, float]]:
    """Time plain reads of the shards by one thread, without checksums: the lower bound for any loader."""
    warm(folder)
    paths = sorted(folder.glob("*.tar"))
    return {
        "in order": _time_read(lambda: _read_in_order(paths)),
        "at random": _time_read(lambda: _read_at_random(paths)),
    }


def _time_read(read: Callable[[], int]) -> dict[str, float]:
    cpu, start = time.process_time(), time.perf_counter()
    samples = read() / SAMPLE
    return {
        "samples_per_second": samples / (time.perf_counter() - start),
        "cpu_us": (time.process_time() - cpu) / samples * 1e6,
    }


def _read_in_order(paths: list[Path]) -> int:
    """Read the shards from start to end, a MiB at a time; return the number of bytes."""
    buffer, size = bytearray(1 << 20), 0
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while got := file.readinto(buffer):
                size += got
    return size


def _read_at_random(paths: list[Path]) -> int:
    """Read samples in random order, each by one call into its row of a batch; return the number of bytes.

    No loader that shuffles can do with less.
    """
    rows = memoryview(bytearray(64 * SAMPLE))
    batch = [rows[row * SAMPLE : (row + 1) * SAMPLE] for row in range(64)]
    places = [(path, start) for path in paths for start in range(0, path.stat().st_size - SAMPLE, SAMPLE)]
    random.Random(0).shuffle(places)
    with ExitStack() as stack:
        files = {path: stack.enter_context(path.open("rb", buffering=0)).fileno() for path in paths}
        return sum(os.preadv(files[path], [batch[n % 64]], start) for n, (path, start) in enumerate(places))


def order_of_a_billion(kind: str, work: Path) -> dict[str, Any]:
    """Measure a set of 10⁹ samples: the time to open it, to draw 1024 shuffled ids, and to read their index rows."""
    folder = work / "sets" / "billion"
    if not (folder / "set.json").exists():
        _make_billion(folder)
    program = (
        "import json, sys, time; from pathlib import Path; import numpy as np\n"
        "from trainer.data.shard_set import ShardSet; from trainer.data.stream import Shuffle\n"
        "def anonymous(): return int(open('/proc/self/status').read().split('RssAnon:')[1].split()[0]) / 1024\n"
        "before, start = anonymous(), time.perf_counter()\n"
        "shard_set = ShardSet(Path(sys.argv[1])); order = Shuffle(sys.argv[2]).order(shard_set, 0)\n"
        "opened = time.perf_counter() - start\n"
        "firsts = np.random.default_rng(0).integers(0, 10**9 - 1024, 300).tolist()\n"
        "order.ids(np.arange(1024)); start = time.perf_counter()\n"
        "ids = [order.ids(np.arange(first, first + 1024)) for first in firsts]\n"
        "asked = time.perf_counter() - start\n"
        "many = np.arange(4096); start = time.perf_counter(); order.ids(many); dealt = time.perf_counter() - start\n"
        "start = time.perf_counter(); [shard_set.index[of] for of in ids]; rows = time.perf_counter() - start\n"
        "print(json.dumps({'open_s': opened, 'us_per_1024_ids': asked / 300 * 1e6, 'us_dealt': dealt / 4 * 1e6,\n"
        "    'us_per_1024_rows': rows / 300 * 1e6, 'memory_mib': anonymous() - before}))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program, folder, kind]
    return {"order": kind} | json.loads(
        subprocess.run(command, env=environment, capture_output=True, check=True).stdout
    )


def _make_billion(folder: Path) -> None:
    """Write an index of 10⁹ samples and shards of a GiB as sparse files, which take no disk space."""
    from dataclasses import asdict

    from numpy.lib import format as npy

    from trainer.data.index_row import INDEX_ROW
    from trainer.data.shards import SET_VERSION, SetInfo

    samples, shards, shard_bytes = 10**9, 27_000, 2**30
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "index.npy").open("wb") as file:
        header = {"descr": npy.dtype_to_descr(INDEX_ROW), "fortran_order": False, "shape": (samples,)}
        npy.write_array_header_1_0(file, header)
        file.truncate(file.tell() + samples * INDEX_ROW.itemsize)
    for number in range(shards):
        with (folder / f"{number:05d}.tar").open("wb") as file:
            file.truncate(shard_bytes)
    info = SetInfo("a", {}, sample_rate=48_000, hop=480, latent_channels=64, clip_seconds=2.15)
    described = [{"name": f"{n:05d}.tar", "bytes": shard_bytes, "samples": samples // shards} for n in range(shards)]
    facts = {"fingerprint": "a", "samples": samples, "total_frames": 215 * samples}
    facts |= {"shortest_frames": 215, "longest_frames": 215, "shards": described}
    (folder / "set.json").write_text(json.dumps({"version": SET_VERSION} | asdict(info) | facts))


def mixing() -> dict[str, float]:
    """Count the distinct shards in 256 consecutive samples, per kind of order, and the expected number at random.

    The set has 460 shards of 200 samples of 27.5 KB, and the shuffle window has 2 GiB.
    """
    from trainer.data.order import Order

    shards, in_shard = 460, 200
    window = 2 * 2**30 // SAMPLE
    result = {"ideal": shards * (1 - (1 - 1 / shards) ** 256)}
    for kind in ("global", "windowed", "none"):
        order = Order(shards * in_shard, "a", 0, kind, 64, window, 64)
        starts = range(0, shards * in_shard - 256, 997)
        result[kind] = statistics.mean(
            len(np.unique(order.ids(np.arange(first, first + 256)) // in_shard)) for first in starts
        )
    return result


def table(figures: dict[str, Any]) -> str:
    """Return the medians of all figures as Markdown tables."""
    loaders = figures["loaders"]
    lines = [
        f"{figures['date']}, {figures['machine']}, torch {figures['versions']['torch']}. 20,000 samples of 64 × 215 "
        f"float16, batch 64, shuffled, page cache warm.",
        "",
        "| loader | workers | samples/s | of ours | of a bare read's | CPU µs a sample | × a bare read's | "
        "first batch s | restored at 90 % s | peak MiB | shards |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for workers in ("0", "2"):
        ours = _median(loaders["ours"][workers]) if "ours" in loaders else {"samples_per_second": float("nan")}
        for name in loaders:
            row = _median(loaders[name][workers])
            of_bare = {key: _of_bare(loaders[name][workers], key) for key in ("samples_per_second", "cpu_us")}
            lines.append(
                f"| {TITLES[name]} | {workers} | {row['samples_per_second']:,.0f} | "
                f"{row['samples_per_second'] / ours['samples_per_second']:.2f} | "
                f"{of_bare['samples_per_second']:.2f} | {row['cpu_us']:.1f} | {of_bare['cpu_us']:.2f} | "
                f"{row['first_batch_s']:.3f} | {row['restored_s']:.3f} | {row['memory_mib']:,.0f} | "
                + (f"{row['distinct_shards']:.0f} |" if "distinct_shards" in row else "|")
            )
    for kind, measured in figures["reads"].items():
        read = {key: statistics.median(one[key] for one in measured) for key in measured[0]}
        speed = f"{read['samples_per_second']:,.0f} | | | {read['cpu_us']:.1f} | "
        lines.append(f"| bare read, {kind}, nothing checked | | {speed} | | | | |")
    lines += [
        "",
        f"Shards: distinct ones in 256 samples that follow each other, of {GROUPS}; {IDEAL:.0f} if all were drawn at "
        f"random.",
        "",
        "| 10⁹ samples, 27,000 shards | open s | µs for 1024 ids | when 4096 are dealt at once | µs for their rows | "
        "MiB |",
        "|---|---|---|---|---|---|",
    ]
    for row in figures["orders"]:
        lines.append(
            f"| {row['order']} | {row['open_s']:.3f} | {row['us_per_1024_ids']:.0f} | {row['us_dealt']:.0f} | "
            f"{row['us_per_1024_rows']:.0f} | {row['memory_mib']:.1f} |"
        )
    mixed = figures["mixing"]
    lines += [
        "",
        f"Distinct shards in a batch of 256 where the set is larger than the window of 2 GiB (460 shards of 200, at "
        f"random {mixed['ideal']:.0f}): windowed {mixed['windowed']:.0f}, global {mixed['global']:.0f}, none "
        f"{mixed['none']:.0f}.",
    ]
    return "\n".join(lines)


def _of_bare(row: dict[str, list[float]], key: str) -> float:
    """Return the median ratio of a loader's figures to those of the bare reads just before."""
    return statistics.median(value / bare for value, bare in zip(row[key], row[f"bare_{key}"], strict=True))


def _median(row: dict[str, list[float]]) -> dict[str, float]:
    return {key: statistics.median(values) for key, values in row.items()}


def say(text: str) -> None:
    """Print progress to stderr, so that stdout has only the tables."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
