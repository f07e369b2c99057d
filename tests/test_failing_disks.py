"""A disk that fails changes nothing: work is right after all, or stops in one line and is right when repeated.

Each case lets the calls from a random one on fail, once, a few times or for good, wherever that call is made.
"""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import pytest
import soundfile

from models import disk_errors
from tests.failing_disk import FailingDisk, failing
from tests.models import test_export as export_tests
from tests.mutant_counts import MutantCounts
from tests.trainer.data.test_prepare import FakeAE, contents, noise
from tests.trainer.data.test_shards import write_set
from trainer.data import clips, shard_set
from trainer.data.index import index_folder
from trainer.data.locate import Asked
from trainer.data.prepare import prepare
from trainer.data.shard_set import ShardSet, open_set
from trainer.data.stream import LatentStream
from trainer.data.text_embeddings import TextFiles

NUMBERS = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EACCES, errno.ENXIO)
FEW = len(disk_errors.PAUSES)
"""Failures after which a read has been tried once more than there were failures."""


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    monkeypatch.setattr(disk_errors, "PAUSES", (0.0,) * FEW)
    monkeypatch.setattr(clips, "_PAUSES", (0.0, 0.0))
    monkeypatch.setattr(shard_set, "_PAUSES", (0.0,) * 3)


@dataclass
class Work:
    """Work on files below a folder: how the folder is made, and what is done, which returns the outcome."""

    make: Callable[[Path], object]
    do: Callable[[Path], object]


# ---- work ------------------------------------------------------------------------------------------------------------


def make_sounds(folder: Path) -> None:
    audio = folder / "audio"
    (folder / "linked").mkdir()
    (audio / "a").mkdir(parents=True)
    for number, name in enumerate(("a/a1.wav", "a/a2.flac", "b.ogg", "c.wav", "d.wav", "tür.wav")):
        soundfile.write(audio / name, noise(name, 0.4 + 0.3 * number), 8000)
    soundfile.write(folder / "linked/e.wav", noise("e", 0.7), 8000)
    (audio / "link").symlink_to(folder / "linked")
    (audio / "b.txt").write_text("a bell")
    (audio / "c.json").write_text('{"caption": ["a cat", "a kitten"]}')
    (audio / "captions.jsonl").write_text(json.dumps({"file": "d.wav", "caption": "a dog"}) + "\n")
    for path in (*audio.rglob("*.wav"), *audio.rglob("*.flac"), *audio.rglob("*.ogg"), folder / "linked/e.wav"):
        embedding = folder / "text" / path.relative_to(audio if path.is_relative_to(audio) else folder)
        embedding.parent.mkdir(parents=True, exist_ok=True)
        np.save(embedding.with_suffix(".npy"), np.full((2, 3), len(path.name), np.float32))
    (folder / "text/linked").rename(folder / "text/link")


def make_manifest(folder: Path) -> None:
    make_sounds(folder)
    lines = [
        {"file": name, "caption": name, "take": 1} for name in ("a/a1.wav", "b.ogg", "c.wav", "tür.wav", "gone.wav")
    ]
    (folder / "audio/list.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def do_prepare(folder: Path, *, audio: str = "audio") -> object:
    options = {"clip_seconds": 0.5, "holdout": 0.4, "seed": 0, "shard_mb": 0.01}
    prepare(Asked(folder / audio), folder / "out", FakeAE, lambda: TextFiles(folder / "text", tokens=4), **options)
    return contents(folder / "out")


def do_index(folder: Path) -> object:
    info = ShardSet(folder / "set").info
    index_folder(folder / "set", info)
    return contents(folder / "set")


def do_stream(folder: Path) -> object:
    shards = open_set(str(folder / "set"))
    stream = LatentStream(shards, crop_frames=5, global_batch=8, seed=3, errors=folder / "errors.jsonl")
    batches = [stream.batch(8 * number) for number in range(3)]
    rest = [(shards.metadata(id_), shards.audio(id_).tobytes()) for id_ in (0, 7, 13)]
    return (
        [(batch.ids.tolist(), batch.x0.numpy().tobytes()) for batch in batches],
        rest,
        (folder / "errors.jsonl").exists(),
    )


def do_load(folder: Path) -> object:
    weights, settings = export_tests.outcome(folder / "export")
    return {name: value.numpy().tobytes() for name, value in weights.items()}, settings


WORK = {
    "export": Work(lambda folder: export_tests.write(folder / "export"), do_load),
    "prepare": Work(make_sounds, do_prepare),
    "prepare of a manifest": Work(make_manifest, lambda folder: do_prepare(folder, audio="audio/list.jsonl")),
    "index": Work(lambda folder: write_set(folder / "set", with_audio=True, max_bytes=60_000), do_index),
    "stream": Work(lambda folder: write_set(folder / "set", with_audio=True, max_bytes=60_000), do_stream),
}


# ---- what is expected ------------------------------------------------------------------------------------------------


def fail_at_random(name: str, folder: Path, seeds: range, counts: MutantCounts) -> None:
    work, whole = WORK[name], folder / "whole"
    whole.mkdir()
    work.make(whole)
    place = folder / "place"
    shutil.copytree(whole, place, symlinks=True)
    with failing(disk := FailingDisk(place, errno.EIO, first=0, times=0)):
        expected = work.do(place)
    for seed in seeds:
        chance = Random(f"{name} {seed}")
        shutil.rmtree(place)
        shutil.copytree(whole, place, symlinks=True)
        number, first = chance.choice(NUMBERS), chance.randrange(disk.calls)
        times = chance.choice((1, FEW, float("inf")))
        require_right(work, place, expected, FailingDisk(place, number, first=first, times=times), name, counts)


def require_right(
    work: Work, place: Path, expected: object, disk: FailingDisk, name: str, counts: MutantCounts
) -> None:
    case = f"{name}: {errno.errorcode[disk.number]} from call {disk.first}, {disk.times} times"
    counts.begin(f"failing disks: {name}")
    said = ""
    try:
        with failing(disk):
            found = work.do(place)
    except (OSError, ValueError) as error:
        said = str(error)
        assert "\n" not in said, case
    assert disk.failed, case
    if not said:
        assert found == expected, f"{case}: other than without the failure, after {disk.failed}"
    assert work.do(place) == expected, f"{case}: not made up for, after {disk.failed}, which said: {said}"
    counts.end(f"failing disks: {name}", refused=bool(said))


@pytest.mark.parametrize("name", WORK)
def test_a_failing_disk_changes_nothing(tmp_path, name, mutant_counts):
    fail_at_random(name, tmp_path, range(8), mutant_counts)


@pytest.mark.slow
@pytest.mark.parametrize("name", WORK)
def test_a_disk_that_fails_anywhere_changes_nothing(tmp_path, name, mutant_counts):
    fail_at_random(name, tmp_path, range(8, 400), mutant_counts)
