"""Measure the memory of `prepare` and `encode` against the length of a sound.

    python benchmarks/long_sounds.py CODEC [--minutes 1 10 60] [--peer FOLDER]

Each length is one stereo WAV file at 44.1 kHz. CODEC is an export with a quantizer. FOLDER is another checkout of this
project, such as an older version, which is measured beside it. The table gives the peak resident memory of all of a
command's processes together, in MiB, and the seconds that it took.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import soundfile

ROOT = Path(__file__).parents[1]
RATE = 44_100


def main() -> None:
    """Print one row per command, version and length."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("codec", type=Path)
    parser.add_argument("--minutes", type=int, nargs="+", default=[1, 10, 60])
    parser.add_argument("--peer", type=Path)
    options = parser.parse_args()
    versions = {"this version": ROOT} | ({options.peer.name: options.peer} if options.peer else {})
    print("| command | version | " + " | ".join(f"{minutes} min" for minutes in options.minutes) + " |")
    print("|---|---|" + "---|" * len(options.minutes))
    with tempfile.TemporaryDirectory() as folder:
        sounds = {minutes: write_sound(Path(folder), minutes) for minutes in options.minutes}
        for command in ("prepare", "encode"):
            for name, root in versions.items():
                cells = []
                for minutes, sound in sounds.items():
                    out = Path(folder) / f"{command}-{name}-{minutes}"
                    arguments = {
                        "prepare": ["tiny", f"data.audio={sound.parent}", f"run_dir={out}", "data.workers=1"],
                        "encode": [str(sound), f"{out}.spr", "--codec", str(options.codec.resolve())],
                    }[command]
                    peak, seconds = measure(root, [command, *arguments])
                    cells.append(f"{peak:.0f} MiB, {seconds:.0f} s")
                    print(f"{command} {name} {minutes} min: {cells[-1]}", file=sys.stderr, flush=True)
                print(f"| {command} | {name} | " + " | ".join(cells) + " |", flush=True)


def write_sound(folder: Path, minutes: int) -> Path:
    """Write noise whose two channels are related, and a short sound that can be held out."""
    place = folder / f"sounds{minutes}"
    place.mkdir()
    generator = np.random.default_rng(0)
    with soundfile.SoundFile(place / "long.wav", "w", RATE, 2, "PCM_16") as file:
        for _ in range(minutes * 6):
            mono = generator.normal(0, 0.1, (RATE * 10, 1))
            file.write(np.clip(np.concatenate([mono, 0.5 * mono + generator.normal(0, 0.05, mono.shape)], 1), -1, 1))
    for name in ("short", "shorter"):
        soundfile.write(place / f"{name}.wav", generator.normal(0, 0.1, RATE * 2), RATE)
    return place / "long.wav"


def measure(root: Path, arguments: list[str]) -> tuple[float, float]:
    """Run a command of the project at `root`; return the peak of its memory in MiB, and seconds."""
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "2"}
    begun, peak = time.monotonic(), 0
    with tempfile.TemporaryFile() as said:
        process = psutil.Popen(
            [sys.executable, "-m", "launch.cli", *arguments], cwd=root, env=environment, stdout=said, stderr=said
        )
        while process.poll() is None:
            peak = max(peak, resident(process))
            time.sleep(0.05)
        if process.returncode:
            said.seek(0)
            raise SystemExit(f"{' '.join(arguments)} failed:\n{said.read().decode()[-2000:]}")
    return peak / 2**20, time.monotonic() - begun


def resident(process: psutil.Process) -> int:
    """Return the resident memory of a process and its children in bytes, without mapped files."""
    total = 0
    for each in [process, *process.children(recursive=True)]:
        try:
            memory = each.memory_info()
        except psutil.Error:
            continue
        total += memory.rss - memory.shared
    return total


if __name__ == "__main__":
    main()
