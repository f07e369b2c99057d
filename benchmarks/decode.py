"""Measure what a decode costs and loses in few steps, with and without the stage `distill`.

    python benchmarks/decode.py runs/demo [--clips 48] [--steps 1 2 4 8 12]

RUN is a run whose `distill` is done. Held-out clips are encoded at the codec's highest rate and decoded from the same
noise in each number of steps, by the D of `finetune` and, in the numbers of steps that it learned, by the one of
`distill`. Log-mel and the embedding's distances are those between the decodes and the true sounds; `to twelve` is the
log-mel distance to the decode of the recipe's own number of steps, and the difference in log-mel to that decode has its
95 % interval, clip by clip. Speed is in seconds of sound for each second of one thread's CPU time, one clip at a time,
with the AudioAE.
"""

from __future__ import annotations

import argparse
import dataclasses
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from models.sizes import Sampling  # noqa: E402
from trainer.evaluate.embeddings import Embedding, make_embedding  # noqa: E402
from trainer.evaluate.figures import log_mel_distance, set_figures  # noqa: E402
from trainer.evaluate.own_codecs import Export  # noqa: E402
from trainer.evaluate.scored_clips import ScoredClips, load_clips  # noqa: E402
from trainer.formatting import aligned  # noqa: E402
from trainer.recipes.reading import load_recipe  # noqa: E402

BATCH = 8
TIMED = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--clips", type=int, default=48)
    parser.add_argument("--steps", nargs="+", type=int, default=[1, 2, 4, 8, 12])
    options = parser.parse_args()
    torch.set_num_threads(1)
    table = measured(options.run, clips=options.clips, steps=options.steps)
    print(f"\n{datetime.now(UTC).date()}, {platform.machine()}, torch {torch.__version__}, {options.clips} clips\n")
    print(aligned(table.lines))


def measured(run: Path, *, clips: int, steps: Sequence[int], plain: bool = True) -> Table:
    """Measure a run in each number of steps, with `distill` and, unless `plain` is false, without."""
    config = load_recipe(str(run / "distill" / "config.yaml"), [f"run_dir={run}", f"evaluate.clips={clips}"])
    table = Table(run / "distill" / "export", load_clips(config, torch.device("cpu")), config.sampling)
    for count in steps:
        for distilled in (False, True) if plain else (True,):
            table.measure(count, distilled=distilled)
    return table


class Table:
    """The rows that were measured, as texts."""

    def __init__(self, folder: Path, clips: ScoredClips, sampling: Sampling) -> None:
        self.export = Export(folder, clips, sampling=sampling, device=torch.device("cpu"))
        self.codec, self.clips, self.sampling = self.export.codec, clips, sampling
        self.distilled = self.codec.distilled
        assert self.distilled is not None, f"{folder} has no distilled D"
        self.books = max(self.codec.config.rates)
        self.embedding: Embedding = make_embedding("auto", torch.device("cpu"))
        self.z = {block[0]: self.export.through_files(block, self.books)[0] for block in clips.blocks(BATCH)}
        self.originals = self.embedded(clips.audio_B1S)
        self.own = self.decoded(sampling)
        self.lines = [
            (
                "steps",
                "D",
                "log-mel dB",
                "more than twelve",
                "to twelve dB",
                "Fréchet",
                f"kernel ({self.embedding.name})",
                "× real time",
            )
        ]

    @torch.inference_mode()
    def measure(self, steps: int, *, distilled: bool) -> None:
        """Add a row, unless the distilled D did not learn this number of steps."""
        assert self.distilled is not None
        sampling = dataclasses.replace(self.sampling, steps=steps)
        if distilled and not self.distilled.serves(sampling):
            return
        self.codec.distilled = self.distilled if distilled else None
        audio = self.decoded(sampling)
        rate = self.clips.sample_rate
        originals_BS = self.clips.audio_B1S[:, 0]
        log_mel_B, own_B, to_own_B = (
            log_mel_distance(*pair, rate)
            for pair in ((originals_BS, audio[:, 0]), (originals_BS, self.own[:, 0]), (self.own[:, 0], audio[:, 0]))
        )
        more_B = log_mel_B - own_B
        interval = 1.96 * more_B.std().item() / len(more_B) ** 0.5
        found = set_figures(self.originals, self.embedded(audio))
        row = (
            f"{log_mel_B.mean():.2f}",
            f"{more_B.mean():+.2f} ±{interval:.2f}",
            f"{to_own_B.mean():.2f}",
            f"{found['frechet']:.3f}",
            f"{found['kernel']:.4f}",
        )
        self.lines.append((str(steps), "distilled" if distilled else "finetuned", *row, f"{self.speed(sampling):.1f}"))
        self.codec.distilled = self.distilled
        print(*self.lines[-1], flush=True)

    @torch.inference_mode()
    def decoded(self, sampling: Sampling) -> Tensor:
        """Decode all clips (C, 1, samples)."""
        self.export.asked = sampling
        return torch.cat([self.export.decode(self.z[block[0]], block) for block in self.clips.blocks(BATCH)])

    def embedded(self, audio_B1S: Tensor) -> Tensor:
        """Embed all clips: (windows, features)."""
        return torch.cat([self.embedding(audio_1S, self.clips.sample_rate) for audio_1S in audio_B1S])

    def speed(self, sampling: Sampling) -> float:
        """Return the seconds of sound decoded per second, the median over clips."""
        streams = [self.codec.encode(audio_1S, books=self.books) for audio_1S in self.clips.audio(range(TIMED))]
        self.codec.decode(streams[0], sampling=sampling)
        took = []
        for stream in streams:
            start = time.thread_time()
            self.codec.decode(stream, sampling=sampling)
            took.append(time.thread_time() - start)
        return self.clips.seconds / statistics.median(took)


if __name__ == "__main__":
    main()
