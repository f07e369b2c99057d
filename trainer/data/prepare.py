"""From a folder of sound files to sets of latents: `OUT/train` to learn from and `OUT/test`, which nothing learns from.

The work is planned before it begins: files in the order of their paths, cut into units that fill about a shard each.
What a unit's shards hold depends on its files alone, so the outcome is the same to the byte for any number of workers
and however often it was killed. `OUT/.prepare` remembers the units that are done until all of them are. Several parts
of one job, on as many machines, each make every n-th unit; the one that ends last makes the sets.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from models.atomic_write import replacing, write_whole
from trainer.data.clips import SHORTEST_SECONDS, AudioEncoder, ClipEncoder, EncodedFile, encode_in_order
from trainer.data.shard_plan import SPLITS, Unit, durations, plan_units, sources_fingerprint
from trainer.data.shards import SetInfo, ShardWriter, scan_shard, write_index
from trainer.data.sound_files import list_sources
from trainer.data.text_embeddings import Embedder
from trainer.files import locked

_WORK, _REPORT, _LOCK = ".prepare", "report.json", ".prepare.lock"
_MENDS = {"train": "lower data.holdout", "test": "raise data.holdout or lower data.clip_seconds"}


@dataclass
class Tally:
    """How far it is."""

    files: int
    """In all, of this part of the job."""
    done: int = 0
    """Files."""
    seconds: float = 0.0
    """Of sound in the files that are done and could be used."""
    problems: int = 0
    """Files, or clips of files, that were left out."""
    found: float = 0.0
    """Seconds of sound that had been done before."""


@dataclass(frozen=True)
class PrepareReport:
    """What came of a folder."""

    settings: dict[str, Any]
    """All that the outcome depends on."""
    files: int
    """Sound files that were found."""
    clips: dict[str, int]
    """Clips in each set."""
    seconds: float
    """Of sound in the files that could be used."""
    problems: list[dict[str, str]]
    """{"file", "reason"} of each file that was left out, or clips of it."""


def prepare(
    audio: Path,
    out: Path,
    make_ae: Callable[[], AudioEncoder],
    make_embedder: Callable[[], Embedder] | None = None,
    *,
    clip_seconds: float,
    holdout: float,
    seed: int,
    ae_options: Mapping[str, Any] | None = None,
    workers: int = 1,
    shard_mb: float = 64,
    part: int = 0,
    parts: int = 1,
    progress: Callable[[Tally], None] | None = None,
) -> PrepareReport | None:
    """Make the sets, or what is missing of them; where they are complete, return at once.

    Files are cut into clips of equal length. A shorter one is repeated to fill it; the rest of a longer one is a clip
    that ends with the file, if it is at least half a clip. Each clip is brought to a common level, and its gain kept.
    Silence and files that can't be read are left out and reported (`OUT/report.json`).

    Args:
        audio: the folder of sound files, or a manifest (`list_sources`).
        out: the folder for the sets.
        make_ae: makes the autoencoder, in this process and in each worker; it must be picklable.
        make_embedder: makes what makes captions into text that D reads, likewise; None: there is none in the sets.
        clip_seconds: a clip's length.
        holdout: fraction of the files (by a hash of their base names) for the test set, 0 up to but not 1. The test
            set holds the clips' audio as well.
        seed: of that choice.
        ae_options: how to get the autoencoder again, to be kept in the sets' `set.json`.
        workers: processes; with 1, this one.
        shard_mb: a shard's size, at most, in MiB (more only if a single clip is larger).
        part: which part of the job is done here, from 0 on.
        parts: into so many the job is cut; they may run at the same time.
        progress: is called after each file.

    Returns:
        What came of it; None where other parts of the job have not ended yet.

    Raises:
        ValueError: there is no usable sound, a set would be empty, `out` holds other sets, or a worker died.
    """
    if not 0 <= part < parts:
        raise ValueError(f"the parts of a job of {parts} are 0 to {parts - 1}, not {part}")
    ae, embedder = make_ae(), make_embedder and make_embedder()
    clip_samples = round(clip_seconds * ae.sample_rate)
    _check(clip_samples / ae.sample_rate, holdout=holdout, workers=workers)
    sources = list_sources(audio)
    settings: dict[str, Any] = {
        "ae": ae.identity(),
        "clip_seconds": clip_seconds,
        "holdout": holdout,
        "seed": seed,
        "shard_mb": shard_mb,
        "files": sources_fingerprint(sources),
    } | ({"text": embedder.identity()} if embedder else {})
    if report := _finished(out, settings):
        return report
    shard_bytes = int(shard_mb * 2**20)
    out.mkdir(parents=True, exist_ok=True)
    with locked(out / _LOCK):
        if report := _finished(out, settings):
            return report
        _begin(out, settings)
        seconds = durations(sources, out / _WORK / "durations.json")
    units = plan_units(seconds, ae, clip_samples, holdout=holdout, seed=seed, shard_bytes=shard_bytes)
    mine = units[part::parts]
    tally = Tally(sum(len(unit.sources) for unit in mine))
    missing = [unit for unit in mine if not _count_done(out, unit, tally)]
    tasks = ((source, unit.split == "test") for unit in missing for source in unit.sources)
    encode = ClipEncoder(ae, clip_samples, embedder)
    with closing(encode_in_order(tasks, encode, make_ae, make_embedder, workers=workers)) as files:
        for unit in missing:
            _write_unit(out, unit, islice(files, len(unit.sources)), tally, progress, shard_bytes=shard_bytes)
    with locked(out / _LOCK):
        if report := _finished(out, settings):
            return report
        if parts > 1 and not all(_is_done(out, unit) for unit in units):
            return None
        return _finish(out, units, _set_info(ae, embedder, dict(ae_options or {}), settings))


def _check(clip_seconds: float, *, holdout: float, workers: int) -> None:
    if not 0 <= holdout < 1:
        raise ValueError(f"holdout is a fraction from 0 up to but not 1, not {holdout}")
    if clip_seconds < SHORTEST_SECONDS or workers < 1:
        raise ValueError(f"clip_seconds is at least {SHORTEST_SECONDS} and workers 1, not {clip_seconds}, {workers}")


def _set_info(
    ae: AudioEncoder, embedder: Embedder | None, ae_options: dict[str, Any], settings: dict[str, Any]
) -> SetInfo:
    return SetInfo(
        ae_identity=settings["ae"],
        ae_options=ae_options,
        sample_rate=ae.sample_rate,
        hop=ae.hop,
        latent_channels=ae.latent_channels,
        clip_seconds=settings["clip_seconds"],
        prepared=settings,
        text=None
        if embedder is None
        else {"encoder": settings["text"], "tokens": embedder.tokens, "width": embedder.width},
    )


# ---- What is there already ------------------------------------------------------------------------------------------


def _finished(out: Path, settings: dict[str, Any]) -> PrepareReport | None:
    """The report of a complete outcome."""
    if not (out / _REPORT).is_file():
        return None
    try:
        report = PrepareReport(**json.loads((out / _REPORT).read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{out / _REPORT} is not one of `prepare`: give another folder") from error
    if report.settings != settings:
        other = ", ".join(sorted(key for key in settings if report.settings.get(key) != settings[key]))
        raise ValueError(f"{out} was prepared with other settings ({other}): remove it, or give another folder")
    if not all((out / split / "set.json").is_file() for split, clips in report.clips.items() if clips):
        return None
    shutil.rmtree(out / _WORK, ignore_errors=True)
    return report


def _begin(out: Path, settings: dict[str, Any]) -> None:
    """Make `OUT/.prepare` ready, with what an earlier attempt with the same settings left in it."""
    work = out / _WORK
    mark = work / "settings.json"
    if mark.is_file() and json.loads(mark.read_text(encoding="utf-8")) == settings:
        return
    if not work.exists() and any((out / split).exists() for split in SPLITS) and not (out / _REPORT).exists():
        raise ValueError(f"{out} holds a train or test folder that `prepare` did not make: give another folder")
    for folder in (*(out / split for split in SPLITS), work):
        shutil.rmtree(folder, ignore_errors=True)
    work.mkdir(parents=True)
    write_whole(mark, json.dumps(settings))


# ---- Units and sets -------------------------------------------------------------------------------------------------


def _write_unit(
    out: Path,
    unit: Unit,
    files: Iterator[EncodedFile],
    tally: Tally,
    progress: Callable[[Tally], None] | None,
    *,
    shard_bytes: int,
) -> None:
    """Write a unit's shards, then what is to be known of them, and last the record that it is done."""
    record: dict[str, Any] = {"seconds": 0.0, "problems": []}
    with ShardWriter(out / unit.split, prefix=f"{unit.number:05d}-", max_bytes=shard_bytes) as writer:
        for source, file in zip(unit.sources, files, strict=True):
            for clip in file.clips:
                writer.write(clip.key, clip.x0, clip.metadata, flac=clip.flac, text_NE=clip.text)
            record["seconds"] += file.seconds
            record["problems"] += [{"file": source.name, "reason": problem} for problem in file.problems]
            tally.done, tally.seconds = tally.done + 1, tally.seconds + file.seconds
            tally.problems += len(file.problems)
            if progress:
                progress(tally)
    for name in writer.names:
        with replacing(_rows_path(out, unit, name)) as partial, partial.open("wb") as rows:
            np.save(rows, scan_shard(out / unit.split / name), allow_pickle=False)
    write_whole(_record_path(out, unit), json.dumps(record | {"shards": writer.names}))


def _is_done(out: Path, unit: Unit) -> bool:
    return _record_path(out, unit).is_file() and all(
        (out / unit.split / name).is_file() for name in _record(out, unit)["shards"]
    )


def _count_done(out: Path, unit: Unit, tally: Tally) -> bool:
    """Whether a unit is done; if so, it counts."""
    if not _is_done(out, unit):
        return False
    record = _record(out, unit)
    tally.done += len(unit.sources)
    tally.seconds += record["seconds"]
    tally.found += record["seconds"]
    tally.problems += len(record["problems"])
    return True


def _finish(out: Path, units: list[Unit], info: SetInfo) -> PrepareReport:
    """Make sets of the shards, and write the report."""
    records = [_record(out, unit) for unit in units]
    problems = [problem for record in records for problem in record["problems"]]
    files = sum(len(unit.sources) for unit in units)
    shards: dict[str, dict[str, np.ndarray]] = {unit.split: {} for unit in units}
    for unit, record in zip(units, records, strict=True):
        shards[unit.split] |= {name: np.load(_rows_path(out, unit, name)) for name in record["shards"]}
    if not any(shards.values()):
        reasons = "; ".join(f"{problem['file']} {problem['reason']}" for problem in problems[:3])
        raise ValueError(f"none of the {files} sound files can be used: {reasons}")
    clips = {split: sum(len(rows) for rows in shards.get(split, {}).values()) for split in SPLITS}
    wanted = {"train": 1, "test": 2 if info.prepared["holdout"] else 0}  # one clip is decoded from another's z
    if short := [split for split, count in wanted.items() if clips[split] < count]:
        raise ValueError(
            f"the {files} sound files give {clips['train']} clips to learn from and {clips['test']} held out: at least "
            f"{wanted['train']} and {wanted['test']} are needed; add files, or " + _MENDS[short[0]]
        )
    for split in shards:
        write_index(out / split, info, shards[split])
    seconds = sum(record["seconds"] for record in records)
    report = PrepareReport(info.prepared, files, clips, seconds, problems)
    write_whole(out / _REPORT, json.dumps(asdict(report), indent=1, ensure_ascii=False) + "\n")
    for left in out.glob("*/.*.partial"):  # by a process that was killed
        left.unlink(missing_ok=True)
    shutil.rmtree(out / _WORK)
    return report


def _record_path(out: Path, unit: Unit) -> Path:
    return out / _WORK / f"{unit.split}-{unit.number:05d}.json"


def _rows_path(out: Path, unit: Unit, shard: str) -> Path:
    return out / _WORK / f"{unit.split}-{shard}.npy"


def _record(out: Path, unit: Unit) -> dict[str, Any]:
    return json.loads(_record_path(out, unit).read_text(encoding="utf-8"))
