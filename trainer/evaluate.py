"""Figures of a trained codec on held-out clips, between a ceiling and two floors.

The ceiling is the AudioAE alone; the floors are a decode from another clip's z, which tells "follows the source" from
"plausible", and an unconditional sample.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models import bitstream
from models.codec import Sampling, SPresso
from trainer.config import Config, fingerprint, flatten
from trainer.data.audio import write_audio
from trainer.figures import FIGURES, clip_figures, mel_statistics, set_figures
from trainer.progress import Progress
from trainer.run import RunDirectory, held_out_set, read_json, stage_folder, stage_inputs, write_atomically
from trainer.text import aligned

CLIPS_AT_ONCE = 8
TIMED_CLIPS = 3
LEVELS = 8  # of noise, at which the denoising error is taken
NOISE_SEED = 500_000  # of that noise: another one than the decodes start from
_OTHER_SEED = 1_000_003  # decode n of a clip draws its noise from clip seed + n · this


@dataclasses.dataclass
class System:
    """A column of the table and the page."""

    key: str
    title: str
    role: str
    """`original`, `ceiling`, `system` or `floor`."""
    detail: str = ""
    note: str = ""
    payload_kbps: float | None = None
    file_kbps: float | None = None
    page: bool = True
    """Whether the page plays it, or only the table has it."""


@dataclasses.dataclass
class Clips:
    """Held-out clips, levelled: audio (B, 1, samples), and what their JSON says."""

    audio_B1S: Tensor
    sample_rate: int
    metadata: list[dict[str, Any]]
    keys: list[str]

    def seeds(self, take: int = 0) -> list[int]:
        """A seed a clip, another one for each take."""
        return [index + take * _OTHER_SEED for index in range(len(self.keys))]


def evaluate(config: Config) -> dict[str, Any]:
    """Score the run's codec; writes `evaluate/evaluation.json` and the audio that the page plays; returns the report.

    Raises:
        ValueError: a stage has not ended yet.
    """
    folder = stage_folder(config, "evaluate")
    identity = evaluation_identity(config)
    report = read_json(folder / "evaluation.json")
    if report.get("identity") == identity:
        return report
    device = "cuda" if torch.cuda.is_available() and config.parallel.device != "cpu" else "cpu"
    with torch.inference_mode():
        report = _Evaluation(config, folder, torch.device(device)).run()
    write_atomically(folder / "evaluation.json", json.dumps(report | {"identity": identity}, indent=1))
    return report


def evaluation_identity(config: Config) -> str:
    """Changes with all that the figures depend on: the models, how they decode, and which clips.

    Raises:
        ValueError: a stage has not ended, or not since the one before it was trained on.
    """
    models = {}
    for stage in ("autoencode", "quantize", "finetune"):
        directory = RunDirectory(stage_folder(config, stage), stage)
        models[stage] = directory.status.get("export")
        if models[stage] is None:
            raise ValueError(f"evaluate builds on the stage {stage}, which has not ended yet: run that first")
        directory.require_same(config, stage_inputs(config, stage))
    of_figures = ("evaluate.", "sampling.", "data.latents", "data.clip_seconds")
    chosen = {key: value for key, value in flatten(config).items() if key.startswith(of_figures)}
    return fingerprint(chosen | models)


class _Evaluation:
    """One pass over the systems; each decodes all clips, is scored, and leaves the page's audio."""

    def __init__(self, config: Config, folder: Path, device: torch.device) -> None:
        self.config, self.folder, self.device = config, folder, device
        for kind in ("audio", "streams"):
            (folder / kind).mkdir(parents=True, exist_ok=True)
        self.sampling = Sampling(**dataclasses.asdict(config.sampling))
        self.clips = load_clips(config, device)
        self.statistics = self._statistics(self.clips.audio_B1S)
        self.systems: list[System] = []
        self.results: dict[str, dict[str, dict[str, Any]]] = {}
        self.audio: dict[str, dict[str, list[str]]] = {key: {} for key in self.clips.keys}

    def run(self) -> dict[str, Any]:
        """All systems, then the speed."""
        units = 5 + 2 * len(self.config.rates) + 1
        with Progress("evaluate", total=units, unit="systems") as progress:
            for done, system in enumerate(self._passes(), start=1):
                progress.to(done, last=system)
            speed = self._speed()
            progress.to(units)
        return self._report(speed)

    def _passes(self) -> Iterator[str]:
        yield self._add(System("original", "Original", "original"), [self.clips.audio_B1S])
        autoencoded = self._codec("autoencode")
        yield self._add(
            System(
                "autoencoder", "AudioAE alone", "ceiling", note="No codec is better than the autoencoder it stands on."
            ),
            [self._in_batches(lambda audio, _: autoencoded.autoencoder.decode(autoencoded.autoencoder.encode(audio)))],
        )
        z = self._in_batches(lambda audio, _: autoencoded.audio_to_z(audio))
        width = autoencoded.config.latent_encoder.z_channels
        detail = f"{autoencoded.z_rate:.1f} Hz × {width}, {autoencoded.compression:.0f}×"
        system = System("z", "Continuous z", "system", detail)
        yield self._add(system, self._takes(autoencoded, z), self._denoising(autoencoded, z))
        for stage in ("finetune", "quantize"):
            for books in self.config.rates:
                yield self._add(*self._quantized(self._codec(stage), stage, books))
        others = z.roll(1, 0)
        note = "Decoded from the z of the next clip: what is gained by following the source."
        system = System("z_other", "Another clip's z", "floor", note=note)
        yield self._add(system, [self._decode(autoencoded, others)], self._denoising(autoencoded, others))
        note = "Decoded from no z at all: what the decoder makes up by itself."
        nothing = self._decode(autoencoded, None, z_frames=z.shape[-1])
        system = System("unconditional", "Unconditional", "floor", note=note)
        yield self._add(system, [nothing], self._denoising(autoencoded, None))

    def _quantized(self, codec: SPresso, stage: str, books: int) -> tuple[System, list[Tensor], Tensor]:
        """z_q at one rate, through real files, by the decoder after or before finetuning."""
        codes, sizes = [], []
        for index, audio_1S in enumerate(self.clips.audio_B1S):
            stream = codec.encode(audio_1S, books=books)
            content = bitstream.write(stream)
            (self.folder / "streams" / f"{self.clips.keys[index]}.{books}.spr").write_bytes(content)
            sizes.append(len(content))
            codes.append(torch.from_numpy(bitstream.read(content, frames_of=codec.z_frames).codes)[0])
        assert codec.quantizer is not None
        z_q = codec.quantizer.decode(torch.stack(codes).to(self.device)).transpose(1, 2)
        seconds = self.clips.audio_B1S.shape[-1] / codec.autoencoder.sample_rate
        finetuned = stage == "finetune"
        system = System(
            key=f"zq{books}" + ("" if finetuned else "_before"),
            title=f"{codec.kbps(books):.2g} kbps" + ("" if finetuned else ", before finetuning"),
            role="system",
            detail=f"{books} × {codec.quantizer.bits(1)} bits at {codec.z_rate:.1f} Hz",
            payload_kbps=codec.kbps(books),
            file_kbps=sum(sizes) * 8 / (len(sizes) * seconds) / 1000,
            page=finetuned,
        )
        takes = self._takes(codec, z_q) if finetuned else [self._decode(codec, z_q)]
        return system, takes, self._denoising(codec, z_q)

    def _takes(self, codec: SPresso, z_BZN: Tensor) -> list[Tensor]:
        """A decode of all clips, then further ones of the page's clips alone."""
        further = range(1, self.config.evaluate.decodes)
        chosen = z_BZN[: self.config.evaluate.page_clips]
        return [self._decode(codec, z_BZN), *(self._decode(codec, chosen, take=take) for take in further)]

    def _decode(self, codec: SPresso, z_BZN: Tensor | None, *, take: int = 0, z_frames: int = 0) -> Tensor:
        z_frames = z_frames if z_BZN is None else z_BZN.shape[-1]

        def decode(audio: Tensor, rows: slice) -> Tensor:
            noise = codec.noise(self.clips.seeds(take)[rows], z_frames)
            z_part = None if z_BZN is None else z_BZN[rows]
            return codec.z_to_audio(z_part, noise, sampling=self.sampling)[..., : audio.shape[-1]]

        return self._in_batches(decode, clips=len(self.clips.keys) if z_BZN is None else len(z_BZN))

    def _denoising(self, codec: SPresso, z_BZN: Tensor | None) -> Tensor:
        """The error that training minimises, of each clip (B,): at evenly filled noise levels, always the same noise.

        In windows as long as in training; what fills none at a clip's end is left out.
        """
        pooling = codec.config.latent_encoder.pooling
        z_each = codec.config.window // pooling

        def error(audio: Tensor, rows: slice) -> Tensor:
            x0_BCT = codec.autoencoder.encode(audio)
            frames = min(z_each, x0_BCT.shape[-1] // pooling) * pooling
            x0_WCT = _windows(x0_BCT, frames)
            condition = None if z_BZN is None else codec.f(_windows(z_BZN[rows], frames // pooling)[: len(x0_WCT)])
            noise_WCT = codec.noise([NOISE_SEED + n for n in range(len(x0_WCT))], frames // pooling)
            errors = []
            for level in range(LEVELS):
                u_W = torch.full((len(x0_WCT),), (level + 0.5) / LEVELS, device=audio.device)
                t_W = codec.diffusion.noise_level(u_W)
                network = functools.partial(codec.dit, condition=condition)
                errors.append(codec.diffusion.loss(network, x0_WCT, noise_WCT.roll(level, -1), t_W))
            return torch.stack(errors).mean(0).unflatten(0, (-1, len(audio))).mean(0)

        return self._in_batches(error)

    def _in_batches(self, compute: Callable[[Tensor, slice], Tensor], clips: int | None = None) -> Tensor:
        clips = clips or len(self.clips.keys)
        rows = [slice(start, min(start + CLIPS_AT_ONCE, clips)) for start in range(0, clips, CLIPS_AT_ONCE)]
        return torch.cat([compute(self.clips.audio_B1S[part], part) for part in rows])

    def _add(self, system: System, takes: list[Tensor], denoising_B: Tensor | None = None) -> str:
        """Score a system by its first take, and keep the page's audio of all takes."""
        length = self.clips.audio_B1S.shape[-1]
        self.systems.append(system)
        if system.role != "original":
            self.results[system.key] = self._score(takes[0][..., :length], denoising_B)
        if system.page:
            for index, key in enumerate(self.clips.keys[: self.config.evaluate.page_clips]):
                names = [self._write(system, key, take, audio[index, 0, :length]) for take, audio in enumerate(takes)]
                self.audio[key][system.key] = names
        return system.title

    def _write(self, system: System, key: str, take: int, audio_S: Tensor) -> str:
        name = f"audio/{key}.{system.key}.{take}.flac"
        write_audio(self.folder / name, audio_S[None].cpu().numpy(), self.clips.sample_rate)
        return name

    def _score(self, audio_B1S: Tensor, denoising_B: Tensor | None) -> dict[str, dict[str, Any]]:
        """Of each figure its mean and deviation over the clips and, where it has them, each clip's own."""
        rows = [
            clip_figures(original[0], decoded[0], self.clips.sample_rate)
            for original, decoded in zip(self.clips.audio_B1S, audio_B1S, strict=True)
        ]
        of_clips = {key: torch.stack([row[key].float() for row in rows]) for key in rows[0]}
        if denoising_B is not None:
            of_clips["denoising"] = denoising_B
        scores: dict[str, dict[str, Any]] = {
            key: {"mean": float(values.mean()), "std": float(values.std()), "clips": values.tolist()}
            for key, values in of_clips.items()
        }
        for key, value in set_figures(self.statistics, self._statistics(audio_B1S)).items():
            scores[key] = {"mean": value, "std": None}
        return scores

    def _statistics(self, audio_B1S: Tensor) -> Tensor:
        return torch.cat([mel_statistics(audio_1S[0], self.clips.sample_rate) for audio_1S in audio_B1S])

    def _codec(self, stage: str) -> SPresso:
        return SPresso.from_pretrained(stage_folder(self.config, stage) / "export", device=self.device)

    def _speed(self) -> dict[str, Any]:
        """Real-time factors of the codec as it is used: a clip at a time, from audio to a stream and back."""
        codec = self._codec("finetune")
        clips = self.clips.audio_B1S[:TIMED_CLIPS]
        encoding, streams = _timed(lambda: [codec.encode(audio_1S) for audio_1S in clips], self.device)
        decoding, _ = _timed(lambda: [codec.decode(stream, sampling=self.sampling) for stream in streams], self.device)
        seconds = clips.shape[0] * clips.shape[-1] / self.clips.sample_rate
        where = (
            torch.cuda.get_device_name() if self.device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
        )
        return {
            "encode_realtime_factor": round(seconds / encoding, 2),
            "decode_realtime_factor": round(seconds / decoding, 2),
            "steps": self.sampling.steps,
            "device": where,
        }

    def _report(self, speed: dict[str, Any]) -> dict[str, Any]:
        page_clips = self.clips.keys[: self.config.evaluate.page_clips]
        seconds = self.clips.audio_B1S.shape[-1] / self.clips.sample_rate
        return {
            "recipe": self.config.name,
            "model_hash": self._codec("finetune").model_hash,
            "created": datetime.now(UTC).date().isoformat(),
            "sample_rate": self.clips.sample_rate,
            "subtitle": f"{len(self.clips.keys)} held-out clips of {seconds:.1f} s, which no stage saw",
            "systems": [dataclasses.asdict(system) for system in self.systems],
            "figures": [dataclasses.asdict(figure) for figure in FIGURES.values()],
            "results": self.results,
            "clips": [
                {"key": key, "caption": metadata.get("caption", ""), "seconds": seconds, "audio": self.audio[key]}
                for key, metadata in zip(page_clips, self.clips.metadata, strict=False)
            ],
            "speed": speed,
        }


def load_clips(config: Config, device: torch.device) -> Clips:
    """Held-out clips, spread evenly over the set; the page's, spread likewise, come first."""
    shards = held_out_set(config)
    count = min(config.evaluate.clips or len(shards), len(shards))
    if count < 2:
        raise ValueError(
            f"{shards.location} holds {len(shards)} clip(s), figures need 2: raise data.holdout or add sounds"
        )
    ids = [round(index * (len(shards) - 1) / (count - 1)) for index in range(count)]
    of_page = ids[:: max(1, count // config.evaluate.page_clips)][: config.evaluate.page_clips]
    ids = of_page + [id_ for id_ in ids if id_ not in of_page]
    metadata = [shards.metadata(id_) for id_ in ids]
    length = round((config.evaluate.seconds or config.data.clip_seconds) * shards.info.sample_rate)
    audio = [torch.from_numpy(shards.audio(id_))[:, :length] for id_ in ids]
    if (shortest := min(clip.shape[1] for clip in audio)) < max(clip.shape[1] for clip in audio):
        seconds = shortest / shards.info.sample_rate
        raise ValueError(f"{shards.location} holds clips of {seconds:.2f} s: set evaluate.seconds to that or less")
    rate = shards.info.sample_rate
    return Clips(torch.stack(audio).to(device), rate, metadata, [f"clip_{id_:05d}" for id_ in ids])


def table(report: dict[str, Any]) -> str:
    """The report's figures as lines of text, a system a line."""
    keys = [figure["key"] for figure in report["figures"]]
    units = {figure["key"]: figure["unit"] for figure in report["figures"]}
    digits = {figure["key"]: figure["digits"] or 2 for figure in report["figures"]}
    head = ["system", "kbps", *(f"{key} {units[key]}".strip() for key in keys)]
    rows = [head]
    for system in report["systems"]:
        scores = report["results"].get(system["key"])
        if scores is not None:
            rate = "" if system["payload_kbps"] is None else f"{system['payload_kbps']:.3f}"
            cells = (f"{scores[key]['mean']:.{digits[key]}f}" if key in scores else "" for key in keys)
            rows.append([system["title"], rate, *cells])
    lines = [aligned(rows, right=range(1, len(head)))]
    speed = report["speed"]
    lines.append(
        f"encode {speed['encode_realtime_factor']}× and decode {speed['decode_realtime_factor']}× as fast as it sounds "
        f"({speed['steps']} steps, {speed['device']})"
    )
    return "\n".join(lines)


def _windows(x_BCT: Tensor, length: int) -> Tensor:
    """Whole windows of (B, C, T), one after another: (windows · B, C, length), all clips' first ones first."""
    count = x_BCT.shape[-1] // length
    return x_BCT[..., : count * length].unflatten(-1, (count, length)).permute(2, 0, 1, 3).flatten(0, 1)


def _timed(work: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    work()  # once to warm up
    start = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, result
