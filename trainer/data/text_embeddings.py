"""Text in a set: made once by `prepare`, from captions or from embeddings that are there, and read in batches."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.data.conditions import ConditionReader, Note
from trainer.data.shard_set import ShardSet
from trainer.data.shards import DamagedSample

if TYPE_CHECKING:
    from models.text_encoder import TextEncoder
    from trainer.recipes.schema import TextConfig

TEXT_KINDS = ("none", "stable_audio", "transformers", "files")


@dataclass(frozen=True)
class TextReader(ConditionReader):
    """Reads captions' embeddings as D's `text` (b, N, E), float16, and `text_mask` (b, N), true where a token is real.

    Rows are 0 behind the end of a caption; a sample without text has a mask that is false throughout.
    """

    stage: str
    """The stage whose D reads them, for messages."""
    tokens: int
    """N, the most that D takes."""
    width: int
    """E, features of a token."""
    keeps: Callable[[Tensor], Tensor]
    """Of positions in the stream (b,), which samples keep their text (b,), bool: what is dropped is not even read."""

    def found_in(self, sets: Sequence[ShardSet]) -> bool:
        """See `ConditionReader`; refuses text of other sizes than D's, and of two encoders."""
        encoders: dict[str, str] = {}
        for shard_set in sets:
            if (text := shard_set.info.text) is None:
                continue
            encoders[text["encoder"]] = shard_set.location
            if text["width"] != self.width or text["tokens"] > self.tokens:
                raise ValueError(
                    f"the text in {shard_set.location} is of up to {text['tokens']} tokens of {text['width']} features "
                    f"each, and D reads {self.tokens} of {self.width}: prepare it with the text encoder that D was "
                    f"trained with, or leave all text out with {self.stage}.text_dropout=1"
                )
        if len(encoders) > 1:
            raise ValueError(
                f"{' and '.join(encoders.values())} hold text of different encoders: prepare them with one"
            )
        return bool(encoders)

    def blank(self, size: int) -> dict[str, Tensor]:
        """See `ConditionReader`."""
        shape = (size, self.tokens, self.width)
        return {
            "text": torch.zeros(shape, dtype=torch.float16),
            "text_mask": torch.zeros(shape[:2], dtype=torch.bool),
        }

    def fill(
        self,
        into: Mapping[str, Tensor],
        shard_set: ShardSet,
        *,
        ids: NDArray[np.int64],
        rows: NDArray[np.int64],
        positions: NDArray[np.int64],
        note: Note,
    ) -> None:
        """See `ConditionReader`; samples that drop their text are passed over."""
        if not shard_set.has_text:
            return
        kept = self.keeps(torch.from_numpy(positions)).numpy()
        for id_, row in zip(ids[kept].tolist(), rows[kept].tolist(), strict=True):
            try:
                found_NE = shard_set.text(id_)
            except DamagedSample as problem:
                note(id_, problem)
                continue
            into["text"][row, : len(found_NE)] = torch.from_numpy(found_NE.copy())
            into["text_mask"][row, : len(found_NE)] = True


class Embedder(Protocol):
    """What makes the text of a sound file."""

    tokens: int
    """The most that a caption has."""
    width: int

    def embed(self, name: str, caption: str) -> NDArray[np.float16]:
        """(n, width), n ≤ tokens. Raises ValueError where there is none of this file."""

    def identity(self) -> str:
        """A hash of all that it depends on."""


class Captions:
    """Captions through a text encoder; one that comes again is not encoded again."""

    def __init__(self, encoder: TextEncoder) -> None:
        self.encoder, self.tokens, self.width = encoder, encoder.tokens, encoder.width
        self._encoded = functools.lru_cache(1024)(self._encode)

    def embed(self, name: str, caption: str) -> NDArray[np.float16]:
        """See `Embedder`; an empty caption has no tokens."""
        return self._encoded(caption)

    def _encode(self, caption: str) -> NDArray[np.float16]:
        if not caption:
            return np.zeros((0, self.width), np.float16)
        embedded = self.encoder.encode(caption).numpy().astype(np.float16)
        if not np.isfinite(embedded).all():
            raise ValueError("has a caption whose embedding is beyond the range of float16")
        return embedded

    def identity(self) -> str:
        """See `Embedder`."""
        return self.encoder.identity()


class TextFiles:
    """Embeddings that were made elsewhere: `NAME.npy`, (n, width), in a folder that mirrors that of the sounds.

    Raises:
        ValueError: the folder holds none, or the first is no matrix.
    """

    def __init__(self, folder: Path, *, tokens: int) -> None:
        self.folder, self.tokens = folder, tokens
        self._paths = sorted(folder.rglob("*.npy")) if folder.is_dir() else []
        if not self._paths:
            raise ValueError(f"text.folder={folder} holds no .npy: give one with NAME.npy for each sound file NAME")
        self.width: int = self._read(self._paths[0]).shape[1]

    def embed(self, name: str, caption: str) -> NDArray[np.float16]:
        """See `Embedder`."""
        path = (self.folder / name).with_suffix(".npy")
        if not path.is_file():
            raise ValueError(f"has no text embedding {path}")
        embedded = self._read(path)
        if embedded.shape[1] != self.width or not np.isfinite(embedded).all():
            raise ValueError(
                f"has a text embedding {path} of {embedded.shape[1]} features, not {self.width} finite ones"
            )
        return embedded[: self.tokens]

    def _read(self, path: Path) -> NDArray[np.float16]:
        try:
            embedded = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"has a text embedding {path} that is no whole .npy: {error}") from error
        if embedded.ndim != 2 or embedded.dtype.kind != "f":
            raise ValueError(f"has a text embedding {path} that is no matrix of (tokens, width) floats")
        with np.errstate(over="ignore"):
            return embedded.astype(np.float16)

    def identity(self) -> str:
        """Changes with any of the files."""
        digest = blake2b(json.dumps(self.tokens).encode(), digest_size=6)
        for path in self._paths:
            status = path.stat()
            fact = [path.relative_to(self.folder).as_posix(), status.st_size, status.st_mtime_ns]
            digest.update(json.dumps(fact).encode())
        return digest.hexdigest()


def make_embedder(config: TextConfig) -> Embedder:
    """What a recipe's `text` names, which is not `none`.

    Raises:
        ValueError: it is not there, or not whole.
    """
    folder = config.folder or ""
    if config.kind == "files":
        return TextFiles(Path(folder), tokens=config.tokens)
    from models.text_encoder import load_stable_audio_text, load_text_encoder

    if config.kind == "stable_audio":
        return Captions(load_stable_audio_text(folder))
    return Captions(load_text_encoder(folder, tokens=config.tokens, layer=config.layer))


def embedder_factory(config: TextConfig) -> Callable[[], Embedder] | None:
    """Makes it, in this process and in workers; None where there is no text."""
    return None if config.kind == "none" else functools.partial(make_embedder, config)
