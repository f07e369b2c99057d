"""Compare one z for both channels with two mono codes: python benchmarks/stereo.py FOLDER [--audio SOUNDS] [--steps N].

Two codecs of the demo's size are trained with the same steps on the same sounds. `magnitude_stereo` codes both channels
in one row; `magnitude` codes mid and side, each in a row with half the codebooks, so that both have the same rate. The
mono codec learns from the mids and the sides of all sounds. Sounds that neither has seen are encoded to streams and
decoded, and the table has the errors of levels and coherence between the channels and the log-mel distance, next to
those of the AudioAEs alone and of the sound mixed to one channel.

Without --audio, pairs of synthesised sounds are put at random places, with a reverberation that differs between the
channels. A codec that FOLDER already holds is not trained again.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from models.backbones.pretrained import EMBEDDED  # noqa: E402
from models.codec import SPresso  # noqa: E402
from models.loudness import level  # noqa: E402
from trainer.data.audio import read_audio, write_audio  # noqa: E402
from trainer.data.find_sounds import find_audio  # noqa: E402
from trainer.evaluate.figures import log_mel_distance, sounding_channels  # noqa: E402
from trainer.evaluate.stereo_figures import stereo_errors  # noqa: E402
from trainer.formatting import aligned  # noqa: E402

RATE, SECONDS, HOURS = 48_000, 5.0, 0.5
HELD_OUT = 10
"""One sound in so many is held out of both trainings and scored."""
BOOKS = {"magnitude": (6, 2), "magnitude_stereo": (12, 4)}
"""Codebooks of each row of an AudioAE's codec. The rates of both codecs are equal, place by place."""
FIGURES = {"level": "level, dB", "coherence": "coherence", "log_mel": "log-mel, dB"}

Through = Callable[[Tensor], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for the sounds and the runs")
    parser.add_argument("--audio", type=Path, help="a folder of stereo sounds (default: synthesised ones)")
    parser.add_argument("--steps", type=int, default=800, help="steps of `autoencode` (default: %(default)s)")
    parser.add_argument("--clips", type=int, default=24, help="sounds to score (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = options.folder.resolve()
    if not (folder / "sounds").exists():
        divide(folder, stereo_sounds(options.audio) if options.audio else placed_sounds(folder))
    for kind in BOOKS:
        train(folder, kind, options.steps)
    held_out = [held_out_sound(path) for path in sorted((folder / "held_out").glob("*.wav"))[: options.clips]]
    rows = [(title, rate, scores(held_out, through)) for title, rate, through in systems(folder)]
    print(f"\n{datetime.now(UTC).date()}, {platform.machine()}, torch {torch.__version__}, {options.steps} steps of 8,")
    print(f"{len(held_out)} held-out sounds, mean ± standard error\n")
    print(aligned([("", "kbps", *FIGURES.values()), *((title, rate, *found) for title, rate, found in rows)]))


# --- the sounds -------------------------------------------------------------------------------------------------------


def stereo_sounds(audio: Path) -> list[Tensor]:
    """Read the sounds (2, samples) of a folder."""
    return [torch.from_numpy(read_audio(path, sample_rate=RATE, channels=2)) for path in find_audio(audio)]


def placed_sounds(folder: Path) -> list[Tensor]:
    """Synthesise sounds, and put pairs of them at random places in a reverberating room."""
    spresso("synth", folder / "synthesised", "--hours", HOURS)
    paths = sorted((folder / "synthesised").rglob("*.flac"))
    sounds = [torch.from_numpy(read_audio(path, sample_rate=RATE))[0] for path in paths]
    random = np.random.default_rng(0)
    return [placed(one, other, random) for one, other in zip(sounds, sounds[1:] + sounds[:1], strict=True)]


def placed(one_S: Tensor, other_S: Tensor, random: np.random.Generator) -> Tensor:
    """Pan two sounds, the second one 0 to 20 dB quieter, and add the tails of two rooms: (2, samples)."""
    samples = min(len(one_S), len(other_S), round(SECONDS * RATE))
    dry_2S = torch.zeros(2, samples)
    for sound_S, loss_db in ((one_S, 0.0), (other_S, random.uniform(0, 20))):
        angle = torch.tensor(random.uniform(0, np.pi / 2))
        dry_2S += torch.stack((angle.cos(), angle.sin()))[:, None] * sound_S[:samples] * 10 ** (-loss_db / 20)
    decay = torch.exp(-torch.arange(RATE // 2) / (random.uniform(0.02, 0.15) * RATE))
    tails = torch.from_numpy(random.standard_normal((2, RATE // 2))).float() * decay
    tails *= 10 ** (random.uniform(-25, -5) / 20) / tails.square().sum(1, keepdim=True).sqrt()
    size = samples + RATE // 2
    wet_2S = torch.fft.irfft(torch.fft.rfft(dry_2S.mean(0), size) * torch.fft.rfft(tails, size), size)[:, :samples]
    return level(dry_2S + wet_2S)[0]


def divide(folder: Path, sounds: list[Tensor]) -> None:
    """Write the sounds to `sounds`, their mids and sides to `rows`, and every `HELD_OUT`-th to `held_out`."""
    for name in ("rows", "held_out", "sounds"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for number, audio_2S in enumerate(sounds):
        held_out = number % HELD_OUT == 0
        write_audio(folder / ("held_out" if held_out else "sounds") / f"{number:05d}.wav", audio_2S.numpy(), RATE)
        if not held_out:
            for row, sign in (("mid", 1), ("side", -1)):
                mono_1S = (audio_2S[:1] + sign * audio_2S[1:]) / 2
                write_audio(folder / "rows" / f"{number:05d}_{row}.wav", mono_1S.numpy(), RATE)


def held_out_sound(path: Path) -> Tensor:
    """Read the beginning of a held-out sound, (2, samples)."""
    return torch.from_numpy(read_audio(path, sample_rate=RATE, channels=2)[:, : round(SECONDS * RATE)])


# --- the codecs -------------------------------------------------------------------------------------------------------


def spresso(*arguments: object) -> None:
    """Run a command of the product; its output goes to standard error."""
    command = [sys.executable, "-m", "launch.cli", *map(str, arguments)]
    subprocess.run(command, check=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=sys.stderr)


def train(folder: Path, kind: str, steps: int) -> None:
    """Train the codec of an AudioAE, unless it is there."""
    run, (books, fewer) = folder / kind, BOOKS[kind]
    if (run / "finetune" / "export").exists():
        return
    sounds = folder / ("sounds" if kind == "magnitude_stereo" else "rows")
    settings = [f"run_dir={run}", f"data.audio={sounds}", f"data.latents={run / 'latents'}", "data.holdout=0.05"]
    settings += [f"autoencoder.kind={kind}", f"dit.channels={EMBEDDED[kind].latent_channels}"]
    settings += [f"quantizer.books={books}", f"quantizer.rates=[{books},{fewer}]"]
    settings += [f"pretrain.samples={4 * steps}", f"autoencode.samples={8 * steps}", f"finetune.samples={4 * steps}"]
    settings += ["parallel.threads=1", "parallel.device=cpu", "log.samples_every=0"]
    spresso("prepare", "demo", *settings)
    for stage in ("pretrain", "autoencode", "quantize", "finetune"):
        spresso("train", "demo", f"stage={stage}", *settings)


def systems(folder: Path) -> list[tuple[str, str, Through]]:
    """Return title, rate in kbps and function (2, samples) → (2, samples) of each line of the table."""
    two, one = (SPresso.from_pretrained(folder / kind / "finetune" / "export") for kind in BOOKS)
    rows: list[tuple[str, str, Through]] = [
        ("the sound mixed to one channel", "", lambda audio_2S: audio_2S.mean(0, keepdim=True).expand(2, -1)),
        ("AudioAE alone, mid and side", "", lambda audio_2S: _apart(two, audio_2S)),
        ("AudioAE alone, both together", "", lambda audio_2S: _alone(one, audio_2S)),
    ]
    for several, all_of_them in zip(*BOOKS.values(), strict=True):
        for title, codec, books in (("mid and side", two, several), ("both together", one, all_of_them)):
            rate = f"{(2 if codec is two else 1) * codec.kbps(books):.2f}"
            rows.append(
                (f"{title}, {books} books a row", rate, lambda audio_2S, c=codec, b=books: _coded(c, audio_2S, b))
            )
    return rows


@torch.inference_mode()
def _coded(codec: SPresso, audio_2S: Tensor, books: int) -> Tensor:
    """Encode to a stream and decode it; two mono codes are mid and side for every sound."""
    layout = "mid_side" if codec.autoencoder.channels == 1 else "auto"
    return codec.decode(codec.encode(audio_2S, books=books, channels=layout), seed=0)


@torch.inference_mode()
def _alone(codec: SPresso, audio_CS: Tensor) -> Tensor:
    levelled_CS, gain_db = level(audio_CS)
    decoded_CS = codec.autoencoder.decode(codec.autoencoder.encode(levelled_CS[None]))[0]
    return decoded_CS[:, : audio_CS.shape[1]] * 10 ** (-gain_db / 20)


def _apart(codec: SPresso, audio_2S: Tensor) -> Tensor:
    mid_1S, side_1S = (_alone(codec, (audio_2S[:1] + sign * audio_2S[1:]) / 2) for sign in (1, -1))
    return torch.cat([mid_1S + side_1S, mid_1S - side_1S])


def scores(sounds: list[Tensor], through: Through) -> list[str]:
    """Return the cells of a line: each figure's mean over the sounds, and its standard error."""
    found: dict[str, list[float]] = {figure: [] for figure in FIGURES}
    for audio_2S in sounds:
        decoded_2S = through(audio_2S)
        sounding = sounding_channels(audio_2S)
        log_mel = log_mel_distance(audio_2S[sounding], decoded_2S[sounding], RATE).mean()
        for figure, value in (stereo_errors(audio_2S, decoded_2S, RATE) | {"log_mel": float(log_mel)}).items():
            found[figure].append(value)
    return [_cell(found[figure]) for figure in FIGURES]


def _cell(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values) / len(values) ** 0.5:.3f}"


if __name__ == "__main__":
    main()
