"""Writes `metrics.jsonl` and listening samples during training, and hands both to the trackers. On rank 0."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.atomic_write import replacing
from models.disk_errors import patiently
from models.documents import append_lines
from trainer.data.audio import write_audio
from trainer.log.trackers.adapters import sound_file
from trainer.log.trackers.events import HeardClip, Points, WentBack, curves_of
from trainer.log.trackers.fan_out import Trackers
from trainer.losses import Losses
from trainer.run_directory import RunDirectory
from trainer.run_documents import metrics_lines, warn_of
from trainer.spectrogram import log_mel_image


class LossSums:
    """Sums of losses by noise level and by term, accumulated on the device without synchronising with it."""

    def __init__(self, bins: int, device: torch.device) -> None:
        self.bins, self.device = bins, device
        self._restart()

    def _restart(self) -> None:
        # In float64, the mean over a batch does not depend on how the batch is split among ranks.
        self.sums = torch.zeros(2, self.bins, device=self.device, dtype=torch.float64)
        self.terms: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, losses: Losses, total_B: Tensor) -> None:
        """Add a micro batch: its terms, and its weighted total (b,), binned by the samples' noise-level quantiles."""
        bin_B = (losses.quantiles * self.bins).long().clamp_(0, self.bins - 1)
        self.sums[0].index_add_(0, bin_B, total_B.double())
        self.sums[1].index_add_(0, bin_B, torch.ones_like(total_B, dtype=torch.float64))
        for name, value_B in losses.terms.items():
            total = value_B.double().sum()
            self.terms[name] = self.terms[name] + total if name in self.terms else total

    def read(self) -> LossSum:
        """Return this rank's sums since the last call, and reset them."""
        names = list(self.terms)
        values = torch.cat([self.sums.flatten(), *(self.terms[name][None] for name in names)]).tolist()
        totals, counts, terms = values[: self.bins], values[self.bins : 2 * self.bins], values[2 * self.bins :]
        self._restart()
        return LossSum(totals, counts, dict(zip(names, terms, strict=True)))


class LossSum(NamedTuple):
    """One rank's sums of losses over samples."""

    totals: list[float]
    """Sum of the total loss per bin of noise levels."""
    counts: list[float]
    """Number of samples per bin."""
    terms: dict[str, float]
    """Sum of each loss term."""


class MeanLoss(NamedTuple):
    """Mean losses over the samples of all ranks."""

    loss: float
    by_bin: list[float | None]
    """Mean loss per bin of noise levels; None if no sample fell into the bin."""
    terms: dict[str, float]


def mean_loss(of_ranks: Sequence[LossSum]) -> MeanLoss:
    """Compute mean losses from the sums of all ranks."""
    totals = [sum(bin_) for bin_ in zip(*(rank.totals for rank in of_ranks), strict=True)]
    counts = [sum(bin_) for bin_ in zip(*(rank.counts for rank in of_ranks), strict=True)]
    by_bin = [total / count if count else None for total, count in zip(totals, counts, strict=True)]
    samples = max(1.0, sum(counts))
    names = dict.fromkeys(name for rank in of_ranks for name in rank.terms)
    terms = {name: sum(rank.terms.get(name, 0.0) for rank in of_ranks) / samples for name in names}
    return MeanLoss(sum(totals) / samples, by_bin, terms)


class Metrics:
    """Writes one continuous curve across restarts: resuming removes lines that are later than the checkpoint."""

    def __init__(self, run: RunDirectory, *, resumed_at: int, sample_rate: int) -> None:
        self.path, self.sample_rate, self.run = run.path / "metrics.jsonl", sample_rate, run
        self.trackers = Trackers()
        """What shows the curves, too."""
        patiently(lambda: self._cut_after(resumed_at))

    def _cut_after(self, samples: int) -> None:
        if self.path.is_file():
            lines = metrics_lines(self.path)
            with replacing(self.path) as partial, partial.open("wb") as file:
                file.writelines(line + b"\n" for line, values in lines.pairs() if values["samples"] <= samples)
                lines.require_readable()
            warn_of(lines)

    def go_back_to(self, samples: int) -> None:
        """Remove everything after `samples` samples from `metrics.jsonl`, and tell the trackers."""
        patiently(lambda: self._cut_after(samples))
        self.trackers.put(WentBack(samples))

    def write(self, kind: str, samples: int, **values: Any) -> None:
        """Append a line to `metrics.jsonl`, and hand its curves to the trackers."""
        self.run.require_ownership()
        line = {"kind": kind, "samples": samples, "time": round(time.time(), 2), **values}
        append_lines(self.path, [line])
        self.trackers.put(Points(kind, samples, curves_of(kind, values)))

    def listen(self, name: str, audio: Tensor, samples: int) -> None:
        """Write audio (samples,) to `samples/`, and hand it with its spectrogram to the trackers."""
        audio = audio.detach().float().cpu().clamp(-1, 1)
        path = sound_file(self.run, name, samples)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_audio(path, audio[None].numpy(), self.sample_rate)
        picture = log_mel_image(audio, self.sample_rate, height=128)
        self.trackers.put(HeardClip(name, samples, audio.numpy(), self.sample_rate, picture))

    def close(self) -> None:
        """Let the trackers end, for a bounded time."""
        self.trackers.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the lines of a `metrics.jsonl`, except damaged ones."""
    return list(metrics_lines(path))
