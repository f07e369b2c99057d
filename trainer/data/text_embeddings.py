"""The text in a set: `prepare` makes it once, from captions or from existing embeddings, and the stream reads it."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Protocol
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.regular_file import open_regular
from trainer.data.captions import is_there
from trainer.data.conditions import ConditionReader, Note
from trainer.data.contents import hash_files
from trainer.data.find_sounds import find_files
from trainer.data.shard_set import ShardSet
from trainer.data.shards import DamagedSample

if TYPE_CHECKING:
    from models.text_encoder import TextEncoder
    from trainer.recipes.schema import TextConfig

TEXT_KINDS = ("none", "stable_audio", "stable_audio_3", "transformers", "files")


@dataclass(frozen=True)
class TextReader(ConditionReader):
    """Reads the embeddings of captions as D's `text` (b, N, E), float16, and `text_mask` (b, N), true for real tokens.

    `text` is 0 after the end of a caption. A sample without text has an all-false mask.
    """

    stage: str
    """The stage of D, which messages name."""
    tokens: int
    """N, the maximum number of tokens that D takes."""
    width: int
    """E, the features per token."""
    keeps: Callable[[Tensor], Tensor]
    """Maps positions in the stream (b,) to whether each sample keeps its text (b,), bool. Dropped text is not read."""

    def found_in(self, sets: Sequence[ShardSet]) -> bool:
        """See `ConditionReader`; raises ValueError if the text's sizes are not D's, or if it is of two encoders."""
        encoders: dict[str, str] = {}
        for shard_set in sets:
            if (text := shard_set.info.text) is None:
                continue
            encoders[text["encoder"]] = shard_set.location
            if text["width"] != self.width or text["tokens"] > self.tokens:
                raise ValueError(
                    f"the text in {shard_set.location} has up to {text['tokens']} tokens of {text['width']} features "
                    f"each, but D reads {self.tokens} tokens of {self.width}: prepare the set with the text encoder "
                    f"that D was trained with, or leave all text out with {self.stage}.text_dropout=1"
                )
        if len(encoders) > 1:
            raise ValueError(
                f"{' and '.join(encoders.values())} hold text of different encoders: prepare them with the same one"
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
        """See `ConditionReader`; skips the samples that drop their text."""
        if not shard_set.has_text:
            return
        kept = self.keeps(torch.from_numpy(positions)).numpy()
        for id_, row in zip(ids[kept].tolist(), rows[kept].tolist(), strict=True):
            try:
                text_NE = shard_set.text(id_)
            except DamagedSample as problem:
                note(id_, problem)
                continue
            into["text"][row, : len(text_NE)] = torch.from_numpy(text_NE.copy())
            into["text_mask"][row, : len(text_NE)] = True


class Embedder(Protocol):
    """Makes the text of a sound file."""

    tokens: int
    """The maximum number of tokens per caption."""
    width: int
    """The features per token."""

    def embed(self, name: str, caption: str) -> NDArray[np.float16]:
        """Return the text of a file, (n, width), n ≤ tokens. Raises ValueError if the file has none."""

    def identity(self) -> str:
        """Return a hash of everything that the text depends on."""


class Captions:
    """Embeds captions with a text encoder; repeated captions are encoded once."""

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
            raise ValueError("has a caption whose embedding exceeds the range of float16")
        return embedded

    def identity(self) -> str:
        """See `Embedder`."""
        return self.encoder.identity()


class TextFiles:
    """Reads existing embeddings: `NAME.npy`, (n, width), in a folder that mirrors the folder of sounds.

    Raises:
        ValueError: the folder holds no embeddings, or the first one is not a matrix.
    """

    def __init__(self, folder: Path, *, tokens: int) -> None:
        self.folder, self.tokens = folder, tokens
        # Files in linked folders come with the same order as all others, on which the identity depends.
        self._paths = sorted({*folder.rglob("*.npy"), *find_files(folder, (".npy",)).files}) if folder.is_dir() else []
        if not self._paths:
            raise ValueError(
                f"text.folder={folder} holds no .npy: give a folder with NAME.npy for each sound file NAME"
            )
        self.width: int = self._read(self._paths[0]).shape[1]

    def embed(self, name: str, caption: str) -> NDArray[np.float16]:
        """See `Embedder`."""
        path = (self.folder / name).with_suffix(".npy")
        if not is_there(path):
            raise ValueError(f"has no text embedding {path}")
        embedded = self._read(path)
        if embedded.shape[1] != self.width or not np.isfinite(embedded).all():
            raise ValueError(
                f"has a text embedding {path} of {embedded.shape[1]} features: they must be {self.width} and finite"
            )
        return embedded[: self.tokens]

    def _read(self, path: Path) -> NDArray[np.float16]:
        try:
            with os.fdopen(open_regular(path), "rb") as file:
                embedded = np.load(file, allow_pickle=False)
        except (ValueError, EOFError, BadZipFile) as error:
            raise ValueError(f"has a text embedding {path} that is not a complete .npy: {error}") from error
        if embedded.ndim != 2 or embedded.dtype.kind != "f":
            raise ValueError(f"has a text embedding {path} that is not a matrix of (tokens, width) floats")
        with np.errstate(over="ignore"):
            return embedded.astype(np.float16)

    def identity(self) -> str:
        """See `Embedder`; the hash changes if any of the files does."""
        digest = blake2b(json.dumps(self.tokens).encode(), digest_size=6)
        for path in self._paths:
            status = path.stat()
            facts = [path.relative_to(self.folder).as_posix(), status.st_size, status.st_mtime_ns]
            digest.update(json.dumps(facts).encode())
        return digest.hexdigest()

    def content(self) -> str:
        """Return a hash of all files' bytes and of the number of tokens, which copying the files does not change."""
        return f"{self.tokens}-{hash_files(self.folder, self._paths)}"


def make_embedder(config: TextConfig) -> Embedder:
    """Make the embedder that a recipe's `text` names; its kind must not be `none`.

    Raises:
        ValueError: the text encoder or the embeddings are missing or damaged.
    """
    folder = config.folder or ""
    if config.kind == "files":
        return TextFiles(Path(folder), tokens=config.tokens)
    from models.text_encoder import load_stable_audio_3_text, load_stable_audio_text, load_text_encoder

    if config.kind == "stable_audio":
        return Captions(load_stable_audio_text(folder))
    if config.kind == "stable_audio_3":
        return Captions(load_stable_audio_3_text(folder))
    return Captions(load_text_encoder(folder, tokens=config.tokens, layer=config.layer))


def embedder_factory(config: TextConfig) -> Callable[[], Embedder] | None:
    """Return a picklable function that makes the embedder, or None if the recipe's `text` is `none`."""
    return None if config.kind == "none" else functools.partial(make_embedder, config)
