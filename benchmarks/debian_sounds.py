"""Collect the recorded sound effects of Debian's packages in a folder: python benchmarks/debian_sounds.py FOLDER.

The program downloads packages with `apt-get download` (2 GB), unpacks them without installing anything, and keeps the
sound files that are effects: at least 44.1 kHz, 0.2 to 12 s long, in no folder of music. It skips duplicates. As most
effects last a second, it normalises the loudness of a package's effects and joins them, in the order of their paths, to
files of at least 5 s (48 kHz, mono). Similar effects have similar paths, so most of them land in the same file, and a
file is either trained on or held out as a whole. The effects have the licences of their packages, all free by Debian's
guidelines; `packages.txt` in the folder lists the packages.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from pathlib import Path

import soundfile
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from models.loudness import level  # noqa: E402
from trainer.data.audio import read_audio, write_audio  # noqa: E402
from trainer.data.find_sounds import find_audio  # noqa: E402
from trainer.progress import Progress  # noqa: E402

PACKAGES = (
    *("bzflag-data", "colobot-common-sounds", "endless-sky-data", "flare-game", "freedroid-data", "hedgewars-data"),
    *("hydrogen-data", "hydrogen-drumkits", "lmms-common", "megaglest-data", "minetest-data", "nexuiz-data"),
    *("openarena-data", "pingus-data", "scratch", "sonic-pi-samples", "sound-theme-freedesktop", "ufoai-sound"),
    *("warzone2100-data", "wesnoth-1.16-data"),
)
ARCHIVES = (".pk3", ".wz", ".zip")
LOWEST_RATE, SHORTEST, LONGEST = 44_100, 0.2, 12.0
RATE, JOINED = 48_000, 5.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the sounds go")
    parser.add_argument(
        "--unpacked", type=Path, help="a folder with the packages already unpacked, each in a folder of its name"
    )
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    kept: Counter[str] = Counter()
    seen: set[str] = set()
    with Progress("sounds", total=len(PACKAGES), unit="packages") as progress:
        for done, package in enumerate(PACKAGES, 1):
            with tempfile.TemporaryDirectory() as scratch:
                root = options.unpacked / package if options.unpacked else fetch(package, Path(scratch))
                kept[package] = keep(root, options.folder, package, seen)
            progress.to(done, effects=sum(kept.values()))
    listing = "".join(f"{package}\t{count} effects\n" for package, count in kept.items())
    (options.folder / "packages.txt").write_text(listing)


def fetch(package: str, scratch: Path) -> Path:
    """Download and unpack a package, with the archives in it, and return the folder of its files."""
    subprocess.run(["apt-get", "download", "-qq", package], cwd=scratch, check=True)
    (file,) = scratch.glob("*.deb")
    root = scratch / "files"
    subprocess.run(["dpkg", "-x", str(file), str(root)], check=True)
    for path in [path for path in root.rglob("*") if path.suffix in ARCHIVES and zipfile.is_zipfile(path)]:
        with zipfile.ZipFile(path) as archive:
            archive.extractall(path.with_name(f"{path.name}.d"))
    return root


def keep(root: Path, folder: Path, package: str, seen: set[str]) -> int:
    """Join the effects below `root` into files of `folder`, skip those in `seen`, and return how many were kept."""
    count, parts, files = 0, [], 0
    for path in find_audio(root):
        if "music" in str(path.relative_to(root)).lower() or not is_effect(path):
            continue
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if digest in seen:
            continue
        seen.add(digest)
        try:
            parts.append(level(torch.from_numpy(read_audio(path, sample_rate=RATE)))[0])
        except ValueError as error:
            print(error, file=sys.stderr)
            continue
        count += 1
        if sum(part.shape[1] for part in parts) >= JOINED * RATE:
            write_audio(folder / f"{package}.{files:04d}.flac", torch.cat(parts, dim=1).numpy(), RATE)
            parts, files = [], files + 1
    return count


def is_effect(path: Path) -> bool:
    """Whether a file's sample rate and duration are those of an effect."""
    try:
        info = soundfile.info(path)
    except (soundfile.LibsndfileError, ZeroDivisionError):
        return False
    return info.samplerate >= LOWEST_RATE and SHORTEST <= info.duration <= LONGEST


if __name__ == "__main__":
    main()
