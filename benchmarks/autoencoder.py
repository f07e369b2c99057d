"""Compare the AudioAEs without weights: python benchmarks/autoencoder.py FOLDER … [--clips N] [--json FILE].

Each FOLDER holds sounds, such as those of `benchmarks/debian_sounds.py` or of a demo. Files are divided by a hash of
their names: an eighth is measured, and the rest is what the variants are standardised by and what the principal
directions are fitted to. Each file gives one clip of three seconds at -23 dBFS.

The columns: the log-mel distance (dB) of a decode to the original, as `evaluate` computes it; the same with noise of
0.1, 0.3 and 0.5 on the latents; the same if each block of 9 or 100 frames is replaced by its projection on the 64
leading principal directions, a linear codec that keeps as many numbers as z; how much of the energy of a decoded click
lies more than 5 ms away, in dB; how much the envelope of a decoded sine of 440 Hz varies; how many times faster than
the sound decoding is, by CPU time.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from models.atomic_write import write_whole  # noqa: E402
from models.autoencoder import AudioAE, SpectralAE  # noqa: E402
from models.loudness import level  # noqa: E402
from models.magnitude_autoencoder import MagnitudeAE  # noqa: E402
from trainer.data.audio import read_audio  # noqa: E402
from trainer.data.find_sounds import find_audio  # noqa: E402
from trainer.evaluate.figures import log_mel_distance  # noqa: E402

RATE, SECONDS, DIRECTIONS, BATCH = 48_000, 3, 64, 8
NOISES, BLOCKS = (0.1, 0.3, 0.5), (9, 100)
VARIANTS: dict[str, Callable[[], AudioAE]] = {
    "spectral": SpectralAE,
    "magnitude": MagnitudeAE,
    "… window of 960": lambda: changed(window=960),
    "… window of 1920": lambda: changed(window=1920),
    "… 40 single bins": lambda: changed(single_bins=40),
    "… 72 single bins": lambda: changed(single_bins=72),
    "… x^0.05": lambda: changed(companding=0.05),
    "… x^0.2": lambda: changed(companding=0.2),
    "… 8 iterations": lambda: changed(iterations=8),
    "… random first phases": lambda: changed(prominence=math.inf, onset=math.inf),
}


def changed(**settings: float) -> MagnitudeAE:
    """Return a MagnitudeAE with other settings; `fit` standardises it."""
    return type("Variant", (MagnitudeAE,), settings)()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--clips", type=int, default=60, help="clips to measure on (default: %(default)s)")
    parser.add_argument("--only", nargs="+", help="variants to measure, by their names in the table")
    parser.add_argument("--json", type=Path, help="a file to write the figures to")
    options = parser.parse_args()
    torch.set_num_threads(1)
    held_out, training = divided(
        [clips(folder, 8 * options.clips // len(options.folders)) for folder in options.folders]
    )
    names = options.only or list(VARIANTS)
    with torch.inference_mode():
        rows = {name: row(VARIANTS[name](), held_out, training) for name in names}
    print(f"{datetime.now(UTC).date()}, {platform.machine()}, Python {platform.python_version()}, ", end="")
    print(f"torch {torch.__version__}; {len(held_out)} clips, {len(training)} to fit on\n")
    columns = list(next(iter(rows.values())))
    print("| AudioAE | " + " | ".join(columns) + " |\n|" + "---|" * (len(columns) + 1))
    for name, values in rows.items():
        print(f"| {name} | " + " | ".join(f"{value:.2f}" for value in values.values()) + " |")
    if options.json is not None:
        write_whole(options.json, json.dumps(rows, indent=1).encode())


def clips(folder: Path, most: int) -> dict[str, Tensor]:
    """Return the first seconds of up to `most` of a folder's sounds by their names, in an order that is a hash's."""
    by_hash = sorted(find_audio(folder), key=lambda path: digest(path.name))
    found = {}
    for path in by_hash[:most]:
        audio = level(torch.from_numpy(read_audio(path, sample_rate=RATE)).mean(0, keepdim=True))[0][0]
        clip = audio[: SECONDS * RATE]
        found[path.name] = torch.nn.functional.pad(clip, (0, SECONDS * RATE - len(clip)))
    return found


def digest(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def divided(folders: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return the clips to measure on and those to fit on, `(clips, samples)`."""
    everything = [(int(digest(name)[-4:], 16) % 8 == 0, clip) for folder in folders for name, clip in folder.items()]
    return tuple(torch.stack([clip for held_out, clip in everything if held_out == kind]) for kind in (True, False))


def row(ae: AudioAE, held_out: Tensor, training: Tensor) -> dict[str, float]:
    """Return the figures of an AudioAE by the names of their columns."""
    fitted = fit(ae, training)
    x0 = encoded(ae, held_out)
    figures = {"log-mel": distance(ae, x0, held_out)}
    generator = torch.Generator().manual_seed(0)
    for deviation in NOISES:
        noise = torch.randn(x0.shape, generator=generator)
        figures[f"noise {deviation}"] = distance(ae, x0 + deviation * noise, held_out)
    for frames in BLOCKS:
        figures[f"PCA of {frames}"] = distance(ae, projected(x0, fitted, frames), held_out)
    started = time.process_time()
    for batch in x0.split(BATCH):
        ae.decode(batch)
    speed = held_out.numel() / RATE / (time.process_time() - started)
    return figures | {"click dB": click(ae), "sine": sine(ae), "× real time": speed}


def fit(ae: AudioAE, training: Tensor) -> Tensor:
    """Standardise a variant by the training clips, and return their latents."""
    x0 = encoded(ae, training)
    if isinstance(ae, MagnitudeAE) and type(ae) is not MagnitudeAE:
        mean, spread = x0.mean((0, 2)), x0.std((0, 2))
        ae.mean, ae.spread = ae.mean + mean * ae.spread, ae.spread * spread
        x0 = (x0 - mean[:, None]) / spread[:, None]
    return x0


def encoded(ae: AudioAE, clips: Tensor) -> Tensor:
    return torch.cat([ae.encode(batch[:, None]) for batch in clips.split(BATCH)])


def distance(ae: AudioAE, x0: Tensor, clips: Tensor) -> float:
    parts = zip(x0.split(BATCH), clips.split(BATCH), strict=True)
    distances = [log_mel_distance(clip, ae.decode(part)[:, 0, : clip.shape[1]], RATE) for part, clip in parts]
    return torch.cat(distances).mean().item()


def projected(x0_BCT: Tensor, fitted_BCT: Tensor, frames: int) -> Tensor:
    """Project blocks of `frames` frames on the principal directions of those in `fitted_BCT`."""
    vectors = blocks(fitted_BCT, frames).flatten(0, 1)
    mean = vectors.mean(0)
    torch.manual_seed(0)
    directions = torch.svd_lowrank(vectors - mean, min(DIRECTIONS, len(vectors)), niter=4)[2]
    kept = (blocks(x0_BCT, frames) - mean) @ directions @ directions.T + mean
    whole = kept.unflatten(2, (frames, -1)).flatten(1, 2).transpose(1, 2)
    return torch.cat((whole, x0_BCT[..., whole.shape[2] :]), dim=2)


def blocks(x0_BCT: Tensor, frames: int) -> Tensor:
    return x0_BCT.transpose(1, 2).unfold(1, frames, frames).transpose(2, 3).flatten(2)


def click(ae: AudioAE) -> float:
    """Return the energy outside 5 ms around a click, relative to all, in dB; the mean over places in a hop."""
    shares = []
    for place in range(24_000, 24_480, 60):
        audio = torch.zeros(1, 1, RATE)
        audio[..., place] = 0.9
        energy = ae.decode(ae.encode(audio))[0, 0].square()
        shares.append(1 - (energy[place - 240 : place + 240].sum() / energy.sum()).item())
    return 10 * math.log10(max(sum(shares) / len(shares), 1e-6))


def sine(ae: AudioAE) -> float:
    """Return the standard deviation of a sine's envelope over its mean."""
    audio = 0.2 * torch.sin(2 * math.pi * 440 * torch.arange(2 * RATE) / RATE)
    inside = ae.decode(ae.encode(audio[None, None]))[0, 0, 9600:-9600]
    spectrum, bins = torch.fft.fft(inside), torch.fft.fftfreq(len(inside), 1 / RATE)
    envelope = torch.fft.ifft(torch.where((bins - 440).abs() < 60, spectrum, 0)).abs()
    return (envelope.std() / envelope.mean()).item()


if __name__ == "__main__":
    main()
