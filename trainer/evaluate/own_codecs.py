"""Our own systems: the AudioAE alone, continuous z, codes at each rate, and a control of each from another clip's z."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from models import bitstream
from models.codec import SPresso
from models.export import find_export, read_config, read_description
from models.sizes import Sampling
from trainer.evaluate.baselines.baseline import resample_mono
from trainer.evaluate.scored_clips import ScoredClips
from trainer.evaluate.systems import System, rate_range_of
from trainer.evaluate.under_test import Decoded, SystemUnderTest
from trainer.recipes.schema import Config
from trainer.recipes.values import hash_values
from trainer.run_directory import stage_folder

LEVELS = 8  # noise levels over which the denoising error is averaged
NOISE_SEED = 500_000  # for the denoising error; differs from the seeds of decodes
_KBPS = "<kbps>"  # placeholder in a title until the codec is loaded and its rate is known
VARIABLE = 4  # the most systems that are decoded several times from the same codes, as on the paper's page


class Export:
    """An exported codec, loaded when its first clip is scored. It caches each clip's z and stream."""

    def __init__(
        self,
        folder: Path,
        clips: ScoredClips,
        *,
        sampling: Sampling | None,
        device: torch.device,
        releases: Mapping[str, str | None] | None = None,
    ) -> None:
        """`releases` are the folders of `base` and `autoencoder`, if they may be elsewhere than the export says."""
        self.releases = dict(releases or {})
        self.folder, self.clips, self.device, self.asked = folder, clips, device, sampling
        self._z: dict[int, Tensor] = {}
        self._files: dict[tuple[int, int], _File] = {}

    @functools.cached_property
    def model_hash(self) -> str:
        """The hash of the model, read without loading the weights."""
        return read_description(self.folder)["model"]

    @functools.cached_property
    def codec(self) -> SPresso:
        """The codec, kept in memory until `unload`."""
        return SPresso.from_pretrained(self.folder, device=self.device, **self.releases)

    @property
    def sampling(self) -> Sampling:
        """How D samples: the run's settings if they are given, otherwise the export's."""
        return self.asked or self.codec.config.sampling

    def unload(self) -> None:
        """Free the weights and the cached z and streams."""
        self._z.clear()
        self._files.clear()
        self.__dict__.pop("codec", None)

    def audio(self, rows: Sequence[int]) -> Tensor:
        """Return the clips (B, channels, samples) at the codec's sample rate, as its AudioAE takes them."""
        autoencoder = self.codec.autoencoder
        audio_BCS = self.clips.audio(rows)
        if audio_BCS.shape[1] != autoencoder.channels:
            audio_BCS = audio_BCS.mean(1, keepdim=True).expand(-1, autoencoder.channels, -1)
        return _resampled(audio_BCS, self.clips.sample_rate, autoencoder.sample_rate)

    def z(self, rows: Sequence[int]) -> Tensor:
        """Return z (B, Z, N), computed clip by clip so that the result does not depend on the batch."""
        for row in rows:
            if row not in self._z:
                self._z[row] = self.codec.audio_to_z(self.audio([row]))[0]
        return torch.stack([self._z[row] for row in rows])

    def through_files(self, rows: Sequence[int], books: int) -> tuple[Tensor, list[_File]]:
        """Encode clips to real files and read them back; return z_q (B, Z, N) and the files."""
        for row in rows:  # the files are cached, because the control needs them again and the search for codes is slow
            if (row, books) not in self._files:
                stream, coder = self.codec.encode(self.audio([row])[0], books=books), self.codec.coder()
                coded = bitstream.write(stream, coder=coder) if coder else None
                self._files[row, books] = _File(bitstream.write(stream), coded)
        files = [self._files[row, books] for row in rows]
        frames_of = self.codec.z_frames
        codes = [torch.from_numpy(bitstream.read(file.content, frames_of=frames_of).codes)[0] for file in files]
        assert self.codec.quantizer is not None
        return self.codec.quantizer.decode(torch.stack(codes).to(self.device)).transpose(1, 2), files

    def decode(self, z_BZN: Tensor | None, rows: Sequence[int], *, take: int = 0, steps: int | None = None) -> Tensor:
        """Decode z to audio (B, channels, samples) at the clips' sample rate; without z, draw unconditional samples.

        `steps` replaces the number of steps in `sampling`.
        """
        sampling = self.sampling if steps is None else dataclasses.replace(self.sampling, steps=steps)
        samples = _length(self.clips.samples, self.clips.sample_rate, self.codec.autoencoder.sample_rate)
        noise = self.codec.noise(self.clips.seeds(rows, take), self.codec.z_frames(samples))
        return self.back(self.codec.z_to_audio(z_BZN, noise, sampling=sampling))

    def back(self, audio_BCS: Tensor) -> Tensor:
        """Bring audio from the codec's rate and channels to the clips', and cut it to the clips' length."""
        if audio_BCS.shape[1] != self.clips.channels:
            audio_BCS = audio_BCS.mean(1, keepdim=True).expand(-1, self.clips.channels, -1)
        rate = self.codec.autoencoder.sample_rate
        return _resampled(audio_BCS, rate, self.clips.sample_rate)[..., : self.clips.samples]

    def denoising(self, z_BZN: Tensor | None, rows: Sequence[int]) -> Tensor | None:
        """Return the error (B,) that training minimises, averaged over evenly spaced noise levels, with fixed noise.

        Clips are split into windows of the training length; an incomplete last window is left out. The result is None
        if the codec has another AudioAE than the held-out set, because errors on a different x0 are not comparable.
        """
        codec = self.codec
        if codec.autoencoder.identity() != self.clips.autoencoder:
            return None
        audio, pooling = self.audio(rows), codec.config.latent_encoder.pooling
        x0_BCT = codec.autoencoder.encode(audio)
        frames = min(codec.config.window // pooling, x0_BCT.shape[-1] // pooling) * pooling
        x0_WCT = _windows(x0_BCT, frames)
        condition = None if z_BZN is None else codec.f(_windows(z_BZN, frames // pooling)[: len(x0_WCT)])
        noise_WCT = codec.noise([NOISE_SEED + n for n in range(len(x0_WCT))], frames // pooling)
        errors = []
        for level in range(LEVELS):
            u_W = torch.full((len(x0_WCT),), (level + 0.5) / LEVELS, device=audio.device)
            network = functools.partial(codec.dit, condition=condition)
            t_W = codec.diffusion.noise_level(u_W)
            errors.append(codec.diffusion.loss(network, x0_WCT, noise_WCT.roll(level, -1), t_W))
        return torch.stack(errors).mean(0).unflatten(0, (-1, len(audio))).mean(0)


@dataclasses.dataclass(frozen=True)
class _File:
    """A clip as a stream, and as an entropy-coded stream if the codec has a prior."""

    content: bytes
    coded: bytes | None

    @property
    def coded_bits(self) -> int | None:
        """Bits of the entropy-coded codes without headers; None if the codec has no prior."""
        return None if self.coded is None else 8 * bitstream.read_header(self.coded)[1]


class OwnCodec(SystemUnderTest):
    """One system of ours: an export, and which z D is conditioned on."""

    def __init__(
        self,
        export: Export,
        system: System,
        *,
        books: int | None = None,
        told: str = "own",
        takes: int = 1,
        control_of: str = "",
        steps: int | None = None,
    ) -> None:
        """Describe the system; nothing is loaded yet.

        Args:
            export: the codec.
            system: the system's row in the tables.
            books: number of codebooks that quantize z; None: z stays continuous.
            told: which z D is conditioned on: the clip's `own`, the next clip's (`other`), or none (`nothing`).
            takes: number of decodes of the page's clips.
            control_of: key of the system that this one is the control of, see `SystemUnderTest`.
            steps: number of steps in which the distilled D decodes; None: as the run or the export samples.
        """
        self.steps = steps
        self.export, self.system, self.books, self.told, self.takes = export, system, books, told, takes
        self.key, self.control_of = system.key, control_of
        sampling = dataclasses.asdict(export.asked) if export.asked else None
        facts = {"model": export.model_hash, "sampling": sampling, "books": books, "told": told, "takes": takes}
        if steps is not None:
            facts |= {"steps": steps, "parts": read_description(export.folder).get("parts")}
        self.identity = hash_values(facts | {"title": system.title})

    def decode(self, rows: Sequence[int]) -> Decoded:
        """Decode the clips from z or from its codes."""
        export, clips = self.export, self.export.clips
        source = [(row + 1) % len(clips) for row in rows] if self.told == "other" else rows
        files: list[_File] = []
        z_BZN: Tensor | None = None
        if self.books is not None:
            z_BZN, files = export.through_files(source, self.books)
        elif self.told != "nothing":
            z_BZN = export.z(source)
        takes = [export.decode(z_BZN, rows, steps=self.steps)]
        page = [row for row in rows if row < clips.on_page]
        for take in range(1, self.takes if page else 1):
            takes.append(export.decode(None if z_BZN is None else z_BZN[: len(page)], page, take=take))
        return Decoded(
            self._described(),
            takes,
            None if self.steps else export.denoising(z_BZN, rows),
            file_bytes=[len(file.content) for file in files],
            coded_bits=[bits for file in files if (bits := file.coded_bits) is not None],
        )

    def _described(self) -> System:
        codec, system = self.export.codec, dataclasses.replace(self.system)
        if self.books is not None:
            assert codec.quantizer is not None
            system.payload_kbps = codec.kbps(self.books)
            system.detail = f"{self.books} × {codec.quantizer.bits(1)} bits at {codec.z_rate:.1f} Hz"
            system.title = system.title.replace(_KBPS, f"{system.payload_kbps:.2g} kbps")
        elif system.role == "system":
            width = codec.config.latent_encoder.z_channels
            system.detail = f"{codec.z_rate:.1f} Hz × {width}, {codec.compression:.0f}×"
        if system.role == "system":
            system.table = rate_range_of(system.payload_kbps)
        return system

    def unload(self) -> None:
        """The export's weights."""
        self.export.unload()


class Original(SystemUnderTest):
    """The original clips."""

    def __init__(self, clips: ScoredClips) -> None:
        self.key, self.identity, self.clips = "original", "", clips

    def decode(self, rows: Sequence[int]) -> Decoded:
        """Return the clips unchanged."""
        return Decoded(System("original", "Original", "original"), [self.clips.audio(rows)])


class Ceiling(SystemUnderTest):
    """The AudioAE alone, without z and D."""

    def __init__(self, export: Export) -> None:
        self.key, self.export = "autoencoder", export
        self.identity = hash_values({"model": export.model_hash})

    def decode(self, rows: Sequence[int]) -> Decoded:
        """Encode the clips to x0 and decode x0."""
        note = "The autoencoder without a codec: no codec that is built on it can be better."
        autoencoder = self.export.codec.autoencoder
        audio = self.export.back(autoencoder.decode(autoencoder.encode(self.export.audio(rows))))
        return Decoded(System(self.key, "AudioAE alone", "ceiling", note=note), [audio])

    def unload(self) -> None:
        """The export's weights."""
        self.export.unload()


def own_sources(
    config: Config, clips: ScoredClips, device: torch.device
) -> tuple[list[SystemUnderTest], list[SystemUnderTest]]:
    """Return our systems, each followed by its control from another clip's z; and the floors.

    The systems are those of the run's codec and of `evaluate.codecs`. Nothing is loaded yet.
    """
    open_export = functools.partial(Export, clips=clips, device=device)
    stages = ("autoencode", "finetune", "quantize")
    releases = {"base": config.pretrained.folder, "autoencoder": config.autoencoder.folder}
    own_export = functools.partial(open_export, sampling=config.sampling, releases=releases)
    of_stage = {name: own_export(stage_folder(config, name) / "export") for name in stages}
    continuous = of_stage["autoencode"]
    rows = [OwnCodec(continuous, System("z", "Continuous z", "system"))]
    for stage in ("finetune", "quantize"):
        finetuned = stage == "finetune"
        for books in config.rates:
            key = f"zq{books}" + ("" if finetuned else "_before")
            title = _KBPS + ("" if finetuned else ", before finetuning")
            rows.append(OwnCodec(of_stage[stage], System(key, title, "system", page=finetuned), books=books))
    if "distill" in config.stages:
        rows += _distilled(config, own_export(stage_folder(config, "distill") / "export"))
    for title, folder in config.evaluate.codecs.items():
        rows += _of_codec(title, find_export(folder), functools.partial(open_export, sampling=None))
    rows = _with_takes(rows, config.evaluate.decodes)
    note = "The z of the next clip is decoded. A codec that follows its source is clearly better than this."
    other = System("z_other", "Another clip's z", "floor", note=note)
    note = "Nothing is decoded: the decoder invents a sound without any z."
    nothing = System("unconditional", "Unconditional", "floor", note=note)
    pairs = [source for row in rows for source in (row, *_control(row))]
    floors: list[SystemUnderTest] = [
        OwnCodec(continuous, other, told="other", control_of="z"),
        OwnCodec(continuous, nothing, told="nothing"),
    ]
    return [Original(clips), Ceiling(continuous), *pairs], floors


def _distilled(config: Config, export: Export) -> Iterator[OwnCodec]:
    """Yield the systems of the distilled D: the highest rate, in each number of steps."""
    books = config.rates[0]
    for steps in sorted(config.distillation.steps, reverse=True):
        title = f"{_KBPS} in {steps} step{'s' if steps > 1 else ''}"
        yield OwnCodec(export, System(f"zq{books}_in{steps}", title, "system"), books=books, steps=steps)


def _of_codec(title: str, folder: Path, open_export: Callable[[Path], Export]) -> Iterator[OwnCodec]:
    """Yield the systems of another export: its continuous z and each of its rates.

    Continuous z is decoded by the run's `autoencode` export if there is one next to this export.
    """
    folder = folder.resolve()
    slug = "".join(letter if letter.isalnum() else "_" for letter in title.lower()).strip("_")
    export, autoencode = open_export(folder), folder.parents[1] / "autoencode" / "export"
    own_rates = _rates(folder)
    before = open_export(autoencode) if own_rates and (autoencode / "codec.json").is_file() else export
    note = "" if before is not export or not own_rates else "z is decoded by the D that was finetuned on codes."
    yield OwnCodec(before, System(f"{slug}_z", f"{title}, continuous z", "system", note=note))
    for books in own_rates:
        yield OwnCodec(export, System(f"{slug}_zq{books}", f"{title}, {_KBPS}", "system"), books=books)


def _rates(folder: Path) -> list[int]:
    """Return the numbers of codebooks of an export's rates, largest first; empty if it has no quantizer."""
    if not (folder / "quantizer.safetensors").is_file():
        return []
    return sorted(read_config(folder).rates, reverse=True)


def _with_takes(rows: list[OwnCodec], decodes: int) -> list[OwnCodec]:
    """Set several decodes for up to `VARIABLE` systems of the page: quantized ones, evenly over the rates, first."""
    played = [row for row in rows if row.system.page and row.steps is None]
    played.sort(key=lambda row: row.books is None)
    in_bits = [row for row in played if row.books is not None]
    if len(in_bits) > VARIABLE:
        played = [in_bits[round(n * (len(in_bits) - 1) / (VARIABLE - 1))] for n in range(VARIABLE)]
    chosen = {row.key for row in played[:VARIABLE]}
    return [
        OwnCodec(row.export, row.system, books=row.books, takes=decodes, steps=row.steps) if row.key in chosen else row
        for row in rows
    ]


def _control(row: OwnCodec) -> list[OwnCodec]:
    """Return the control of a system, decoded from another clip's codes; the control of `z` is one of the floors.

    The distilled D needs none: it decodes the codes of the finetuned one.
    """
    if row.key == "z" or row.steps is not None:
        return []
    system = dataclasses.replace(row.system, key=f"{row.key}_other", page=False)
    return [OwnCodec(row.export, system, books=row.books, told="other", control_of=row.key)]


def _windows(x_BCT: Tensor, length: int) -> Tensor:
    """Split (B, C, T) into complete windows: (windows · B, C, length), the first window of every clip first."""
    count = x_BCT.shape[-1] // length
    return x_BCT[..., : count * length].unflatten(-1, (count, length)).permute(2, 0, 1, 3).flatten(0, 1)


def _length(samples: int, rate: int, to: int) -> int:
    return samples if rate == to else round(samples * to / rate)


def _resampled(audio_BCS: Tensor, rate: int, to: int) -> Tensor:
    if rate == to:
        return audio_BCS
    rows = [torch.from_numpy(resample_mono(row_S, rate, to)) for row_S in audio_BCS.flatten(0, 1).cpu().numpy()]
    return torch.stack(rows).unflatten(0, audio_BCS.shape[:2]).to(audio_BCS.device)
