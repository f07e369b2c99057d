"""The content of everything that `prepare` makes sets of: the sounds, and embeddings that exist already."""

from __future__ import annotations

from collections.abc import Mapping

from trainer.data.contents import content_digests, hash_sources
from trainer.data.sources import SoundFile
from trainer.data.text_embeddings import Embedder, TextFiles


class Content:
    """What the sounds and the embeddings hold now, hashed when it is asked for: that reads all of them."""

    def __init__(self, sources: list[SoundFile], embedder: Embedder | None) -> None:
        self.sources, self.embedder = sources, embedder

    def of(self, key: str) -> str:
        """Return the hash of what a key of the settings is about; empty if files do not decide it."""
        if key == "files":
            return hash_sources(self.sources, content_digests(source.path for source in self.sources))
        return self.embedder.content() if key == "text" and isinstance(self.embedder, TextFiles) else ""

    def recorded(self, digests: Mapping[str, str]) -> dict[str, str]:
        """Return the hashes for the report, from the files' digests by name; none if those of some are unknown."""
        if any(source.name not in digests for source in self.sources):
            return {}
        files = hash_sources(self.sources, [digests[source.name] for source in self.sources])
        return {"files": files} | ({"text": text} if (text := self.of("text")) else {})
