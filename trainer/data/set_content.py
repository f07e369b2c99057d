"""The content of everything that `prepare` makes sets of: the sounds, and embeddings that exist already."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing

from trainer.data.contents import content_digest, content_digests, hash_sources
from trainer.data.mixed_sources import AllSources
from trainer.data.origins import digest_of, opened
from trainer.data.sources import SoundFile
from trainer.data.tables import Cells
from trainer.data.text_embeddings import Embedder, TextFiles


class Content:
    """What the sounds and the embeddings hold now, hashed when it is asked for: that reads all of them."""

    def __init__(self, sources: AllSources, embedder: Embedder | None) -> None:
        self._all, self.embedder = sources, embedder

    def of(self, key: str) -> str:
        """Return the hash of what a key of the settings is about; empty if files do not decide it."""
        if key == "files":
            return "" if self._all.is_remote else hash_sources(self._sources, self._digests())
        return self.embedder.content() if key == "text" and isinstance(self.embedder, TextFiles) else ""

    def recorded(self, digests: Mapping[str, str]) -> dict[str, str]:
        """Return the hashes for the report, from the files' digests by name; none if those of some are unknown."""
        if any(source.name not in digests for source in self._sources):
            return {}
        files = hash_sources(self._sources, [digests[source.name] for source in self._sources])
        return {"files": files} | ({"text": text} if (text := self.of("text")) else {})

    @property
    def _sources(self) -> list[SoundFile]:
        return self._all.listed().files

    def _digests(self) -> list[str]:
        if self._all.plain is not None:
            return content_digests(source.path for source in self._sources)
        patience = self._all.asked.patience
        with closing(Cells(patience)) as cells:
            return [_digest(cells.loaded(source), patience) for source in self._sources]


def _digest(source: SoundFile, patience: float) -> str:
    """Return the hash of a sound's bytes; empty if its source does not hold it."""
    if source.origin is None:
        return content_digest(source.path)
    try:
        with opened(source.origin, source.path, spool=None, name=source.key, patience=patience) as file:
            return digest_of(file)
    except ValueError:
        return ""
