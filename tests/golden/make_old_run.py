"""Makes `old_run/`: a run of all stages, as the code of commit 42d8df6217d5719a13a3a5af050dccb070008ba3 leaves it.

    cd EMPTY_FOLDER && PYTHONPATH=CHECKOUT_OF_THAT_COMMIT python CHECKOUT_OF_TODAY/tests/golden/make_old_run.py

Each checkpoint records the folder in which it was written, so run this in one that names neither a user nor a machine.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import soundfile
import torch
from torch import nn

CLIP_SECONDS, CROP_FRAMES, SOUNDS = 0.19, 18, 13
SAMPLES = 64  # of every trained stage
RUN = Path("runs/old")
STAGES = ("pretrain", "autoencode", "quantize", "prior", "finetune")
STREAMS = {"plain": ("--no-entropy-coding", "--books", "2", "--channels", "separate"), "entropy_coded": ()}
"""The streams, and the options of `spresso encode` that they were made with."""

_STAGE = f"{{samples: {SAMPLES}, global_batch: 4, lr: 0.01, warmup: 8, ema_halflife: 2, crop_frames: {CROP_FRAMES}}}"
_RECIPE = f"""
name: old
data: {{clip_seconds: {CLIP_SECONDS}, holdout: 0.2, workers: 1}}
dit: {{width: 8, depth: 1, multistream_depth: 0, heads: 1, hidden_width: 8, time_features: 8}}
latent_encoder: {{width: 8, encoder_depth: 1, upsampler_depth: 1, heads: 1, z_channels: 4}}
lora: {{rank: 1, alpha: 1}}
quantizer: {{books: 3, size: 8, rates: [3, 1], vectors: 320, beam: 2, candidates: 4, depth: 1, embedding: 4, hidden: 8}}
parallel: {{device: cpu, threads: 1}}
log: {{every: 16, samples_every: 0, clips: 1, held_out: 2, bins: 2}}
checkpoint: {{every: {SAMPLES // 2}}}
sampling: {{steps: 4}}
evaluate: {{clips: 2, page_clips: 1, decodes: 1, seconds: 0.1}}
""" + "".join(f"{stage}: {_STAGE}\n" for stage in STAGES)
_KEPT = (
    *("config.yaml", "latents/report.json", "latents/*/*", "evaluate/evaluation.json", "evaluate/audio/*/*"),
    *("*/config.yaml", "*/inputs.json", "*/status.json", "*/metrics.jsonl", "*/export/*"),
    *(f"*/checkpoints/step_{SAMPLES:012d}/*", f"pretrain/checkpoints/step_{SAMPLES // 2:012d}/*"),
    f"autoencode/checkpoints/step_{SAMPLES // 2:012d}/*",
)


def numerics() -> str:
    """A hash of what a few training steps of a small network come to: another kind of CPU rounds differently."""
    generator = torch.Generator().manual_seed(0)
    layers = nn.Linear(128, 8), nn.TransformerEncoderLayer(8, 1, 8, 0.0, "gelu", batch_first=True), nn.Linear(8, 128)
    network = nn.Sequential(*layers)
    for value in network.parameters():
        value.data = torch.rand(value.shape, generator=generator) - 0.5
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.01)
    for _ in range(8):
        x_BTC = torch.randn(4, CROP_FRAMES, 128, generator=generator)
        (network(x_BTC) - x_BTC).square().mean().backward()
        optimizer.step()
    return hashlib.sha256(b"".join(value.detach().numpy().tobytes() for value in network.parameters())).hexdigest()


def decoded_samples(path: Path) -> tuple[str, np.ndarray]:
    """SHA-256 of a sound file's samples, and some of them: every 31st, so that all frequencies are heard in them."""
    samples = soundfile.read(path, dtype="int32")[0]
    return hashlib.sha256(samples.tobytes()).hexdigest(), (samples[::31] / 2**31).astype(np.float32)


def _make_sounds() -> None:
    """Short ones to learn from in `sounds/`, and a stereo clip to encode: a quiet one, as this D decodes far louder."""
    _spresso("synth", "synthesized", "--hours", "0.014", "--workers", "1")
    Path("sounds").mkdir()
    for number, path in enumerate(sorted(Path("synthesized").glob("*.flac"))[:SOUNDS]):
        sound, rate = soundfile.read(path)
        soundfile.write(f"sounds/sound_{number}.flac", sound[: int(CLIP_SECONDS * rate)], rate)
    sound, rate = soundfile.read("synthesized/metal_00001.flac")  # whose codes this run's prior expects
    length = int(1.4 * rate)
    soundfile.write("clip.flac", 0.005 * np.stack([sound[:length], sound[-length:]], axis=1), rate, subtype="PCM_16")


def _make_run() -> None:
    Path("recipe.yaml").write_text(_RECIPE)
    _spresso("prepare", "recipe.yaml", "data.audio=sounds")
    _spresso("run", "recipe.yaml")


def _make_streams(folder: Path) -> None:
    """Streams of the clip, what they decode to, and which kind of rounding that was computed with."""
    hashes = {}
    shutil.move("clip.flac", folder / "clip.flac")
    for name, options in STREAMS.items():
        stream = folder / f"{name}.spr"
        _spresso("encode", folder / "clip.flac", stream, "--codec", RUN / "finetune/export", *options)
        _spresso("decode", stream, f"{name}.wav", "--codec", RUN / "finetune/export")
        hashes[name], samples = decoded_samples(Path(f"{name}.wav"))
        np.save(folder / f"{name}.npy", samples)
    (folder / "recorded.json").write_text(json.dumps({"numerics": numerics(), "decoded": hashes}, indent=2) + "\n")


def _spresso(*arguments: object) -> None:
    from launch.cli import main

    assert main([str(argument) for argument in arguments]) == 0, arguments


def _keep(run: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    for path in sorted({path for pattern in _KEPT for path in run.glob(pattern) if path.is_file()}):
        (target / path.relative_to(run)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target / path.relative_to(run))


if __name__ == "__main__":
    torch.set_num_threads(1)
    _make_sounds()
    _make_run()
    kept = Path(__file__).parent / "old_run"
    _keep(RUN, kept)
    (kept / "streams").mkdir()
    _make_streams(kept / "streams")
