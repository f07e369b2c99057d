"""`spresso weights`: lists the public weights that recipes can start from, and checks a folder of them.

Listing needs no torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from models.backbones.releases import RELEASES, Release
from trainer.file_names import printable
from trainer.formatting import aligned

if TYPE_CHECKING:
    from models.check_weights import Checked, Finding

_HEADER = ("model=", "weights", "holds", "size", "licence", "here")
_BYTES = 4 / 1000
"""Gigabytes of a million parameters in float32."""


def listing() -> str:
    """Return the table of all public weights, and below it how to get those that are not here."""
    places = {release: release.found() for release in RELEASES}
    rows = [_HEADER, *(_row(release, place) for release, place in places.items())]
    absent = [release for release, place in places.items() if place is None]
    commands = [line for group in _alike(absent) for line in _get(group)]
    own = (
        "model=stereo, and recipes without model=, need no weights. The size is that of float32; of Stable Audio 3 "
        "without its text encoder."
    )
    check = (
        "`spresso weights FOLDER` checks a folder, or a name in the hub's cache: files, shapes and published hashes."
    )
    return "\n".join([aligned(rows), "", own, check, *commands])


def _row(release: Release, place: Path | None) -> tuple[str, ...]:
    gigabytes = release.millions * _BYTES
    here = "-" if place is None else str(place)
    return release.model, release.name, release.what, f"{gigabytes:.1f} GB", release.licence.name, here


def _alike(releases: Iterable[Release]) -> list[list[Release]]:
    """Group releases that are got by the same commands but for their name."""
    groups: dict[tuple[str, ...], list[Release]] = {}
    for release in releases:
        own = Path(release.place).name
        groups.setdefault(tuple(text.replace(own, "") for text in (*release.commands, release.first)), []).append(
            release
        )
    return list(groups.values())


def _get(group: list[Release]) -> list[str]:
    """Return the lines that say how to get releases: what is to be done first, the licence, and the commands."""
    release, *others = group
    licence = release.licence
    note = f" ({licence.note})" if licence.note else ""
    lines = ["", f"{release.name}: {release.source}", f"  licence: {licence.name}, {licence.link}{note}"]
    lines += [f"  first: {release.first}"] if release.first else []
    lines += [f"    {command}" for command in release.commands]
    names = ", ".join(Path(other.place).name for other in others)
    return [*lines, f"  likewise, with their names: {names}"] if others else lines


def report(checked: Checked) -> str:
    """Return what a check has found, one line for each part."""
    licence = f"; licence: {checked.release.licence.name}" if checked.release else ""
    head = f"{printable(str(checked.folder))}: {checked.what}{licence}"
    return "\n".join([head, aligned([_cells(finding) for finding in checked.findings])])


def _cells(finding: Finding) -> tuple[str, str, str]:
    return f"  {finding.part}", "no" if finding.trouble else "ok", finding.trouble or finding.note
