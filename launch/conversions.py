"""Converts all files of a folder: names what collides, goes on after a failure, and leaves a report in the folder."""

from __future__ import annotations

import errno
import sys
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch import owner
from launch.own_files import file_ids, refusal
from models.atomic_write import remove_leftovers
from models.documents import read_json, write_json
from models.readable import describe_os_error, require_file
from trainer.data.find_sounds import Counts
from trainer.file_names import as_unicode, printable
from trainer.progress import Progress

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""Disk I/O errors, which would meet every further file, too."""


@dataclass(frozen=True)
class Conversion:
    """One file to convert."""

    source: Path
    target: Path
    outputs: tuple[Path, ...]
    """Files that are written: the target, or several that are named after it."""


@dataclass
class ConversionReport:
    """What became of the files of a folder, as in `OUT/encode.report.json` and `OUT/decode.report.json`."""

    written_by: str
    """The command."""
    source: str
    finished: bool = False
    """False while the command runs, and for good if it was ended early."""
    files: int = 0
    done: int = 0
    already_there: int = 0
    failed: int = 0
    problems: list[dict[str, str]] = field(default_factory=list)
    """{"file", "reason"} of each file that failed."""
    passed_over: dict[str, Any] = field(default_factory=dict)
    """Suffix or reason → {"count", "names"} of what else lies in the folder; the first 1,000 names."""

    def fail(self, source: Path, reason: str) -> None:
        """Count a failed file and name it on stderr."""
        self.failed += 1
        self.problems.append({"file": as_unicode(str(source)), "reason": as_unicode(reason)})
        print(f"spresso: {printable(named(source, reason))}", file=sys.stderr)

    def write(self, path: Path) -> None:
        """Write the report."""
        write_json(path, self, indent=1, end="\n")


@dataclass(frozen=True)
class Converter:
    """What `convert_folder` does to each file."""

    command: str
    """`encode` or `decode`."""
    convert: Callable[[Path, Path, Callable[[float], None]], None]
    """Converts (source, target) and reports the part that is done."""
    is_done: Callable[[Path, Path], bool] | None
    """Whether the target holds what `convert` would write; None: convert all."""
    is_ours: Callable[[Path], bool]
    """Whether an existing file was written by the command and may be replaced."""


def convert_folder(
    folder: Path, out: Path, jobs: Sequence[Conversion], converter: Converter, passed_over: Counts
) -> ConversionReport:
    """Convert all files of a folder. A failure is named and counted, and does not stop the others.

    Files that must not be written are named before anything is written.

    Raises:
        ValueError: the file in the report's place is not a report, or another process converts into `out`.
        OSError: the disk is full or can't be written.
    """
    _require_report(out / f"{converter.command}.report.json", f"spresso {converter.command}")
    with owner.holding(out):
        return _convert_folder(folder, out, jobs, converter, passed_over)


def _convert_folder(
    folder: Path, out: Path, jobs: Sequence[Conversion], converter: Converter, passed_over: Counts
) -> ConversionReport:
    report = ConversionReport(f"spresso {converter.command}", as_unicode(str(folder)), files=len(jobs))
    report.passed_over = passed_over.report()
    place = out / f"{converter.command}.report.json"
    inputs = file_ids(job.source for job in jobs)
    refused = {**_refused(jobs, inputs, converter), **_colliding(jobs, out)}
    for source, reason in refused.items():
        report.fail(source, reason)
    report.write(place)
    try:
        _convert_all([job for job in jobs if job.source not in refused], inputs, converter, report)
        for folder_of_some in {job.target.parent for job in jobs if job.target.parent.is_dir()}:
            remove_leftovers(folder_of_some)
        report.finished = True
    finally:
        report.write(place)
    if odd := [job.source.name for job in jobs if as_unicode(job.source.name) != job.source.name]:
        what = "1 name is not UTF-8" if len(odd) == 1 else f"{len(odd)} names are not UTF-8"
        print(f"spresso: {what}, which some programs can't open: {printable(odd[0])}", file=sys.stderr)
    counts = f"{report.done} done, {report.already_there} already there, {report.failed} failed"
    besides = f"; passed over {passed_over}" if passed_over.kinds else ""
    more = f"; {place} names the failed files" if report.failed else ""
    print(printable(f"{converter.command}: {counts}{besides}{more}"), file=sys.stderr)
    return report


def _convert_all(
    jobs: Sequence[Conversion], inputs: set[tuple[int, int]], converter: Converter, report: ConversionReport
) -> None:
    with Progress(converter.command, total=len(jobs), unit="files") as progress:
        for number, job in enumerate(jobs):

            def show(part: float, number: int = number) -> None:
                progress.to(number + part, failed=report.failed)

            try:
                require_file(job.source)
                if converter.is_done is not None and converter.is_done(job.source, job.target):
                    report.already_there += 1
                else:
                    _require_free(job, inputs, converter)  # hours may have passed since all files were looked at
                    converter.convert(job.source, job.target, show)
                    report.done += 1
            except (ValueError, OSError, MemoryError, RuntimeError) as error:
                if isinstance(error, OSError) and error.errno in _NO_ROOM:
                    raise
                report.fail(job.source, describe(error))
            progress.to(number + 1, failed=report.failed)


def _require_free(job: Conversion, inputs: set[tuple[int, int]], converter: Converter) -> None:
    for path in job.outputs:
        if reason := refusal(path, inputs, converter.is_ours, f"spresso {converter.command}"):
            raise ValueError(reason)


def _refused(jobs: Sequence[Conversion], inputs: set[tuple[int, int]], converter: Converter) -> dict[Path, str]:
    """Return source → reason of all files with an output that must not be written."""
    refused: dict[Path, str] = {}
    for job in jobs:
        try:
            _require_free(job, inputs, converter)
        except (ValueError, OSError) as error:
            refused[job.source] = describe(error)
    return refused


def _colliding(jobs: Sequence[Conversion], out: Path) -> dict[Path, str]:
    """Return source → reason of all files whose outputs would be one file.

    Names that differ only in case, or in how an accent is written, are one file on some disks. Where `out` lies on
    another disk, they are only named, since both files are whole there.
    """
    writers: dict[str, list[tuple[Path, Path]]] = {}
    for job in jobs:
        for path in job.outputs:
            writers.setdefault(_folded(path), []).append((job.source, path))
    refused: dict[Path, str] = {}
    alike_is_same = None
    for writes in writers.values():
        if len(writes) == 1:
            continue
        if alike_is_same is None:
            alike_is_same = _ignores_case(out)
        for source, path in writes:
            others = [other for other, there in writes if other != source and (alike_is_same or there == path)]
            if others:
                refused[source] = f"{source} and {others[0]} would both be written to {path}: rename one"
        if not any(source in refused for source, _ in writes):
            first, second = writes[0][1], writes[1][1]
            said = printable(f"{first} and {second} are one file on a disk that ignores case")
            print(f"spresso: {said}", file=sys.stderr)
    return refused


def _folded(path: Path) -> str:
    return unicodedata.normalize("NFC", str(path)).casefold()


def _ignores_case(folder: Path) -> bool:
    """Whether the disk of a folder, which need not exist yet, takes names that differ in case for one file."""
    for there in (folder.absolute(), *folder.absolute().parents):
        other = there.with_name(there.name.swapcase()) if there.name else there
        if there.exists() and other != there:
            return other.exists() and other.samefile(there)
    return False


def _require_report(place: Path, command: str) -> None:
    """Raise ValueError if something other than a report of the command is in the report's place."""
    try:
        writer = read_json(place, dict[str, Any], mend="").get("written_by")
    except FileNotFoundError:
        return
    except ValueError:
        writer = None
    if writer != command:
        raise ValueError(f"{place} was not written by `{command}`, which keeps its report there: rename that file")


def describe(error: Exception) -> str:
    """Return what an error says, for people: a sentence for a file that can't be opened, else the message."""
    if isinstance(error, OSError):
        return describe_os_error(error)
    if isinstance(error, ValueError):
        return str(error)
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def named(path: Path, reason: str) -> str:
    """Begin a reason with the file's path, unless the reason names it."""
    return reason if str(path) in reason else f"{path}: {reason}"
