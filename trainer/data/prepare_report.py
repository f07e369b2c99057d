"""The report of `prepare`, by which finished sets are recognized."""

from __future__ import annotations

import shutil
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from models.documents import Natural, damaged, read_json, write_json
from trainer.data.mixed_sources import AllSources
from trainer.data.set_content import Content
from trainer.data.shard_plan import SPLITS, sources_fingerprint
from trainer.data.sources_before import list_sources_as_before

WORK, REPORT = ".prepare", "report.json"


@dataclass(frozen=True)
class PrepareReport:
    """The outcome of `prepare`, which is also written to `OUT/report.json`."""

    settings: dict[str, Any]
    """Everything that the sets depend on."""
    files: Natural
    """The number of sound files found."""
    clips: dict[str, Natural]
    """The number of clips in each set."""
    seconds: float
    """Seconds of sound in the files that could be used."""
    problems: list[dict[str, str]]
    """{"file", "reason"} of each problem: a file, a part of it or its text was left out, or its length was guessed."""
    passed_over: dict[str, Any] = field(default_factory=dict)
    """Suffix or reason → {"count", "names"} of what lies in the folder and is no sound file; the first 1,000 names."""
    content: dict[str, str] = field(default_factory=dict)
    """Key of `settings` → a hash of all bytes of the files that it is about, whatever their times; empty in a report of
    an older version."""
    captions: dict[str, Any] = field(default_factory=dict)
    """The same for captions that name no sound, and for others that were not used as they stand."""
    sources: dict[str, list[Any]] = field(default_factory=dict)
    """Place of each tar, table or object → its size and version; the first 10,000. Empty for a folder of files."""


def finished(out: Path, settings: dict[str, Any], sources: AllSources, content: Content) -> PrepareReport | None:
    """Return the report of finished sets, or None; raises ValueError if the sets have other settings.

    Sets are finished too if their sounds or embeddings were copied, which changes times alone: the report then takes
    the new times. Sets of release 0.1.0 are, if that release would find the same files and captions now.
    """
    if not (out / REPORT).is_file():
        return None
    mend = "it was not written by `spresso prepare`, or has changed since: give another folder"
    report = read_json(out / REPORT, PrepareReport, mend=mend, finite=True)
    if report.clips.keys() != set(SPLITS):
        raise damaged(out / REPORT, f"`clips` has not the names {' and '.join(SPLITS)}", mend)
    if report.settings != settings:
        other = sorted(key for key in settings if report.settings.get(key) != settings[key])
        if all(report.content.get(key, "") == content.of(key) != "" for key in other):
            report = replace(report, settings=settings)
            with suppress(OSError):  # a folder of another user is compared again next time
                write_report(out, report)
        elif other != ["files"] or report.settings.get("files") != _fingerprint_as_before(sources.plain):
            changed = _changed(report, sources) if "files" in other else ""
            raise ValueError(
                f"{out} was prepared with other settings ({', '.join(other)}){changed}: remove it, or give another "
                f"folder"
            )
    if not all((out / split / "set.json").is_file() for split, clips in report.clips.items() if clips):
        return None
    shutil.rmtree(out / WORK, ignore_errors=True)
    return report


def _changed(report: PrepareReport, sources: AllSources) -> str:
    """Return which file of the sources is not the one that the sets were made of; empty if it isn't known."""
    before, now = report.sources, sources.files()
    changed = [place for place in (*now, *before) if before.get(place) != now.get(place)]
    words = {True: "is new", False: "has changed"}
    if not (before or now) or not changed:
        return ""
    return f", as {changed[0]} {words[changed[0] not in before] if changed[0] in now else 'is gone'}"


def _fingerprint_as_before(audio: Path | None) -> str | None:
    if audio is None:
        return None
    try:
        return sources_fingerprint(list_sources_as_before(audio))
    except ValueError:
        return None


def write_report(out: Path, report: PrepareReport) -> None:
    """Write `OUT/report.json`."""
    write_json(out / REPORT, report, indent=1, ascii=False, end="\n")
