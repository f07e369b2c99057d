"""Sounds ↔ streams: `spresso encode`, `decode` and `info`, of a file or of all in a folder."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from models import bitstream
from models.atomic_write import write_whole
from models.bitstream import Header
from models.codec import SPresso, read_frames_of
from models.sizes import Sampling
from trainer.data.audio import can_write, find_audio, read_sound, resample, resampled, sound_length, write_blocks
from trainer.progress import Progress

SUFFIX = ".spr"


@dataclass
class FileEncoder:
    """How sounds are encoded, and the sums of what was."""

    spresso: SPresso
    books: int | None
    channels: str
    entropy: bool
    seconds: float = 0.0
    packed_bits: int = 0
    file_bytes: int = 0
    files: int = 0
    payload_bytes: int = 0

    def __post_init__(self) -> None:
        self.coder = self.spresso.coder() if self.entropy else None

    def __call__(self, source: Path, target: Path, progress: Callable[[float], None]) -> None:
        """One file."""
        sound, rate = read_sound(source)
        samples, ours = sound.shape[-1], self.spresso.autoencoder.sample_rate
        audio = resample(sound, rate, ours, samples=self.spresso.samples(samples, rate))
        stream = self.spresso.encode(
            torch.from_numpy(audio), books=self.books, channels=self.channels, origin=(samples, rate)
        )
        content = bitstream.write(stream, coder=self.coder)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_whole(target, content)
        header, payload = bitstream.read_header(content)
        self.files += 1
        self.seconds += header.seconds
        self.packed_bits += header.packed_bits(stream.codes.shape[1])
        self.payload_bytes += payload
        self.file_bytes += len(content)

    def made(self, source: Path, target: Path) -> bool:
        """Whether the target is there, whole, of this codec with these books, and no older than its source."""
        if not _newer(target, source):
            return False
        try:
            header, _ = bitstream.read_header(target.read_bytes())
        except ValueError:
            return False
        quantizer = self.spresso.fitted_quantizer()
        books = quantizer.books if self.books is None else self.books
        return (header.model, header.books) == (self.spresso.model_hash[:8], books)

    def told(self) -> str:
        """Sizes and rates."""
        plain, coded, whole = (
            bits / self.seconds / 1000 for bits in (self.packed_bits, self.payload_bytes * 8, self.file_bytes * 8)
        )
        entropy = f", entropy-coded {coded:.3f}" if self.coder is not None else ""
        return (
            f"{self.file_bytes} bytes for {self.seconds:.2f} s, {plain:.3f} kbps{entropy} ({whole:.3f} with "
            f"{'its header' if self.files == 1 else 'the headers'})"
        )


def encode(
    source: Path,
    target: Path,
    *,
    codec: Path | None,
    device: str,
    books: int | None,
    channels: str = "auto",
    entropy: bool = True,
    force: bool = False,
) -> int:
    """A sound file → a stream, or a folder of them → a folder; says what it costs. Returns how many failed."""
    jobs = _jobs(source, target, find_audio, lambda path: path.with_name(path.name + SUFFIX))
    encoder = FileEncoder(_load(codec or newest_codec(), device), books, channels, entropy)
    if books is not None:
        encoder.spresso.fitted_quantizer().bits(books)  # raises where there are none such
    if not source.is_dir():
        encoder(source, target, lambda _: None)
        print(f"{target}: {encoder.told()}", file=sys.stderr)
        return 0
    failed = _all("encode", jobs, encoder, None if force else encoder.made)
    if encoder.files:
        print(f"{target}: {encoder.told()}", file=sys.stderr)
    return failed


@dataclass
class FileDecoder:
    """How streams are decoded."""

    codec: Path | None
    device: str
    seed: int
    steps: int | None
    samples: int
    rate: int | None
    loaded: dict[str, SPresso] = field(default_factory=dict)

    def __call__(self, source: Path, target: Path, progress: Callable[[float], None]) -> None:
        """One file."""
        content = source.read_bytes()
        with _named(source):
            spresso = self._codec(bitstream.model_of(content), source)
            stream = bitstream.read(content, frames_of=spresso.z_frames, coder=spresso.coder())
        target.parent.mkdir(parents=True, exist_ok=True)
        for number in range(self.samples):
            path = target if self.samples == 1 else target.with_suffix(f".{number}{target.suffix}")
            show = partial(self._show, progress, number)
            self._decode(spresso, stream, path, self.seed + number, show)

    def _decode(
        self, spresso: SPresso, stream: bitstream.Stream, path: Path, seed: int, show: Callable[[int, int], None]
    ) -> None:
        header, rate = stream.header, self.rate or stream.header.rate
        blocks = spresso.decode_blocks(stream, seed=seed, sampling=self._sampling(spresso), progress=show)
        audio = resampled(
            (block.cpu().numpy() for block in blocks),
            spresso.autoencoder.sample_rate,
            rate,
            channels=header.channels,
            samples=self._length(header),
        )
        write_blocks(path, audio, rate, header.channels)

    def made(self, source: Path, target: Path) -> bool:
        """Whether the target is there, as long as it ought to be, and no older than its source."""
        last = target if self.samples == 1 else target.with_suffix(f".{self.samples - 1}{target.suffix}")
        if not _newer(last, source):
            return False
        try:
            header, _ = bitstream.read_header(source.read_bytes())
        except ValueError:
            return False
        return sound_length(last) == (self._length(header), self.rate or header.rate)

    def _length(self, header: Header) -> int:
        return -(-header.samples * (self.rate or header.rate) // header.rate)

    def _sampling(self, spresso: SPresso) -> Sampling:
        sampling = spresso.config.sampling
        return sampling if self.steps is None else dataclasses.replace(sampling, steps=self.steps)

    def _show(self, progress: Callable[[float], None], number: int, done: int, total: int) -> None:
        progress((number + done / total) / self.samples)

    def _codec(self, model: str, source: Path) -> SPresso:
        """The one that fits a stream; the last is kept, as a folder's files are mostly of one."""
        if model not in self.loaded:
            folder = self.codec or fitting_codec(model, source)
            spresso = next(iter(self.loaded.values())) if self.codec and self.loaded else _load(folder, self.device)
            self.loaded = {spresso.model_hash[:8]: spresso}
            if not spresso.model_hash.startswith(model):
                ours = spresso.model_hash[:8]
                raise ValueError(f"{source} was made by model {model}, {folder} is {ours}: give the one that made it")
        return self.loaded[model]


def decode(
    source: Path,
    target: Path,
    *,
    codec: Path | None,
    device: str,
    seed: int,
    steps: int | None,
    samples: int,
    rate: int | None = None,
    force: bool = False,
) -> int:
    """A stream → a sound file, or several that the same codes allow; or a folder of them. Returns how many failed."""
    if samples < 1 or (steps is not None and steps < 1):
        raise ValueError("--samples and --steps are at least 1")
    low, high = bitstream.RATE_RANGE
    if rate is not None and not low <= rate <= high:
        raise ValueError(f"--rate {rate} does not lie between {low} and {high}")
    jobs = _jobs(source, target, find_streams, _sound_of)
    decoder = FileDecoder(codec, device, seed, steps, samples, rate)
    if source.is_dir():
        return _all("decode", jobs, decoder, None if force else decoder.made)
    with Progress(f"decode {target.name}", total=1, unit="of all steps") as progress:
        decoder(source, target, progress.to)
    return 0


def info(path: Path, *, codec: Path | None) -> None:
    """Print what a stream holds and what it costs."""
    content = path.read_bytes()
    with _named(path):
        header, payload = bitstream.read_header(content)
    folder = codec or next(iter(_of_model(header.model)), None)
    how = {"mid_side": ", as mid and side", "mid": ", both the same", "joint": ", together", "separate": ""}
    print(f"{path}: {len(content)} bytes")
    print(f"model   {header.model}" + (f", {folder}" if folder else ", which is not under runs/"))
    print(f"sound   {header.seconds:.3f} s at {header.rate} Hz, {header.channels} channel(s){how[header.layout]}")
    bits = header.size.bit_length() - 1
    print(f"codes   {header.books} book(s) of {header.size}: {header.books * bits} bits a vector")
    for line in _rates(header, payload, len(content), folder):
        print(line)


def _rates(header: Header, payload: int, size: int, folder: Path | None) -> Iterable[str]:
    def kbps(bits: float) -> str:
        return f"{bits / header.seconds / 1000:.3f} kbps" if header.samples else "nothing"

    if not header.prior:
        yield f"rate    {kbps(payload * 8)}, not entropy-coded"
    else:
        if folder is not None:
            packed = header.packed_bits(read_frames_of(folder)(header.samples, header.rate))
            yield f"rate    {kbps(packed)} without entropy coding"
        yield f"        {kbps(payload * 8)} entropy-coded by the prior {header.prior}"
    yield f"        {kbps(size * 8)} with the header"


# --- folders ----------------------------------------------------------------------------------------------------------

Conversion = tuple[Path, Path]


def _jobs(
    source: Path, target: Path, find: Callable[[Path], list[Path]], name: Callable[[Path], Path]
) -> list[Conversion]:
    """What is to be made of what."""
    if not source.is_dir():
        return [(source, target)]
    if target.exists() and not target.is_dir():
        raise ValueError(f"{source} is a folder, so {target} has to be one, and is a file")
    return [(path, name(target / path.relative_to(source))) for path in find(source)]


def _all(
    title: str,
    jobs: list[Conversion],
    work: Callable[[Path, Path, Callable[[float], None]], None],
    made: Callable[[Path, Path], bool] | None,
) -> int:
    """Do all of them; what fails is named, and the rest goes on. Returns how many failed."""
    failed, there = 0, 0
    claimed: dict[Path, Path] = {}
    with Progress(title, total=len(jobs), unit="files") as progress:
        for number, (source, target) in enumerate(jobs):
            try:
                if (other := claimed.setdefault(target, source)) != source:
                    raise ValueError(f"{source} would be written to {target}, as {other} is: rename one")
                if made is not None and made(source, target):
                    there += 1
                else:
                    work(source, target, lambda part: progress.to(number + part, failed=failed))  # noqa: B023
            except (ValueError, OSError) as error:
                failed += 1
                print(f"spresso: {_told(source, error)}", file=sys.stderr)
            progress.to(number + 1, failed=failed)
    done = len(jobs) - failed - there
    print(f"{title}: {done} done, {there} there already, {failed} failed", file=sys.stderr)
    return failed


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Errors of a file's content say which file it is."""
    try:
        yield
    except ValueError as error:
        raise ValueError(_told(path, error)) from error


def _told(path: Path, error: Exception) -> str:
    return str(error) if str(path) in str(error) else f"{path}: {error}"


def find_streams(folder: Path) -> list[Path]:
    """All streams below a folder, sorted; hidden files and folders are passed over.

    Raises:
        ValueError: there is none.
    """
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(parent, name) for name in names if name.endswith(SUFFIX) and name[0] != "."]
    if not found:
        raise ValueError(f"{folder} holds no stream: give a folder with files of {SUFFIX}")
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def _sound_of(stream: Path) -> Path:
    """`door.flac.spr` → `door.flac`, `door.mp3.spr` → `door.mp3.wav`, `door.spr` → `door.wav`."""
    inner = stream.with_suffix("")
    return inner if can_write(inner) else inner.with_name(inner.name + ".wav")


def _newer(target: Path, source: Path) -> bool:
    return target.is_file() and target.stat().st_mtime_ns >= source.stat().st_mtime_ns


# --- codecs -----------------------------------------------------------------------------------------------------------


def newest_codec() -> Path:
    """The export that was finished last."""
    exports = [path for path in _exports() if (path / "quantizer.safetensors").exists()]
    if not exports:
        raise ValueError("there is no codec under runs/: train one with `spresso run demo`, or give --codec FOLDER")
    return max(exports, key=lambda path: (path / "codec.json").stat().st_mtime)


def fitting_codec(model: str, source: Path) -> Path:
    """The export whose model made a stream."""
    for path in _of_model(model):
        return path
    raise ValueError(
        f"{source} was made by model {model}, which is not under runs/: give its export with --codec FOLDER"
    )


def _of_model(model: str) -> Iterable[Path]:
    for path in _exports():
        if json.loads((path / "codec.json").read_text()).get("model", "").startswith(model):
            yield path


def _exports() -> list[Path]:
    return sorted(path.parent for path in Path("runs").glob("**/export/codec.json"))


def _load(folder: Path, device: str) -> SPresso:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device here; leave it out, or say --device cpu")
    spresso = SPresso.from_pretrained(folder, device=device)
    print(f"codec {folder}, model {spresso.model_hash[:8]}", file=sys.stderr)
    return spresso
