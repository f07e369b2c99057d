"""Turns a folder of sound files into two sets of latents: `OUT/train`, and `OUT/test`, which is held out.

The work is planned before it begins: the files, in the order of their paths, are divided into units that fill about one
shard each. The content of a unit's shards depends on the unit's files alone, so the output is identical to the byte for
any number of workers and restarts. `OUT/.prepare` records the finished units until all are finished. A job can be
split into n parts, each on its own machine: every part makes every n-th unit, and the last part to finish makes the
sets.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

import msgspec
import numpy as np
from numpy.typing import NDArray

from models.atomic_write import replacing
from models.disk_errors import patiently
from models.documents import read_json, write_json
from trainer.data.clips import SHORTEST_SECONDS, AudioEncoder, ClipEncoder, EncodedFile, encode_in_order
from trainer.data.groups import groups
from trainer.data.locate import Asked
from trainer.data.mixed_sources import AllSources, open_sources
from trainer.data.prepare_report import REPORT, WORK, PrepareReport, finished, write_report
from trainer.data.set_content import Content
from trainer.data.shard_plan import SPLITS, Unit, durations, plan_units
from trainer.data.shards import SetInfo, ShardWriter, read_rows, scan_shard, write_index
from trainer.data.tables import Cells
from trainer.data.text_embeddings import Embedder
from trainer.file_names import printable
from trainer.files import locked

_LOCK = ".prepare.lock"
_OWN_NAME = re.compile(r"\d{5,}-\d{5,}\.tar|index\.npy|set\.json|\..*")
"""Names in the folder of a set; hidden files are of killed processes, or of a desktop."""
_REMEDIES = {"train": "lower data.holdout", "test": "raise data.holdout or lower data.clip_seconds"}


class _Record(TypedDict):
    """The record that marks a unit as done."""

    seconds: Annotated[float, msgspec.Meta(ge=0)]
    problems: list[dict[str, str]]
    shards: list[str]
    digests: NotRequired[dict[str, str]]
    """Name of each file → the hash of its bytes; missing in records of 0.1.0."""


@dataclass
class Tally:
    """The progress of one part of the job."""

    files: int
    """The number of files in this part."""
    done: int = 0
    """The number of finished files."""
    seconds: float = 0.0
    """Seconds of sound in the finished files that could be used."""
    problems: int = 0
    """The number of entries in `PrepareReport.problems`."""
    found: float = 0.0
    """Seconds of sound in the files that an earlier attempt had finished."""


def prepare(
    audio: Path | str,
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
    own: Iterable[Path] = (),
    audio_column: str | None = None,
    caption_column: str | None = None,
    patience: float = 600.0,
    progress: Callable[[Tally], None] | None = None,
    sole: Callable[[], AbstractContextManager[Callable[[], None] | None]] = nullcontext,
) -> PrepareReport | None:
    """Make the sets, or finish an earlier attempt; return at once if the sets are complete.

    Files are cut into clips of equal length. A file shorter than a clip is repeated to fill the clip. If the remainder
    of a longer file is at least half a clip, one more clip ends where the file ends. Each clip is normalized to a
    common level, and its gain is stored. Silence and unreadable files are left out and reported in `OUT/report.json`.

    Args:
        audio: the folder of sound files, or a manifest, or a text that names others (`trainer.data.locate`).
        out: the folder for the sets.
        make_ae: makes the autoencoder, in this process and in each worker; must be picklable.
        make_embedder: makes the embedder of captions, likewise; None makes sets without text.
        clip_seconds: a clip's length.
        holdout: the fraction of the files in the test set, in [0, 1), chosen by a hash of the names of their groups
            (`groups`). The test set also holds the clips' audio.
        seed: the seed of that choice.
        ae_options: the options that load the autoencoder, to be stored in the sets' `set.json`.
        workers: worker processes; 1 means this process.
        shard_mb: the maximum size of a shard in MiB; only a single clip that is larger may exceed it.
        part: the part of the job to do, 0 … parts - 1.
        parts: the number of parts of the job, which may run at the same time.
        own: directories of the run, in which no sounds are looked for, besides `out`.
        audio_column: the column of sounds in tables; None: the only one.
        caption_column: the column of captions in tables; None: `CAPTION_COLUMNS`.
        patience: seconds to repeat a failing request to a server for.
        progress: called after each file.
        sole: gives this part of the work in `out` to this process alone for as long as it writes; the function that it
            yields raises ValueError if another process is at another part.

    Returns:
        The report, or None if other parts of the job are unfinished.

    Raises:
        ValueError: there is no usable sound, a set would be empty, `out` holds other sets, or a worker died.
        SourceError: a source has changed meanwhile, or its server fails.
    """
    if not 0 <= part < parts:
        raise ValueError(f"a job of {parts} parts has the parts 0 to {parts - 1}, not {part}")
    ae, embedder = make_ae(), make_embedder and make_embedder()
    clip_samples = round(clip_seconds * ae.sample_rate)
    _check(clip_samples / ae.sample_rate, holdout=holdout, workers=workers)
    sources = open_sources(Asked(audio, audio_column, caption_column, patience, (*own, out)))
    settings: dict[str, Any] = {
        "ae": ae.identity(),
        "clip_seconds": clip_seconds,
        "holdout": holdout,
        "seed": seed,
        "shard_mb": shard_mb,
        "files": sources.fingerprint,
    } | ({"text": embedder.identity()} if embedder else {})
    content = Content(sources, embedder)
    if report := finished(out, settings, sources, content):
        return report
    shard_bytes = int(shard_mb * 2**20)
    out.mkdir(parents=True, exist_ok=True)
    with sole() as require_alone:
        with locked(out / _LOCK):
            if report := finished(out, settings, sources, content):
                return report
            _begin(out, settings | _division(sources), require_alone)
            found = sources.listed(out / WORK)
            seconds = durations(found.files, out / WORK / "durations.json", patience)
        units = plan_units(seconds, ae, clip_samples, holdout=holdout, seed=seed, shard_bytes=shard_bytes)
        mine = units[part::parts]
        tally = Tally(sum(len(unit.sources) for unit in mine))
        missing = [unit for unit in mine if not _count_if_done(out, unit, tally)]
        # Encode the missing units of this part.
        cells = Cells(patience)
        tasks = ((cells.loaded(source), unit.split == "test") for unit in missing for source in unit.sources)
        encode = ClipEncoder(ae, clip_samples, embedder, spool=out / WORK, patience=patience)
        encoded = encode_in_order(tasks, encode, make_ae, make_embedder, workers=workers)
        with closing(encoded) as files, closing(cells):
            for unit in missing:
                _write_unit(out, unit, islice(files, len(unit.sources)), tally, progress, shard_bytes=shard_bytes)
        # If all parts are done, make the sets.
        with locked(out / _LOCK):
            if report := finished(out, settings, sources, content):
                return report
            if parts > 1 and not all(_is_done(out, unit) for unit in units):
                return None
            info = _set_info(ae, embedder, dict(ae_options or {}), settings)
            return _finish(out, units, sources, info, content)


def _check(clip_seconds: float, *, holdout: float, workers: int) -> None:
    if not 0 <= holdout < 1:
        raise ValueError(f"data.holdout must be at least 0 and below 1, not {holdout}")
    if clip_seconds < SHORTEST_SECONDS or workers < 1:
        raise ValueError(
            f"data.clip_seconds must be at least {SHORTEST_SECONDS} and data.workers at least 1, not {clip_seconds} "
            f"and {workers}"
        )


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


# ---- Earlier attempts ------------------------------------------------------------------------------------------------


def _division(sources: AllSources) -> dict[str, str]:
    """Return the entry of `settings.json` that tells apart how an attempt divides these files into the two sets.

    Releases that divided otherwise knew folders and manifests alone.
    """
    if sources.plain is None:
        return {}
    places = [source.place for source in sources.listed().files]
    return {} if groups(places) == [name for _, name in places] else {"groups": "folders"}


def _begin(out: Path, settings: dict[str, Any], require_alone: Callable[[], None] | None) -> None:
    """Create `OUT/.prepare`, or keep that of an earlier attempt with the same settings.

    An attempt with other settings is removed, unless `require_alone` raises ValueError because a process is at it.
    """
    work = out / WORK
    record = work / "settings.json"
    mend = f"remove {work} to begin again"
    if record.exists() and read_json(record, dict[str, Any], mend=mend) == settings:
        return
    if require_alone is not None and work.exists():
        require_alone()
    if not work.exists() and any((out / split).exists() for split in SPLITS) and not (out / REPORT).exists():
        raise ValueError(f"{out} holds a train or test folder that `spresso prepare` did not make: give another folder")
    for folder in (out / split for split in SPLITS):
        _require_shards_alone(folder)
    for folder in (*(out / split for split in SPLITS), work):
        shutil.rmtree(folder, ignore_errors=True)
    work.mkdir(parents=True)
    write_json(record, settings)


def _require_shards_alone(folder: Path) -> None:
    """Raise ValueError if the folder of an earlier attempt holds something that `prepare` did not write."""
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if foreign := [name for name in names if not _OWN_NAME.fullmatch(name)]:
        raise ValueError(
            f"{folder / foreign[0]} was not written by `spresso prepare`, which would make the folder anew: move it "
            "away, or give another folder"
        )


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
    """Write a unit's shards, then their index rows, and last the record that marks the unit as done."""
    record: dict[str, Any] = {"seconds": 0.0, "problems": [], "digests": {}}
    with ShardWriter(out / unit.split, prefix=f"{unit.number:05d}-", max_bytes=shard_bytes) as writer:
        for source, file in zip(unit.sources, files, strict=True):
            for clip in file.clips:
                writer.write(clip.key, clip.x0, clip.metadata, flac=clip.flac, text_NE=clip.text)
            record["seconds"] += file.seconds
            record["digests"][source.name] = file.digest
            record["problems"] += [{"file": source.where, "reason": problem} for problem in file.problems]
            tally.done, tally.seconds = tally.done + 1, tally.seconds + file.seconds
            tally.problems += len(file.problems)
            if progress:
                progress(tally)
    for name in writer.names:
        found = patiently(partial(scan_shard, out / unit.split / name))
        with replacing(_rows_path(out, unit, name)) as path, path.open("wb") as rows:
            np.save(rows, found, allow_pickle=False)
    write_json(_record_path(out, unit), record | {"shards": writer.names})


def _is_done(out: Path, unit: Unit) -> bool:
    return _record_path(out, unit).exists() and all(
        (out / unit.split / name).is_file() for name in _record(out, unit)["shards"]
    )


def _count_if_done(out: Path, unit: Unit, tally: Tally) -> bool:
    """Whether a unit is done; adds a finished unit to the tally."""
    if not _is_done(out, unit):
        return False
    record = _record(out, unit)
    tally.done += len(unit.sources)
    tally.seconds += record["seconds"]
    tally.found += record["seconds"]
    tally.problems += len(record["problems"])
    return True


def _finish(out: Path, units: list[Unit], sources: AllSources, info: SetInfo, content: Content) -> PrepareReport:
    """Make the sets from the shards of all units, and write the report."""
    records = [_record(out, unit) for unit in units]
    problems = [problem for record in records for problem in record["problems"]]
    files = sum(len(unit.sources) for unit in units)
    shards: dict[str, dict[str, np.ndarray]] = {unit.split: {} for unit in units}
    for unit, record in zip(units, records, strict=True):
        shards[unit.split] |= {name: _rows(out, unit, name) for name in record["shards"]}
    if not any(shards.values()):
        reasons = "; ".join(printable(f"{problem['file']} {problem['reason']}") for problem in problems[:3])
        raise ValueError(f"none of the {files} sound files can be used: {reasons}")
    clips = {split: sum(len(rows) for rows in shards.get(split, {}).values()) for split in SPLITS}
    wanted = {
        "train": 1,
        "test": 2 if info.prepared["holdout"] else 0,
    }  # evaluation decodes one clip from another clip's z
    if short := [split for split, count in wanted.items() if clips[split] < count]:
        raise ValueError(
            f"the {files} sound files give {clips['train']} training clips and {clips['test']} held-out clips, but at "
            f"least {wanted['train']} and {wanted['test']} are needed: add files, or " + _REMEDIES[short[0]]
        )
    for split in shards:
        write_index(out / split, info, shards[split])
    seconds = sum(record["seconds"] for record in records)
    found = sources.listed()
    besides = {"passed_over": found.passed_over.report(), "captions": found.captions.report()}
    if sources.plain is None:
        besides["sources"] = sources.files()
    digests = {name: digest for record in records for name, digest in record.get("digests", {}).items()}
    report = PrepareReport(info.prepared, files, clips, seconds, problems, content=content.recorded(digests), **besides)
    write_report(out, report)
    for leftover in out.glob("*/.*.partial"):  # from processes that were killed
        leftover.unlink(missing_ok=True)
    shutil.rmtree(out / WORK)
    return report


def _record_path(out: Path, unit: Unit) -> Path:
    return out / WORK / f"{unit.split}-{unit.number:05d}.json"


def _rows_path(out: Path, unit: Unit, shard: str) -> Path:
    return out / WORK / f"{unit.split}-{shard}.npy"


def _rows(out: Path, unit: Unit, shard: str) -> NDArray[np.void]:
    mend = f"remove {_record_path(out, unit)}, and the shard is made again"
    return patiently(lambda: read_rows(_rows_path(out, unit, shard), out / unit.split / shard, mend=mend))


def _record(out: Path, unit: Unit) -> _Record:
    return read_json(_record_path(out, unit), _Record, mend="remove it, and its files are encoded again", finite=True)
