"""Compare live decoding with that of the whole file: python benchmarks/live.py CODEC [--minutes 1 10 60] [--steps N].

CODEC is an export with a quantizer. A stream of each length comes vector by vector, as from a network. The table gives
the peak resident memory of each way of decoding and its speed; by how much, at most, the audio lagged behind the codes,
beside the delay that the decoder tells; and the power of the difference between both sounds, relative to theirs.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from models import bitstream  # noqa: E402
from models.bitstream import Header, Stream  # noqa: E402
from models.codec import SPresso  # noqa: E402
from models.sizes import Sampling  # noqa: E402


def main() -> None:
    """Print one row per length, or decode one stream in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("codec", type=Path)
    parser.add_argument("--minutes", type=int, nargs="+", default=[1, 10, 60])
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--decode", nargs=3, metavar=("WAY", "STREAM", "SAMPLES"), help="used by the program itself")
    options = parser.parse_args()
    torch.set_num_threads(1)
    codec = SPresso.from_pretrained(options.codec)
    if options.decode:
        way, stream, samples = options.decode
        print(*decode(codec, way, Path(stream), Path(samples), steps=options.steps))
        return
    print(
        "| minutes | whole, MiB | live, MiB | whole, × real time | live, × real time | delay, s | told, s | differs |"
    )
    print("|---" * 8 + "|")
    with tempfile.TemporaryDirectory() as folder:
        for minutes in options.minutes:
            print(row(codec, options, minutes, Path(folder)), flush=True)


def row(codec: SPresso, options: argparse.Namespace, minutes: int, folder: Path) -> str:
    """Decode a stream of this length in both ways; return their row of the table."""
    stream = folder / "stream.spr"
    stream.write_bytes(random_stream(codec, 60 * minutes))
    figures = {}
    for way in ("whole", "live"):
        command = [sys.executable, __file__, str(options.codec), "--steps", str(options.steps)]
        command += ["--decode", way, str(stream), str(folder / way)]
        found = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        figures[way] = [float(figure) for figure in found]
    difference = relative_difference(*(np.memmap(folder / way, np.float32, "r") for way in ("whole", "live")))
    (whole_mib, whole_speed, *_), (live_mib, live_speed, delay, told) = figures["whole"], figures["live"]
    cells = f"{whole_mib:.0f} | {live_mib:.0f} | {whole_speed:.1f} | {live_speed:.1f} | {delay:.2f} | {told:.2f}"
    return f"| {minutes} | {cells} | {difference:.0f} |"


def relative_difference(one: np.ndarray, other: np.ndarray) -> float:
    """Return the power of the difference of two sounds in dB, relative to the power of the first."""
    assert one.shape == other.shape
    powers = np.zeros(2)
    for at in range(0, len(one), 2**22):
        part, change = one[at : at + 2**22].astype(np.float64), one[at : at + 2**22] - other[at : at + 2**22]
        powers += np.square(part).sum(), np.square(change.astype(np.float64)).sum()
    return float(10 * np.log10(powers[1] / powers[0])) if powers[1] else -np.inf


def random_stream(codec: SPresso, seconds: int) -> bytes:
    """Return a mono stream with the codes of random vectors, of all rates alike in cost."""
    quantizer, rate = codec.fitted_quantizer(), codec.autoencoder.sample_rate
    header = Header(
        model=codec.model_hash[:8],
        samples=seconds * rate,
        rate=rate,
        channels=1,
        layout="separate",
        books=quantizer.books,
        size=quantizer.size,
        gains_db=(0.0,),
    )
    shape = (1, codec.z_frames(header.samples, rate), quantizer.books)
    return bitstream.write(Stream(header, np.random.default_rng(0).integers(0, quantizer.size, shape)))


def decode(codec: SPresso, way: str, stream: Path, samples: Path, *, steps: int) -> list[float]:
    """Decode a stream and write its samples; return the peak in MiB, × real time, and of `live` the delays in s."""
    data = stream.read_bytes()
    settings = codec.config.sampling
    sampling = Sampling(**{**vars(settings), "steps": steps})
    begun, lag, told = time.monotonic(), 0.0, 0.0
    with samples.open("wb") as file:
        if way == "whole":
            for block in codec.decode_blocks(bitstream.read(data, frames_of=codec.z_frames), sampling=sampling):
                file.write(block.numpy().tobytes())
        else:
            lag, told = decode_live(codec, data, file, sampling)
    seconds = samples.stat().st_size / 4 / codec.autoencoder.sample_rate
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return [peak, seconds / (time.monotonic() - begun), lag, told]


def decode_live(codec: SPresso, data: bytes, file: BinaryIO, sampling: Sampling) -> tuple[float, float]:
    """Push a stream vector by vector; return by how many seconds the audio lagged, and the delay told."""
    decoder = codec.decoder(sampling=sampling)
    header, payload = bitstream.read_header(data)
    bits, rate = codec.fitted_quantizer().bits(header.books), codec.autoencoder.sample_rate
    begin = len(data) - bitstream.CHECKSUM_BYTES - payload
    file.write(decoder.push(data[:begin]).numpy().tobytes())
    came, given, lag, vector = begin, 0, 0.0, 0
    per_vector = codec.autoencoder.hop * codec.config.latent_encoder.pooling
    while came < len(data):
        vector += 1
        until = min(begin + vector * bits // 8, len(data)) if vector * bits // 8 < payload else len(data)
        audio = decoder.push(data[came:until])
        came, given = until, given + audio.shape[-1]
        lag = max(lag, (min(vector * per_vector, header.samples) - given) / rate)
        file.write(audio.numpy().tobytes())
    file.write(decoder.flush().numpy().tobytes())
    return lag, decoder.delay


if __name__ == "__main__":
    main()
