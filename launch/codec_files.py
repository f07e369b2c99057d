"""`spresso encode`, `decode` and `info`: converts sound files to streams and back, singly or by folder."""

from __future__ import annotations

import dataclasses
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
from models.encoding import encode_sound
from models.export import read_description
from models.resampling import Audio, fit_blocks, resample
from models.sizes import Sampling
from trainer.data.audio import can_write, find_audio, sound_length, write_blocks
from trainer.data.sound_reader import SoundReader
from trainer.progress import Progress

SUFFIX = ".spr"


@dataclass
class FileEncoder:
    """Encodes sound files with fixed settings, and sums up sizes and seconds."""

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
        """Encode one file. Raises ValueError, OSError."""
        with SoundReader(source) as reader:
            rate = reader.rate
        notes: list[str] = []

        def blocks() -> Iterator[Audio]:
            with SoundReader(source) as reader:
                yield from (block.T for block in reader.blocks())
                notes[:] = reader.notes

        with torch.inference_mode():
            stream = encode_sound(
                self.spresso, blocks, sample_rate=rate, books=self.books, channels=self.channels, progress=progress
            )
        for note in notes:
            print(f"spresso: {source} {note}", file=sys.stderr)
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
        """Whether the target exists, is from this codec with these codebooks, and is no older than its source."""
        if not _newer(target, source):
            return False
        try:
            header, _ = bitstream.read_header(target.read_bytes())
        except ValueError:
            return False
        quantizer = self.spresso.fitted_quantizer()
        books = quantizer.books if self.books is None else self.books
        return (header.model, header.books) == (self.spresso.model_hash[:8], books)

    def summary(self) -> str:
        """Return the size and the bit rates of all files so far, for people."""
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
    """Encode a sound file into a stream, or a folder into a folder; print the bit rate.

    Args:
        source: sound file, or folder of sound files.
        target: stream, or folder of streams.
        codec: export folder; None: the newest under runs/.
        device: `auto`, `cpu` or `cuda`.
        books: codebooks to use; None: all.
        channels: `auto`, `separate` or `mid_side`.
        entropy: whether to use entropy coding if the codec has a prior.
        force: whether to redo files of a folder that are already converted.

    Returns:
        The number of files that failed, each of which is named on stderr.
    """
    jobs = _jobs(source, target, find_audio, lambda path: path.with_name(path.name + SUFFIX))
    encoder = FileEncoder(_load(codec or newest_codec(), device), books, channels, entropy)
    if books is not None:
        encoder.spresso.fitted_quantizer().bits(books)  # raises ValueError if the codec has fewer codebooks
    if not source.is_dir():
        encoder(source, target, lambda _: None)
        print(f"{target}: {encoder.summary()}", file=sys.stderr)
        return 0
    failed = _convert_all("encode", jobs, encoder, None if force else encoder.made)
    if encoder.files:
        print(f"{target}: {encoder.summary()}", file=sys.stderr)
    return failed


@dataclass
class FileDecoder:
    """Decodes streams with fixed settings."""

    codec: Path | None
    device: str
    seed: int
    steps: int | None
    samples: int
    rate: int | None
    loaded: dict[str, SPresso] = field(default_factory=dict)

    def __call__(self, source: Path, target: Path, progress: Callable[[float], None]) -> None:
        """Decode one file. Raises ValueError, OSError."""
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
        ours, channels = spresso.autoencoder.sample_rate, header.channels
        audio = resample((block.cpu().numpy() for block in blocks), ours, rate, channels=channels)
        write_blocks(path, fit_blocks(audio, self._length(header), channels=channels), rate, channels)

    def made(self, source: Path, target: Path) -> bool:
        """Whether the target exists, has the expected length and rate, and is no older than its source."""
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
        """Return the codec that made a stream. One is kept loaded, because most folders need only one."""
        if model not in self.loaded:
            folder = self.codec or fitting_codec(model, source)
            spresso = next(iter(self.loaded.values())) if self.codec and self.loaded else _load(folder, self.device)
            self.loaded = {spresso.model_hash[:8]: spresso}
            if not spresso.model_hash.startswith(model):
                ours = spresso.model_hash[:8]
                raise ValueError(f"{source} was made by model {model}, but {folder} is {ours}: give its codec")
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
    """Decode a stream into one or several sound files, or a folder into a folder.

    Args:
        source: stream, or folder of streams.
        target: sound file, or folder of sound files.
        codec: export folder; None: the export under runs/ that made the stream.
        device: `auto`, `cpu` or `cuda`.
        seed: random seed of the first decode.
        steps: steps of the sampler; None: as stored in the codec.
        samples: number of times to decode the same codes, with consecutive seeds.
        rate: sample rate in Hz to write; None: that of the encoded sound.
        force: whether to redo files of a folder that are already converted.

    Returns:
        The number of files that failed, each of which is named on stderr.
    """
    if samples < 1 or (steps is not None and steps < 1):
        raise ValueError("--samples and --steps must be at least 1")
    low, high = bitstream.RATE_RANGE
    if rate is not None and not low <= rate <= high:
        raise ValueError(f"--rate {rate} must be between {low} and {high}")
    jobs = _jobs(source, target, find_streams, _sound_of)
    decoder = FileDecoder(codec, device, seed, steps, samples, rate)
    if source.is_dir():
        return _convert_all("decode", jobs, decoder, None if force else decoder.made)
    with Progress(f"decode {target.name}", total=1, unit="of all steps") as progress:
        decoder(source, target, progress.to)
    return 0


def info(path: Path, *, codec: Path | None) -> None:
    """Print the contents and the bit rates of a stream. Raises ValueError if the file is not a stream."""
    content = path.read_bytes()
    with _named(path):
        header, payload = bitstream.read_header(content)
    folder = codec or next(iter(_of_model(header.model)), None)
    how = {"mid_side": ", as mid and side", "mid": ", both the same", "joint": ", together", "separate": ""}
    print(f"{path}: {len(content)} bytes")
    print(f"model   {header.model}" + (f", {folder}" if folder else ", not found under runs/"))
    print(f"sound   {header.seconds:.3f} s at {header.rate} Hz, {header.channels} channel(s){how[header.layout]}")
    bits = header.size.bit_length() - 1
    print(f"codes   {header.books} codebook(s) of {header.size}: {header.books * bits} bits per vector")
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
    """Return pairs of source and target."""
    if not source.is_dir():
        return [(source, target)]
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file, but {source} is a folder: give a folder as output")
    return [(path, name(target / path.relative_to(source))) for path in find(source)]


def _convert_all(
    title: str,
    jobs: list[Conversion],
    work: Callable[[Path, Path, Callable[[float], None]], None],
    made: Callable[[Path, Path], bool] | None,
) -> int:
    """Convert all files. A failure is reported and does not stop the others; returns the number of failures."""
    failed, there = 0, 0
    claimed: dict[Path, Path] = {}
    with Progress(title, total=len(jobs), unit="files") as progress:
        for number, (source, target) in enumerate(jobs):
            try:
                if (other := claimed.setdefault(target, source)) != source:
                    raise ValueError(f"{source} and {other} would both be written to {target}: rename one")
                if made is not None and made(source, target):
                    there += 1
                else:
                    work(source, target, lambda part: progress.to(number + part, failed=failed))  # noqa: B023
            except (ValueError, OSError) as error:
                failed += 1
                print(f"spresso: {_describe(source, error)}", file=sys.stderr)
            progress.to(number + 1, failed=failed)
    done = len(jobs) - failed - there
    print(f"{title}: {done} done, {there} already there, {failed} failed", file=sys.stderr)
    return failed


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Add the path of a file to the errors that its content causes."""
    try:
        yield
    except ValueError as error:
        raise ValueError(_describe(path, error)) from error


def _describe(path: Path, error: Exception) -> str:
    return str(error) if str(path) in str(error) else f"{path}: {error}"


def find_streams(folder: Path) -> list[Path]:
    """Return all streams below a folder, sorted, without hidden files and folders.

    Raises:
        ValueError: the folder holds no stream.
    """
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(parent, name) for name in names if name.endswith(SUFFIX) and name[0] != "."]
    if not found:
        raise ValueError(f"{folder} holds no streams: give a folder with {SUFFIX} files")
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def _sound_of(stream: Path) -> Path:
    """Name the sound: `door.flac.spr` → `door.flac`, `door.mp3.spr` → `door.mp3.wav`, `door.spr` → `door.wav`."""
    inner = stream.with_suffix("")
    return inner if can_write(inner) else inner.with_name(inner.name + ".wav")


def _newer(target: Path, source: Path) -> bool:
    return target.is_file() and target.stat().st_mtime_ns >= source.stat().st_mtime_ns


# --- codecs -----------------------------------------------------------------------------------------------------------


def newest_codec() -> Path:
    """Return the newest export under runs/ that can encode. Raises ValueError if there is none."""
    exports = [path for path in _exports() if (path / "quantizer.safetensors").exists()]
    if not exports:
        raise ValueError("there is no codec under runs/: train one with `spresso run demo`, or give --codec FOLDER")
    return max(exports, key=lambda path: (path / "codec.json").stat().st_mtime)


def fitting_codec(model: str, source: Path) -> Path:
    """Return the export under runs/ whose model made a stream. Raises ValueError if there is none."""
    for path in _of_model(model):
        return path
    raise ValueError(
        f"{source} was made by model {model}, which is not under runs/: give its export with --codec FOLDER"
    )


def _of_model(model: str) -> Iterable[Path]:
    for path in _exports():
        try:
            found = read_description(path)["model"].startswith(model)
        except (ValueError, OSError) as error:  # a damaged export must not hide the others
            print(f"spresso: {path} is passed over: {error}", file=sys.stderr)
            continue
        if found:
            yield path


def _exports() -> list[Path]:
    return sorted(path.parent for path in Path("runs").glob("**/export/codec.json"))


def _load(folder: Path, device: str) -> SPresso:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device; use --device cpu")
    spresso = SPresso.from_pretrained(folder, device=device)
    print(f"codec {folder}, model {spresso.model_hash[:8]}", file=sys.stderr)
    return spresso
