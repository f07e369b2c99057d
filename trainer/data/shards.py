"""The shard format: plain tar files of samples, with an index next to them.

A sample consists of `KEY.x0.npy` (its latents, float16, (C, T)) and `KEY.json` (its metadata). If the set holds text,
`KEY.text.npy` is the sample's caption as D reads it (float16, (tokens, width)). In a held-out set, `KEY.flac` is the
sample's audio. Tars are USTAR with fixed times and owners, so equal samples give equal bytes; `tar` and WebDataset can
read them.

A set is a folder of shards and two more files. `index.npy` is a structured array with one row per sample, which gives
the sample's shard and the offsets of its members; the array is memory-mapped. `set.json` describes the whole set. Both
files can be made from the tars alone (`scan_shard`, `write_index`).
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
from isal.isal_zlib import crc32  # the same sum as zlib's, several times as fast
from numpy.typing import NDArray

from models.atomic_write import replacing
from models.documents import damaged, write_json
from trainer.data.index_row import (
    INDEX_ROWS,
    LONGEST_MEMBER,
    LONGEST_METADATA,
    OLDER_INDEX_ROWS,
    metadata_checksum,
    parse_metadata,
    text_fits,
    well_formed,
)
from trainer.data.npy_header import LONGEST_NPY_HEADER, float16_shape
from trainer.data.tar_members import find_tar_members, shown

_X0, _JSON, _FLAC, _TEXT = "x0.npy", "json", "flac", "text.npy"
_KINDS = (_X0, _JSON, _FLAC, _TEXT)
_PIECE = 16 << 20  # bytes that are read at a time
_BLOCK = tarfile.BLOCKSIZE
SET_VERSION = 3
READABLE_VERSIONS = (2, SET_VERSION)
MAKE_AGAIN = "restore it and run `spresso index` on the folder, or remove the set and run `spresso prepare` again"


class DamagedSample(ValueError):
    """A shard's content differs from what the index says."""


@dataclass(frozen=True)
class SetInfo:
    """The facts that all samples of a set share."""

    ae_identity: str
    """`AudioAE.identity()` of the autoencoder that made the latents."""
    ae_options: dict[str, Any]
    """The options that load the autoencoder: its kind and so on."""
    sample_rate: int
    """Hz."""
    hop: int
    """Audio samples per frame of latents."""
    latent_channels: int
    clip_seconds: float
    prepared: dict[str, Any] = field(default_factory=dict)
    """The sources and settings that the set was made with, by which `prepare` recognizes a finished set."""
    text: dict[str, Any] | None = None
    """In sets with text: `encoder`, the text encoder's identity; `tokens`, the maximum per caption; `width`. Otherwise
    None."""


class ShardWriter:
    """Writes samples one after another into the tars `PREFIX00000.tar`, `PREFIX00001.tar`, … of a folder.

    A new tar begins before the current one would exceed `max_bytes`. A tar gets its final name only once it is
    complete; an exception in the `with` block deletes the unfinished tar.
    """

    def __init__(self, folder: Path, *, prefix: str = "", max_bytes: int = 64 << 20):
        self.folder, self.prefix, self.max_bytes = folder, prefix, max_bytes
        self.names: list[str] = []
        """The names of the shards begun so far."""
        self._tar: tarfile.TarFile | None = None
        self._open_files = ExitStack()

    def write(
        self,
        key: str,
        x0_CT: NDArray[np.float16],
        metadata: Mapping[str, Any],
        *,
        flac: bytes = b"",
        text_NE: NDArray[np.float16] | None = None,
    ) -> None:
        """Add a sample.

        Raises:
            ValueError: the key is not 1 to 80 ASCII letters, digits, - and _; or an array is not a float16 matrix.
        """
        if not (key.isascii() and key.replace("-", "a").replace("_", "a").isalnum() and len(key) <= 80):
            raise ValueError(f"the sample key {key!r} must be 1 to 80 ASCII letters, digits, - and _")
        if x0_CT.dtype != np.float16 or x0_CT.ndim != 2:
            raise ValueError(f"{key}: x0 must be float16 (C, T), not {x0_CT.dtype} {x0_CT.shape}")
        if text_NE is not None and (text_NE.dtype != np.float16 or text_NE.ndim != 2):
            raise ValueError(f"{key}: text must be float16 (tokens, width), not {text_NE.dtype} {text_NE.shape}")
        # Half a surrogate pair, which a manifest may hold, stays the escape that JSON has for it.
        about = json.dumps(metadata, ensure_ascii=False).encode(errors="backslashreplace")
        members = {_X0: _npy(x0_CT), _JSON: about}
        members |= {_TEXT: _npy(text_NE)} if text_NE is not None else {}
        members |= {_FLAC: flac} if flac else {}
        tar = self._tar_with_room_for(sum(_BLOCK - (-len(content) // _BLOCK) * _BLOCK for content in members.values()))
        for kind, content in members.items():
            member = tarfile.TarInfo(f"{key}.{kind}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))

    def _tar_with_room_for(self, size: int) -> tarfile.TarFile:
        if self._tar is None or self._tar.offset + size + tarfile.RECORDSIZE > self.max_bytes:
            self._open_files.close()
            self.names.append(f"{self.prefix}{len(self.names):05d}.tar")
            self.folder.mkdir(parents=True, exist_ok=True)
            partial = self._open_files.enter_context(replacing(self.folder / self.names[-1]))
            tar = tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115 (the stack closes it)
            self._tar = self._open_files.enter_context(tar)
        return self._tar

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._open_files.__exit__(kind, error, traceback)
        self._tar = None


def scan_shard(path: Path) -> NDArray[np.void]:
    """Return the index rows of all samples of a tar, with shard 0, in the order of the samples' first members.

    As in WebDataset, a member's name is its sample's key up to the first dot, and its kind after that dot. Metadata may
    be missing; latents may not.

    Raises:
        ValueError: the tar is broken, a sample is incomplete, its x0 is not a float16 matrix in C order, or its
            metadata is not a JSON object.
    """
    return index_rows(path, find_members(path))


def index_rows(path: Path, samples: Mapping[str, Mapping[str, tuple[int, int]]]) -> NDArray[np.void]:
    """Return the rows of `scan_shard` for the members that `find_members` found."""
    more = [kind for kind in (_FLAC, _TEXT) if any(kind in members for members in samples.values())]
    kinds = [_X0, *more]
    rows = np.zeros(len(samples), INDEX_ROWS[(_FLAC in kinds) + 2 * (_TEXT in kinds)])
    with path.open("rb") as file:
        for row, (key, members) in zip(rows, samples.items(), strict=True):
            if missing := [kind for kind in kinds if kind not in members]:
                raise ValueError(f"{path} has no {shown(key)}.{missing[0]}")
            try:
                _fill_row(row, file, members)
            except ValueError as error:
                raise ValueError(f"{path}: {shown(key)}.{error}") from error
    return rows


def _fill_row(row: np.void, file: BinaryIO, members: Mapping[str, tuple[int, int]]) -> None:
    """Fill the index row of a sample. The message of a ValueError begins with the kind of the member at fault."""
    for kind in _KINDS:
        if members.get(kind, (0, 0))[1] > LONGEST_MEMBER:
            raise ValueError(f"{kind} has {members[kind][1]} bytes, but the index can hold {LONGEST_MEMBER}")
    (_, row["frames"]), row["x0_offset"], row["x0_length"] = _find_values(file, _X0, *members[_X0])
    row["x0_crc32"] = _checksum(file, row["x0_offset"], row["x0_length"])
    about = b""
    if _JSON in members:
        row["json_offset"], row["json_length"] = members[_JSON]
        if row["json_length"] > LONGEST_METADATA:
            raise ValueError(f"{_JSON} has {row['json_length']} bytes, but metadata may have {LONGEST_METADATA}")
        about = pread(file, *members[_JSON])
        try:
            parse_metadata(about)
        except ValueError as error:
            raise ValueError(f"{_JSON} {error}") from error
    row["json_crc32"] = metadata_checksum(row, about)
    if _FLAC in members:
        row["flac_offset"], row["flac_length"] = members[_FLAC]
        row["flac_crc32"] = _checksum(file, *members[_FLAC])
    if _TEXT in members:
        (row["text_tokens"], _), row["text_offset"], row["text_length"] = _find_values(file, _TEXT, *members[_TEXT])
        row["text_crc32"] = _checksum(file, row["text_offset"], row["text_length"])


def read_rows(path: Path, shard: Path, *, mend: str) -> NDArray[np.void]:
    """Read rows that `scan_shard` has returned; rows of an older version get the checksums of the shard's metadata.

    Raises:
        DamagedDocument: these are no such rows. `mend` says what mends that.
        OSError: the rows or the shard can't be read.
    """
    content = path.read_bytes()
    try:
        rows = np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
    except Exception as error:  # numpy evaluates the header as Python, whose errors are of many kinds
        raise damaged(path, " ".join(str(error).split()), mend) from error
    if rows.dtype in INDEX_ROWS:
        return rows
    if rows.dtype not in OLDER_INDEX_ROWS:
        raise damaged(path, "it holds no rows of an index", mend)
    completed = np.zeros(len(rows), INDEX_ROWS[OLDER_INDEX_ROWS.index(rows.dtype)])
    for name in rows.dtype.names or ():
        completed[name] = rows[name]
    with shard.open("rb") as file:
        for row in completed:
            row["json_crc32"] = metadata_checksum(row, pread(file, row["json_offset"], row["json_length"]))
    return completed


def text_width(path: Path) -> int | None:
    """Return the features per text token of the shard's first sample with text, or None if no sample has text."""
    with path.open("rb") as file:
        for key, members in find_members(path).items():
            if _TEXT in members:
                return _find_values(file, f"{path}: {shown(key)}.{_TEXT}", *members[_TEXT])[0][1]
    return None


def find_members(path: Path) -> dict[str, dict[str, tuple[int, int]]]:
    """Return key → kind → (offset, length) in bytes for all files of a tar, and for the links between them.

    Hidden files, whose names begin with a dot, have no key and are left out, as in WebDataset.

    Raises:
        ValueError: the tar is damaged (see `find_tar_members`), holds a member twice, or lacks the file of a link.
    """
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    for member in find_tar_members(path):
        folder, slash, name = member.name.rpartition("/")
        stem, _, kind = name.partition(".")
        kind = kind.lower()
        if not stem and kind.endswith(_X0):
            raise ValueError(f"{path}: {shown(member.name)} has no key before its first dot: rename it")
        if not stem or (member.lack and kind not in _KINDS):
            continue
        if member.lack:
            raise ValueError(f"{path}: {shown(member.name)} {member.lack}: pack the file itself, with `--dereference`")
        members = samples.setdefault(f"{folder}{slash}{stem}", {})
        if kind in members:
            raise ValueError(f"{path} holds {shown(member.name)} twice")
        members[kind] = member.offset, member.size
    return samples


def member_at(path: Path, offset: int) -> str | None:
    """Return the name of the member whose content begins at this byte of a tar, or None if there is none."""
    try:
        return next((shown(member.name) for member in find_tar_members(path) if member.offset == offset), None)
    except (ValueError, OSError):
        return None


def _npy(values: NDArray[np.float16]) -> bytes:
    content = io.BytesIO()
    np.save(content, np.ascontiguousarray(values), allow_pickle=False)
    return content.getvalue()


def _find_values(file: BinaryIO, name: str, offset: int, length: int) -> tuple[tuple[int, int], int, int]:
    """Return the shape of the .npy member at `offset`, and the offset and length of its values in bytes."""
    try:
        (rows, columns), header = float16_shape(pread(file, offset, min(length, LONGEST_NPY_HEADER)))
    except ValueError as error:
        raise ValueError(f"{name} {error}") from error
    values = length - header
    if values != 2 * rows * columns:
        shape = f"({rows}, {columns})"[:60]
        raise ValueError(f"{name} is not a whole float16 matrix in C order: its shape is {shape}, in {values} bytes")
    if not columns or not (rows or name.endswith(_TEXT)):  # only a text may be empty
        raise ValueError(f"{name} holds no values: its shape is ({rows}, {columns})")
    return (rows, columns), offset + header, values


def _checksum(file: BinaryIO, offset: int, length: int) -> int:
    """Return the CRC-32 of a part of a file, which is read piece by piece."""
    checksum, end = 0, int(offset) + int(length)
    for at in range(int(offset), end, _PIECE):
        checksum = crc32(pread(file, at, min(_PIECE, end - at)), checksum)
    return checksum


def pread(file: BinaryIO | io.FileIO, offset: int, length: int) -> bytes:
    """Read `length` bytes at `offset`, or fewer at the end of the file."""
    return os.pread(file.fileno(), int(length), int(offset))


def write_index(folder: Path, info: SetInfo, shards: Mapping[str, NDArray[np.void]]) -> None:
    """Make a folder of shards a set: write `index.npy`, then `set.json`.

    Args:
        folder: the folder with the shards.
        info: the facts that all samples share.
        shards: shard name → its rows from `scan_shard`, in the set's order.

    Raises:
        ValueError: there are no samples, only some samples have audio or text, or the latents' channels or the text's
            width differ from `info`.
    """
    if not any(len(rows) for rows in shards.values()):
        raise ValueError(f"there is no sample to index in {folder}")
    if len({rows.dtype for rows in shards.values()}) > 1:
        raise ValueError(f"some shards of {folder} have audio or text and others have none: all must have the same")
    index = np.concatenate(list(shards.values()))
    if not well_formed(index, info.latent_channels).all():
        raise ValueError(f"some latents in {folder} do not have {info.latent_channels} channels")
    if "text_tokens" in (index.dtype.names or ()) and (info.text is None or not text_fits(index, info.text).all()):
        raise ValueError(f"some text in {folder} does not fit the tokens and width in {info.text}")
    index["shard"] = np.repeat(np.arange(len(shards)), [len(rows) for rows in shards.values()])
    sizes = {name: (folder / name).stat().st_size for name in shards}
    description = {
        "version": SET_VERSION,
        **asdict(info),
        "fingerprint": set_fingerprint(info, index),
        "checksum": set_checksum(info, list(sizes.items()), index),
        "samples": len(index),
        "total_frames": int(index["frames"].sum(dtype=np.int64)),
        "shortest_frames": int(index["frames"].min()),
        "longest_frames": int(index["frames"].max()),
        "shards": [{"name": name, "bytes": sizes[name], "samples": len(rows)} for name, rows in shards.items()],
    }
    with replacing(folder / "index.npy") as partial, partial.open("wb") as file:
        np.save(file, index, allow_pickle=False)
    write_json(folder / "set.json", description, indent=1, ascii=False, end="\n")


def set_fingerprint(info: SetInfo, index: NDArray[np.void]) -> str:
    """Return a hash of all latents and texts, in their order, computed from the checksums in the index."""
    digest = blake2b(info.ae_identity.encode(), digest_size=16)
    for column in ("frames", "x0_crc32", *(["text_crc32"] if "text_crc32" in (index.dtype.names or ()) else [])):
        digest.update(index[column].tobytes())
    return digest.hexdigest()


def set_checksum(info: SetInfo, shards: Sequence[tuple[str, int]], index: NDArray[np.void]) -> int:
    """Return a CRC-32 of the whole index, of each shard's (name, bytes), and of what says how to read the samples."""
    facts = [info.sample_rate, info.hop, info.latent_channels, info.clip_seconds, info.text, list(shards)]
    return crc32(np.ascontiguousarray(index).view(np.uint8).data, crc32(json.dumps(facts, sort_keys=True).encode()))
