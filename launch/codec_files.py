"""`spresso encode`, `decode` and `info`: converts sound files to streams and back, singly or by folder."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from launch.conversions import Conversion, Converter, convert_folder
from launch.encode_record import EncodeRecord
from launch.file_decoder import FileDecoder, named_errors
from launch.file_encoder import FileEncoder
from launch.find_codec import codec_folder, exports_of, load_codec, newest_codec
from launch.live_decode import STANDARD, decode_live
from launch.own_files import file_ids, is_decoded_sound, is_stream, refusal, require_stream_name
from models import bitstream
from models.bitstream import Header
from models.disk_errors import patiently
from models.frame_counts import read_frames_of
from models.readable import require_file
from trainer.data.audio import can_write
from trainer.data.find_sounds import Counts, Found, find_files, find_sounds
from trainer.file_names import printable
from trainer.progress import Progress

SUFFIX = ".spr"


def encode(
    source: Path,
    target: Path,
    *,
    codec: Path | None,
    device: str,
    books: int | None,
    channels: str = "auto",
    entropy: bool = True,
    error_per_bit: float = 0.0,
    live: bool = False,
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
        error_per_bit: error that a vector z may add for each bit that it saves, see `SPresso.encode`.
        live: whether to interleave the rows of codes, see `models.bitstream.Header`.
        force: whether to redo files of a folder that are already converted.

    Returns:
        The number of files that failed, each of which is named on stderr and in `target`/encode.report.json.

    Raises:
        ValueError: source, target or codec can't be used; a single file can't be converted.
    """
    if error_per_bit and not entropy:
        raise ValueError("--error-per-bit saves bits by entropy coding alone: leave --no-entropy-coding out")
    jobs, passed_over = _conversions(source, target, find_sounds, _stream_of)
    if not source.is_dir():
        require_stream_name(target)
        _require_writable(jobs[0], is_stream, "spresso encode")
    record = EncodeRecord() if source.is_dir() else None
    spresso = load_codec(codec or newest_codec(), device)
    encoder = FileEncoder(spresso, books, channels, entropy, record, error_per_bit, live)
    if books is not None:
        encoder.spresso.fitted_quantizer().bits(books)  # raises ValueError if the codec has fewer codebooks
    if not source.is_dir():
        encoder(source, target, lambda _: None)
        print(f"{printable(str(target))}: {encoder.summary()}", file=sys.stderr)
        return 0
    converter = Converter("encode", encoder, None if force else encoder.made, is_stream)
    report = convert_folder(source, target, jobs, converter, passed_over)
    if encoder.files:
        print(f"{printable(str(target))}: {encoder.summary()}", file=sys.stderr)
    return report.failed


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
        source: stream, folder of streams, or `-` for standard input, which is decoded to standard output.
        target: sound file, folder of sound files, or `-` for standard output.
        codec: export folder; None: the export under runs/ that made the stream.
        device: `auto`, `cpu` or `cuda`.
        seed: random seed of the first decode.
        steps: steps of the sampler; None: as stored in the codec.
        samples: number of times to decode the same codes, with consecutive seeds.
        rate: sample rate in Hz to write; None: that of the encoded sound.
        force: whether to redo files of a folder that are already converted.

    Returns:
        The number of files that failed, each of which is named on stderr and in `target`/decode.report.json.

    Raises:
        ValueError: source, target, codec or a setting can't be used; a single file can't be converted.
    """
    if codec is not None:
        codec = codec_folder(codec)
    if STANDARD in (source, target):
        _require_live(source, target, samples)
        decode_live(source, codec=codec, device=device, seed=seed, steps=steps, rate=rate)
        return 0
    decoder = FileDecoder(codec, device, seed, steps, samples, rate)
    jobs, passed_over = _conversions(source, target, find_streams, _sound_of, decoder.outputs)
    if source.is_dir():
        converter = Converter("decode", decoder, None if force else decoder.made, is_decoded_sound)
        return convert_folder(source, target, jobs, converter, passed_over).failed
    _require_sound_name(target)
    _require_writable(jobs[0], is_decoded_sound, "spresso decode")
    with Progress(f"decode {target.name}", total=1, unit="of all steps") as progress:
        decoder(source, target, progress.to)
    return 0


def info(path: Path, *, codec: Path | None) -> None:
    """Print the contents and the bit rates of a stream. Raises ValueError if the file is not a stream."""
    require_file(path)
    if codec is not None:
        codec = codec_folder(codec)
    content = patiently(path.read_bytes)
    with named_errors(path):
        header, payload = bitstream.read_header(content)
    folder = codec or next(iter(exports_of(header.model)), None)
    how = {"mid_side": ", as mid and side", "mid": ", both the same", "joint": ", together", "separate": ""}
    print(f"{printable(str(path))}: {len(content)} bytes")
    print(f"model   {header.model}" + (f", {printable(str(folder))}" if folder else ", not found under runs/"))
    print(f"sound   {header.seconds:.3f} s at {header.rate} Hz, {header.channels} channel(s){how[header.layout]}")
    bits = header.size.bit_length() - 1
    print(f"codes   {header.books} codebook(s) of {header.size}: {header.books * bits} bits per vector")
    if not header.in_order:
        print("order   one channel after the other: to be decoded while it comes, encode it with --live")
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


# --- files and folders ------------------------------------------------------------------------------------------------


def _conversions(
    source: Path,
    target: Path,
    find: Callable[[Path], Found],
    name: Callable[[Path], Path],
    outputs: Callable[[Path], tuple[Path, ...]] = lambda target: (target,),
) -> tuple[list[Conversion], Counts]:
    """Return the files to convert, each with its target and all that is written; and what else is in the folder.

    Args:
        source: file, or folder that `find` lists.
        target: file, or folder.
        find: returns the files to convert in a folder.
        name: returns the target's name for a file's.
        outputs: returns the files that are written for a target.

    Raises:
        ValueError: the source can't be read, or source and target are not both files or both folders.
    """
    for path in (source, target):
        if str(path) == "-":
            raise ValueError("- is no file: of standard input and output, only `spresso decode -` makes use")
    if not source.is_dir():
        require_file(source)
        if target.is_dir():
            inside = target / name(Path(source.name))
            raise ValueError(f"{target} is a folder, but {source} is a file: give a file as output, such as {inside}")
        return [Conversion(source, target, outputs(target))], Counts()
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file, but {source} is a folder: give a folder as output")
    found = find(source)
    targets = [(path, name(target / path.relative_to(source))) for path in found.files]
    return [Conversion(path, to, outputs(to)) for path, to in targets], found.passed_over


def _require_live(source: Path, target: Path, samples: int) -> None:
    """Raise ValueError unless one sound is to be decoded to standard output."""
    if target != STANDARD:
        raise ValueError(
            f"what comes from standard input is decoded to standard output: write `spresso decode - > {target}`"
        )
    if samples != 1:
        raise ValueError(f"--samples {samples}: standard output takes one sound; leave the option out, or name a file")
    if source.is_dir():
        raise ValueError(f"{source} is a folder, but standard output takes one sound: give a stream")


def _require_writable(job: Conversion, is_ours: Callable[[Path], bool], writer: str) -> None:
    """Raise ValueError if an output of a single file must not be written."""
    inputs = file_ids([job.source])
    for path in job.outputs:
        if reason := refusal(path, inputs, is_ours, writer):
            raise ValueError(reason)


def _require_sound_name(target: Path) -> None:
    if not can_write(target):
        raise ValueError(f"{target}: sound can be written as .wav, .flac, .ogg, not as {target.suffix!r}")


def find_streams(folder: Path) -> Found:
    """Find all streams below a folder as `find_files` does; raises ValueError if the folder holds no stream."""
    found = find_files(folder, (SUFFIX,))
    if not found.files:
        raise ValueError(f"{folder} holds no streams: give a folder with {SUFFIX} files")
    return found


def _stream_of(sound: Path) -> Path:
    """Name the stream: `door.flac` → `door.flac.spr`."""
    return sound.with_name(sound.name + SUFFIX)


def _sound_of(stream: Path) -> Path:
    """Name the sound: `door.flac.spr` → `door.flac`, `door.mp3.spr` → `door.mp3.wav`, `door.spr` → `door.wav`."""
    inner = stream.with_suffix("")
    return inner if can_write(inner) else inner.with_name(inner.name + ".wav")
