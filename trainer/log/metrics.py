"""What is written down while training: `metrics.jsonl`, TensorBoard, listening samples. All of it on rank 0 alone."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from trainer.data.audio import write_audio
from trainer.run_directory import RunDirectory, write_atomically
from trainer.spectrogram import log_mel_image


class LossSums:
    """Sums of losses by noise level, gathered without waiting for the device."""

    def __init__(self, bins: int, device: torch.device) -> None:
        self.bins = bins
        # float64: a mean over the batch that does not depend on how it was cut among ranks
        self.sums = torch.zeros(2, bins, device=device, dtype=torch.float64)

    @torch.no_grad()
    def add(self, losses_B: Tensor, quantiles_B: Tensor) -> None:
        """Take in a micro batch: losses, and each sample's place in (0, 1) among the noise levels."""
        bin_B = (quantiles_B * self.bins).long().clamp_(0, self.bins - 1)
        self.sums[0].index_add_(0, bin_B, losses_B.double())
        self.sums[1].index_add_(0, bin_B, torch.ones_like(losses_B, dtype=torch.float64))

    def read(self) -> tuple[list[float], list[float]]:
        """This rank's sums of losses by bin since the last reading, and how many they are; starts anew."""
        totals, counts = self.sums.tolist()
        self.sums.zero_()
        return totals, counts


def mean_loss(of_ranks: Iterable[tuple[list[float], list[float]]]) -> tuple[float, list[float | None]]:
    """The mean over what all ranks' `LossSums` gave, over all and by bin (None where nothing fell)."""
    totals, counts = ([sum(bin_) for bin_ in zip(*part, strict=True)] for part in zip(*of_ranks, strict=True))
    by_bin = [total / count if count else None for total, count in zip(totals, counts, strict=True)]
    return sum(totals) / max(1.0, sum(counts)), by_bin


class Metrics:
    """One curve across restarts: what a killed attempt wrote after the checkpoint that we resume from is cut off."""

    def __init__(self, run: RunDirectory, *, resumed_at: int, sample_rate: int) -> None:
        self.path, self.sample_rate, self.run = run.path / "metrics.jsonl", sample_rate, run
        self._cut_after(resumed_at)
        self.board = SummaryWriter(str(run.tensorboard), purge_step=resumed_at + 1, flush_secs=10)

    def _cut_after(self, samples: int) -> None:
        if self.path.exists():
            kept = [line for line in self.path.read_text().splitlines() if _samples(line) <= samples]
            write_atomically(self.path, "".join(line + "\n" for line in kept))

    def go_back_to(self, samples: int) -> None:
        """Cut off what came after, here and in TensorBoard."""
        self.board.close()
        self._cut_after(samples)
        self.board = SummaryWriter(str(self.run.tensorboard), purge_step=samples + 1, flush_secs=10)

    def write(self, kind: str, samples: int, **values: Any) -> None:
        """A line of metrics.jsonl, and its numbers in TensorBoard against samples seen."""
        self.run.permitted()
        line = {"kind": kind, "samples": samples, "time": round(time.time(), 2), **values}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        for name, value in values.items():
            if isinstance(value, int | float):
                self.board.add_scalar(f"{kind}/{name}", value, samples)
        for bin_, value in enumerate(values.get("loss_bins", [])):
            if value is not None:
                self.board.add_scalar(f"{kind}_by_noise_level/{bin_}", value, samples)

    def listen(self, name: str, audio: Tensor, samples: int) -> None:
        """Audio (samples,) and its spectrogram, in TensorBoard and under `samples/`."""
        audio = audio.detach().float().cpu().clamp(-1, 1)
        image = log_mel_image(audio, self.sample_rate, height=128)
        self.board.add_audio(name, audio[None], samples, sample_rate=self.sample_rate)
        self.board.add_image(name, image, samples, dataformats="HWC")
        folder = self.run.samples / f"step_{samples:012d}"
        folder.mkdir(parents=True, exist_ok=True)
        write_audio(folder / f"{name.replace('/', '.')}.flac", audio[None].numpy(), self.sample_rate)

    def close(self) -> None:
        """Flush what TensorBoard holds."""
        self.board.close()


def _samples(line: str) -> float:
    """Samples seen of a line; a torn line counts as the future, so that it is cut."""
    try:
        return json.loads(line)["samples"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return float("inf")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a torn last line is passed over."""
    return [json.loads(line) for line in path.read_text().splitlines() if _samples(line) < float("inf")]
