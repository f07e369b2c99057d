"""Measure what a codec could copy from its training set: python benchmarks/nearest.py LATENTS [--frames 100].

Each block of a held-out clip is replaced by the nearest block of the training set, which may begin at any frame, and
the result is decoded by the AudioAE. Its log-mel distance to the true sounds tells how much of a low rate's quality may
come from sounds that are nearly the same in both parts of the set. The number of such a block takes log2(blocks) bits.
A codec of one z a second compares with blocks of 100 frames, at 100 frames a second.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import conv1d

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from models.backbones.pretrained import load_autoencoder  # noqa: E402
from trainer.data.shard_set import ShardSet, open_set  # noqa: E402
from trainer.evaluate.bootstrap import interval, mean_replicates  # noqa: E402
from trainer.evaluate.figures import log_mel_distance  # noqa: E402
from trainer.progress import Progress  # noqa: E402


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("latents", type=Path, help="a folder with `train/` and `test/`")
    parser.add_argument("--frames", type=int, default=100, help="frames of a block (default: %(default)s)")
    parser.add_argument("--clips", type=int, default=125, help="held-out clips (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="default: %(default)s")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    train, test = (open_set(str(options.latents / part)) for part in ("train", "test"))
    autoencoder = load_autoencoder(**train.info.ae_options)
    ids = [int(id_) for id_ in np.linspace(0, len(test) - 1, min(options.clips, len(test)))]
    audio_B1S = torch.stack([torch.from_numpy(test.audio(id_)).float().reshape(1, -1) for id_ in ids])
    x0_BCT = autoencoder.encode(audio_B1S)
    wanted = x0_BCT.shape[-1] // options.frames * options.frames
    blocks_NCF = x0_BCT[..., :wanted].unflatten(2, (-1, options.frames)).transpose(1, 2).flatten(0, 1)
    found_NCF, count = nearest(blocks_NCF, train)
    found_BCT = found_NCF.unflatten(0, (len(ids), -1)).transpose(1, 2).flatten(2)
    decoded_B1S = autoencoder.decode(found_BCT)
    length = min(audio_B1S.shape[-1], decoded_B1S.shape[-1])
    pair = (audio_B1S[:, 0, :length], decoded_B1S[:, 0, :length])
    distances = log_mel_distance(*pair, autoencoder.sample_rate).double().numpy()
    low, high = interval(mean_replicates(distances)) or (math.nan, math.nan)
    print(
        f"{len(blocks_NCF)} blocks of {options.frames} frames, each the nearest of {count} ({math.log2(count):.1f} "
        f"bits): log-mel {distances.mean():.2f} dB [{low:.2f}, {high:.2f}]; below 1 dB: {(distances < 1).sum()} clips"
    )


def nearest(blocks_NCF: Tensor, train: ShardSet) -> tuple[Tensor, int]:
    """Return the nearest block of the training set for each block, (N, C, F), and how many were compared."""
    frames, count = blocks_NCF.shape[-1], 0
    best_N = torch.full((len(blocks_NCF),), math.inf)
    found_NCF = torch.empty_like(blocks_NCF)
    own_N1 = blocks_NCF.square().sum((1, 2))[:, None]
    with Progress("nearest", total=len(train), unit="clips") as progress:
        for id_ in range(len(train)):
            x0_CT = torch.from_numpy(np.array(train.latents([id_])[0])).float()
            if x0_CT.shape[1] < frames:
                continue
            energy_P = conv1d(x0_CT.square().sum(0)[None, None], torch.ones(1, 1, frames))[0, 0]
            distances_NP = own_N1 + energy_P - 2 * conv1d(x0_CT[None], blocks_NCF)[0]
            least_N, place_N = distances_NP.min(1)
            for row in (least_N < best_N).nonzero()[:, 0].tolist():
                place = int(place_N[row])
                best_N[row], found_NCF[row] = least_N[row], x0_CT[:, place : place + frames]
            count += len(energy_P)
            progress.to(id_ + 1)
    return found_NCF, count


if __name__ == "__main__":
    main()
