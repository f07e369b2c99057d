"""Divides sound files into the two sets: which files belong together, and which groups of files are held out.

Files of one name, apart from folder and suffix, are one group: `dry/bell.wav` and `wet/bell.flac` are two forms of one
sound. But where many folders hold the same few names, such as `song_01/vocals.wav`, `song_02/vocals.wav` …, a name says
which part of a song a file is, and the folder says which song. There the files of a folder are one group, so that no
part of a song is held out while the model learns from another part.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

_FEWEST = 3  # folders that hold a name which stands for a part
_NAMES_PER_FOLDER = {True: 2.0, False: 0.5}
"""How many names a folder of parts may hold for each folder that shares one of them. Numbers, which are names without
letters, mostly count sounds that have nothing to do with each other."""


def groups(places: Sequence[tuple[str, str]]) -> list[str]:
    """Return the group of each file.

    Args:
        places: each file's folder, "" or a relative path with slashes, and its name without suffix.
    """
    named = _group_names(set(places))
    return [named[place] for place in places]


def _group_names(places: set[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """Return the group of each place: its name, or that of its folder, for which the same holds among the folders."""
    upper = {folder: _split(folder) for folder in _folders_of_parts(places)}
    names = _group_names(set(upper.values())) if upper else {}
    return {place: names[upper[place[0]]] if place[0] in upper else place[1] for place in places}


def _folders_of_parts(places: set[tuple[str, str]]) -> set[str]:
    """Return the folders whose names stand for the parts of one thing.

    At least half of a folder's names are in two more folders, or one of its names is in most folders; and the names are
    few for so many folders.
    """
    held: defaultdict[str, set[str]] = defaultdict(set)
    holders: defaultdict[str, set[str]] = defaultdict(set)
    for folder, name in places:
        if folder:
            held[folder].add(name)
            holders[name].add(folder)
    shared = {name: len(folders) for name, folders in holders.items() if len(folders) >= _FEWEST}
    found = set()
    for folder, names in held.items():
        parts = {name: shared[name] for name in names if name in shared}
        typical = 2 * len(parts) >= len(names) or any(2 * count > len(held) for count in parts.values())
        most = max((count * _NAMES_PER_FOLDER[_has_letters(name)] for name, count in parts.items()), default=0)
        if parts and typical and len(names) <= most:
            found.add(folder)
    return found


def _has_letters(name: str) -> bool:
    return any(character.isalpha() for character in name)


def _split(folder: str) -> tuple[str, str]:
    above, _, name = folder.rpartition("/")
    return above, name


def held_out(names: Iterable[str], *, fraction: float, seed: int) -> set[str]:
    """Return the groups of the test set.

    Each group is chosen by the hash of its own name, so that adding files does not move the others between the sets. Of
    two or more groups, at least one is held out and at least one is not, unless the fraction is 0.
    """

    def hashed(name: str) -> tuple[float, str]:
        digest = blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") / 2**64, name

    ranking = sorted(hashed(name) for name in set(names))
    count = sum(number < fraction for number, _ in ranking)
    if fraction > 0 and len(ranking) > 1:
        count = min(max(count, 1), len(ranking) - 1)
    return {name for _, name in ranking[:count]}
