"""An embedding without weights: statistics of a mel spectrogram."""

from __future__ import annotations

from torch import Tensor

from trainer.evaluate.embeddings.embedding import Embedding
from trainer.evaluate.figures import EMBEDDING, mel_statistics


class MelStatistics(Embedding):
    """The embedding by `trainer.evaluate.figures.mel_statistics`, which needs no weights."""

    name = identity = EMBEDDING
    note = f"the {EMBEDDING} embedding: means and standard deviations of log-mel bands in half-second windows."

    def __call__(self, audio_1S: Tensor, sample_rate: int) -> Tensor:
        """Embed one clip, with one row for each half second."""
        return mel_statistics(audio_1S, sample_rate).float().cpu()
