"""Measure what each part of step 1 brings to z: python benchmarks/ablation.py FOLDER [--audio SOUNDS] [--steps 500].

Each row trains `autoencode` of the demo's recipe with one thing changed, from the same D, with the same number of
steps, once for each seed. The figures are those of held-out clips against the true sounds: log-mel of decodes from z,
and from z at three rates of plain residual codebooks, which are fitted on z of the training set in the same way for
each row. The rows of an AudioAE share its latents and its D. A row that FOLDER already holds is not trained again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from models.codec import SPresso  # noqa: E402
from models.quantizers.residual import ResidualQuantizer  # noqa: E402
from trainer.data.shard_set import ShardSet, open_set  # noqa: E402
from trainer.evaluate.figures import log_mel_distance  # noqa: E402
from trainer.formatting import aligned  # noqa: E402

BOOKS, SIZE = (2, 6, 15), 256
"""Numbers of codebooks of 8 bits: 16, 48 and 120 bits a z."""
VECTORS = 30_000
CLIPS = 40


@dataclass(frozen=True)
class Row:
    """A line of the table: an AudioAE, and the settings in which it differs from the recipe's."""

    title: str
    autoencoder: str
    settings: tuple[str, ...] = ()


_SIGNED = ("latent_encoder.magnitudes=true",)
_BEFORE = ("latent_encoder.pool=average", "latent_encoder.start=random")
ROWS = (
    Row("signed; average, random start (0.1.0)", "spectral", (*_SIGNED, *_BEFORE)),
    Row("signed; places", "spectral", (*_SIGNED, "latent_encoder.start=random")),
    Row("signed; average, PCA", "spectral", (*_SIGNED, "latent_encoder.pool=average")),
    Row("signed; places, PCA", "spectral", _SIGNED),
    Row("magnitudes; average, random start", "magnitude", _BEFORE),
    Row("magnitudes; places", "magnitude", ("latent_encoder.start=random",)),
    Row("magnitudes; average, PCA", "magnitude", ("latent_encoder.pool=average",)),
    Row("magnitudes; places, PCA", "magnitude"),
    Row("  whitening 0.5", "magnitude", ("latent_encoder.whitening=0.5",)),
    Row("  whitening 1", "magnitude", ("latent_encoder.whitening=1",)),
    Row("  one frame a token instead of three", "magnitude", ("latent_encoder.patch_size=1",)),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for the runs and the figures")
    parser.add_argument("--audio", type=Path, help="sounds to train on (default: the demo's, which are synthesised)")
    parser.add_argument("--steps", type=int, default=500, help="steps of `autoencode` (default: %(default)s)")
    parser.add_argument("--pretrain", type=int, default=750, help="steps of `pretrain` (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each row (default: %(default)s)")
    parser.add_argument("--only", nargs="+", type=int, help="numbers of rows, from 0")
    options = parser.parse_args()
    torch.set_num_threads(1)
    store = options.folder / "figures.json"
    figures = json.loads(store.read_text()) if store.exists() else {}
    for seed in range(options.seeds):
        for number, row in enumerate(ROWS):
            key = f"{row.autoencoder} {' '.join(row.settings)} steps={options.steps} seed={seed}"
            if key in figures or (options.only and number not in options.only):
                continue
            prepare(options, row.autoencoder)
            figures[key] = scores(*trained(options, row, number, seed))
            store.write_text(json.dumps(figures, indent=1))
            print(row.title, f"seed {seed}:", figures[key], flush=True)
    show(figures, options)


def spresso(*arguments: object) -> None:
    """Run a command of the product; its output goes to standard error."""
    threads = {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "launch.cli", *map(str, arguments)]
    subprocess.run(command, check=True, cwd=ROOT, env=os.environ | threads, stdout=sys.stderr)


def base(options: argparse.Namespace, autoencoder: str) -> Path:
    """Return the folder of an AudioAE's latents and D."""
    return options.folder.resolve() / autoencoder


def common(options: argparse.Namespace, autoencoder: str) -> list[str]:
    """Return the settings that all runs with an AudioAE share."""
    sounds = options.audio.resolve() if options.audio else options.folder.resolve() / "sounds"
    steps = [f"pretrain.samples={8 * options.pretrain}", f"autoencode.samples={8 * options.steps}"]
    quiet = ["parallel.threads=1", "log.samples_every=0", f"checkpoint.every={8 * options.steps}"]
    latents = base(options, autoencoder) / "latents"
    return [f"autoencoder.kind={autoencoder}", f"data.audio={sounds}", f"data.latents={latents}", *steps, *quiet]


def prepare(options: argparse.Namespace, autoencoder: str) -> None:
    """Make the latents and the D of an AudioAE, unless they are there."""
    folder = base(options, autoencoder)
    if (folder / "pretrain" / "export").exists():
        return
    if options.audio is None:
        spresso("synth", options.folder.resolve() / "sounds", "--hours", 0.6)
    spresso("prepare", "demo", f"run_dir={folder}", *common(options, autoencoder))
    spresso("train", "demo", "stage=pretrain", f"run_dir={folder}", *common(options, autoencoder))


def trained(options: argparse.Namespace, row: Row, number: int, seed: int) -> tuple[Path, Path]:
    """Train a row; return its export and the latents."""
    run, folder = options.folder.resolve() / f"row_{number:02d}_{options.steps}_{seed}", base(options, row.autoencoder)
    settings = [f"run_dir={run}", f"seed={seed}", f"pretrained.folder={folder / 'pretrain' / 'export'}"]
    spresso("train", "demo", "stage=autoencode", *settings, *common(options, row.autoencoder), *row.settings)
    return run / "autoencode" / "export", folder / "latents"


@torch.inference_mode()
def scores(export: Path, latents: Path) -> dict[str, float]:
    """Return the figures of a codec on held-out clips, decoded with the same noise for every codec."""
    codec, test = SPresso.from_pretrained(export), open_set(str(latents / "test"))
    ids = [int(id_) for id_ in np.linspace(0, len(test) - 1, CLIPS)]
    audio_B1S = torch.stack([torch.from_numpy(test.audio(id_)).float().reshape(1, -1) for id_ in ids])
    z_BZN, vectors_NZ = (
        codec.audio_to_z(audio_B1S),
        torch.cat(list(_z_vectors(codec, open_set(str(latents / "train"))))),
    )
    noise = codec.noise(list(range(CLIPS)), z_BZN.shape[-1])

    def log_mel(z_BZN: Tensor) -> float:
        decoded_B1S = codec.z_to_audio(z_BZN, noise)[..., : audio_B1S.shape[-1]]
        return log_mel_distance(audio_B1S[:, 0], decoded_B1S[:, 0], codec.autoencoder.sample_rate).mean().item()

    quantizer = ResidualQuantizer(z_BZN.shape[1], BOOKS[-1], SIZE, beam=16)
    quantizer.fit(vectors_NZ, seed=0)
    share = torch.linalg.eigvalsh(vectors_NZ.double().T.cov()).flip(0)
    found = {"z": log_mel(z_BZN), "wrong z": log_mel(z_BZN.roll(1, 0))}
    found["directions"] = int((share.cumsum(0) < 0.99 * share.sum()).sum()) + 1
    for books in BOOKS:
        codes_BNM = quantizer.encode(z_BZN.transpose(1, 2), books=books)
        found[f"{books * 8} bits"] = log_mel(quantizer.decode(codes_BNM).transpose(1, 2))
    return {name: round(value, 4) for name, value in found.items()}


def _z_vectors(codec: SPresso, train: ShardSet) -> Iterator[Tensor]:
    """Yield z (N, Z) of the training clips, from a drawn frame on, until there are `VECTORS`."""
    pooling, places, count = codec.config.latent_encoder.pooling, np.random.default_rng(0), 0
    while count < VECTORS:
        x0_CT = torch.from_numpy(np.array(train.latents([int(places.integers(len(train)))])[0])).float()
        first = int(places.integers(pooling))
        last = first + (x0_CT.shape[1] - first) // pooling * pooling
        yield codec.g(x0_CT[None, :, first:last])[0].T
        count += (last - first) // pooling


def show(figures: dict[str, dict[str, float]], options: argparse.Namespace) -> None:
    """Print the table: means over the seeds, with half the range between them."""
    columns = ("z", *(f"{books * 8} bits" for books in BOOKS), "wrong z", "directions")
    lines = [("", *columns)]
    for row in ROWS:
        keys = [
            f"{row.autoencoder} {' '.join(row.settings)} steps={options.steps} seed={n}" for n in range(options.seeds)
        ]
        if found := [figures[key] for key in keys if key in figures]:
            lines.append((row.title, *(_mean(column, [one[column] for one in found]) for column in columns)))
    print(f"\n{datetime.now(UTC).date()}, {platform.machine()}, torch {torch.__version__}, {options.steps} steps\n")
    print(aligned(lines))


def _mean(column: str, values: list[float]) -> str:
    if column == "directions":
        return f"{statistics.mean(values):.0f}"
    return f"{statistics.mean(values):.2f} ± {(max(values) - min(values)) / 2:.2f}"


if __name__ == "__main__":
    main()
