"""Measure what is heard at the seams of a long sound, where two of its windows meet.

    python benchmarks/seams.py runs/demo/finetune/export --latents runs/demo/latents/test [--clips 16]

The program joins held-out clips end to end, encodes them to z, and decodes them as one long sound twice: whole, and
with the first quarter of a window cut off, so that the windows meet at other frames. It compares the error of frames
near a seam with the error of the same frames in the other decode, where they lie inside a window; both decodes start
from the same noise, so the difference is due to the seam and not to the sound. It does so for the codec's joint
sampling and for windows that are sampled independently and cross-faded. For g it compares z near a window's end with z
of the same frames inside another window, with and without the overlap that the codec encodes with.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from models import windows
from models.codec import SPresso
from models.samplers import generate
from trainer.data.shard_set import open_set
from trainer.formatting import aligned

NEAR = 4  # frames on either side of a joint that count as being at the joint
FLOOR_DB = 60.0  # below the loudest band; quieter levels are inaudible and count as this level
SEEDS = 2

Decode = Callable[[SPresso, Tensor, Tensor], tuple[Tensor, list[int]]]


def jointly(codec: SPresso, z_1ZN: Tensor, noise_1CT: Tensor) -> tuple[Tensor, list[int]]:
    """Decode as the codec does; return x0 and the frames where windows meet in the last two steps."""
    joint = windows.JointWindows(
        codec.dit, codec.f, window=codec.config.window, pooling=codec.config.latent_encoder.pooling
    )
    met = []
    for joint.step in (0, 1):
        met += joint.starts(noise_1CT.shape[-1])[1:-1]
    return codec.z_to_x0(z_1ZN, noise_1CT), met


def cross_faded(codec: SPresso, z_1ZN: Tensor, noise_1CT: Tensor) -> tuple[Tensor, list[int]]:
    """Decode windows that overlap by a quarter independently and cross-fade them; return x0 and the middles."""
    window, pooling = codec.config.window, codec.config.latent_encoder.pooling
    begins = windows.starts(noise_1CT.shape[-1], window, int(0.75 * window) // pooling * pooling)
    rising = torch.arange(1, window + 1.0)
    weight = torch.minimum(rising, rising.flip(0)).to(noise_1CT)
    total, weights = torch.zeros_like(noise_1CT), torch.zeros_like(noise_1CT)
    for start in begins:
        part, z_part = slice(start, start + window), slice(start // pooling, (start + window) // pooling)
        condition, sampling = codec.f(z_1ZN[..., z_part]), codec.config.sampling
        x0 = generate(codec.dit, codec.diffusion, noise_1CT[..., part], {"condition": condition}, sampling=sampling)
        total[..., part] += x0 * weight
        weights[..., part] += weight
    middles = [(one + other + window) // 2 for one, other in pairwise(begins)]
    return total / weights, middles


def log_mel(codec: SPresso, x0_1CT: Tensor) -> Tensor:
    """Decode x0 to audio and return its mel spectrogram (bands, frames) in dB, with one frame per latent frame."""
    audio = codec.autoencoder.decode(x0_1CT)[0].mean(0)
    hop, rate, bands = codec.autoencoder.hop, codec.autoencoder.sample_rate, 64
    spectrum = torch.stft(audio, 4 * hop, hop, window=torch.hann_window(4 * hop).to(audio), return_complex=True)
    mel = torch.linspace(0, 2595 * torch.log10(torch.tensor(1 + rate / 2 / 700)), bands + 2)
    edges = 700 * (10 ** (mel / 2595) - 1)
    bins = torch.linspace(0, rate / 2, 2 * hop + 1)
    rising = (bins - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - bins) / (edges[2:] - edges[1:-1])[:, None]
    filters = torch.minimum(rising, falling).clamp_min(0).to(audio)
    return 10 * torch.log10(filters @ spectrum.abs().square() + 1e-9)


def near(places: list[int], frames: int) -> Tensor:
    """Return a mask (frames,) of the frames that are near a joint."""
    chosen = torch.zeros(frames, dtype=torch.bool)
    for place in places:
        chosen[max(0, place - NEAR) : place + NEAR] = True
    return chosen


def seams(codec: SPresso, decode: Decode, x0_1CT: Tensor, shift: int) -> list[str]:
    """Return a table row for one way of decoding.

    Its cells are the error (dB) at joints, the error of the same frames away from joints, the mean difference with its
    standard error, and the seconds per decode. `shift` is the number of frames that the second decode cuts off.
    """
    pooling, frames = codec.config.latent_encoder.pooling, x0_1CT.shape[-1]
    z, truth = codec.x0_to_z(x0_1CT, frames // pooling), log_mel(codec, x0_1CT)[:, :frames]
    floor, differences, at_joints, away, took = truth.max() - FLOOR_DB, [], [], [], 0.0
    for seed in range(SEEDS):
        noise, errors, met = codec.noise([seed], frames // pooling), [], []
        for cut in (0, shift):
            begun = time.perf_counter()
            x0, places = decode(codec, z[..., cut // pooling :], noise[..., cut:])
            took += time.perf_counter() - begun
            error = (log_mel(codec, x0)[:, : frames - cut].clamp_min(floor) - truth[:, cut:].clamp_min(floor)).abs()
            errors.append(error.mean(0)[shift - cut :])
            met.append(near([place + cut - shift for place in places if place + cut > shift], frames - shift))
        for own, other in ((0, 1), (1, 0)):
            joints = met[own] & ~met[other]
            at_joints.append(errors[own][joints])
            away.append(errors[other][joints])
            differences.append(errors[own][joints] - errors[other][joints])
    every = torch.cat(differences)
    # the frames of a joint are correlated, so each joint counts once
    chance = float(every.std() / (len(every) / (2 * NEAR)) ** 0.5)
    return [
        decode.__name__.replace("_", "-"),
        f"{torch.cat(at_joints).mean():.3f}",
        f"{torch.cat(away).mean():.3f}",
        f"{every.mean():+.3f} ± {chance:.3f}",
        f"{took / 2 / SEEDS:.1f}",
    ]


def ends_of_g(codec: SPresso, x0_1CT: Tensor, shift: int) -> list[list[str]]:
    """Return rows with the relative difference of z between two window grids, near a joint of either and elsewhere."""
    pooling, window, rows = codec.config.latent_encoder.pooling, codec.config.window, []
    for name, margin in (("windows that meet", 0), ("as the codec has them", windows.margin_of(window, pooling))):
        stride = window - 2 * margin
        whole = windows.encode(codec.g, x0_1CT, window=window, pooling=pooling, margin=margin)[..., shift // pooling :]
        moved = windows.encode(codec.g, x0_1CT[..., shift:], window=window, pooling=pooling, margin=margin)
        difference = (whole - moved).square().mean((0, 1)) / whole.square().mean()
        joints = torch.zeros(len(difference), dtype=torch.bool)
        for first, cut in ((margin, shift), (margin, 0)):
            places = torch.arange(first + stride, x0_1CT.shape[-1] - window, stride) - cut
            for place in (places[(places > 0) & (places < x0_1CT.shape[-1] - shift)] // pooling).tolist():
                joints[max(0, place - 1) : place + 1] = True
        inner = slice(window // pooling, -window // pooling)
        near_, else_ = difference[inner][joints[inner]], difference[inner][~joints[inner]]
        rows.append([name, f"{near_.mean().sqrt():.4f}", f"{else_.mean().sqrt():.4f}"])
    return rows


@torch.inference_mode()
def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("codec", type=Path, help="a codec's export folder")
    options.add_argument("--latents", required=True, help="a held-out set of the codec's run, such as …/latents/test")
    options.add_argument("--clips", type=int, default=16, help="clips to join (default: %(default)s)")
    given = options.parse_args()
    codec = SPresso.from_pretrained(given.codec)
    pooling, window = codec.config.latent_encoder.pooling, codec.config.window
    clips = [torch.from_numpy(clip).float() for clip in open_set(given.latents).latents(list(range(given.clips)))]
    x0_1CT = torch.cat(clips, dim=-1)[None]
    x0_1CT = x0_1CT[..., : x0_1CT.shape[-1] // pooling * pooling]
    shift = window // 4 // pooling * pooling
    head = ["windows", "error at joints, dB", "same frames, no joint", "difference", "s to decode"]
    rows = [seams(codec, decode, x0_1CT, shift) for decode in (jointly, cross_faded)]
    print(aligned([head, *rows], right=range(1, len(head))))
    head = ["g's windows", "z differs at joints by", "and elsewhere"]
    print(aligned([head, *ends_of_g(codec, x0_1CT, shift)], right=range(1, len(head))))


if __name__ == "__main__":
    main()
