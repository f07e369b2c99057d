"""What `test_mutated_sounds.py` runs apart: reads mutated sounds, each with little time, and all with little memory.

`python -m tests.trainer.data.sound_mutants FIRST LAST` says for each number what became of the mutant. A mutant that
crashes the process or takes more than 20 s ends it, so that the last number said is the one before the bad one.
"""

from __future__ import annotations

import faulthandler
import io
import random
import resource
import sys
import tempfile
from pathlib import Path

import av
import numpy as np
import soundfile

from trainer.data.sound_reader import SoundReader, duration

SECONDS_EACH = 20
_MEMORY = 1 << 30
_RATE = 44_100
_SUBTYPES = {
    "WAV": ("PCM_16", "FLOAT", "IMA_ADPCM", "GSM610"), "WAVEX": ("PCM_24",), "RF64": ("PCM_16",), "W64": ("PCM_16",),
    "AIFF": ("PCM_24",), "AU": ("PCM_16",), "CAF": ("PCM_16", "ALAC_16"), "FLAC": ("PCM_16", "PCM_24"),
    "OGG": ("VORBIS", "OPUS"), "MP3": ("MPEG_LAYER_III",),
}  # fmt: skip


def originals() -> list[bytes]:
    """Half a second of noise in every container."""
    noise = (np.random.default_rng(0).normal(size=(22_050, 2)) / 10).astype(np.float32)
    found = []
    for form, subtypes in _SUBTYPES.items():
        for subtype in subtypes:
            content = io.BytesIO()
            rate = 48_000 if subtype == "OPUS" else _RATE
            soundfile.write(content, noise[:, :1] if subtype == "GSM610" else noise, rate, format=form, subtype=subtype)
            found.append(content.getvalue())
    return found + [_by_ffmpeg(noise, form, codec) for form, codec in _FFMPEG]


_FFMPEG = (("ipod", "aac"), ("adts", "aac"), ("webm", "libopus"), ("asf", "wmav2"))


def _by_ffmpeg(noise: np.ndarray, form: str, codec: str) -> bytes:
    content = io.BytesIO()
    rate = 48_000 if codec == "libopus" else _RATE
    with av.open(content, "w", format=form) as file:
        stream = file.add_stream(codec, rate=rate, layout="stereo", options={"b": "128k"})
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(noise.T), format="fltp", layout="stereo")
        frame.rate = rate
        coder = stream.codec_context
        resampler = av.AudioResampler(coder.format, "stereo", rate, coder.frame_size or None)
        for part in (*resampler.resample(frame), *resampler.resample(None)):
            file.mux(stream.encode(part))
        file.mux(stream.encode(None))
    return content.getvalue()


def mutant(number: int, whole: list[bytes]) -> bytes:
    """The mutant of a number: cut, with other bytes, or with a piece of another file."""
    chance = random.Random(number)
    content = bytearray(chance.choice(whole))
    head = min(len(content), chance.choice((64, 512, 4096, len(content))))
    kind = chance.choice(("cut", "flip", "flip", "number", "splice", "zero", "insert", "join"))
    place = chance.randrange(head)
    if kind == "cut":
        del content[chance.randrange(len(content)) :]
    elif kind == "flip":
        for _ in range(chance.choice((1, 3, 20))):
            content[chance.randrange(head)] ^= 1 << chance.randrange(8)
    elif kind == "number":
        width = chance.choice((2, 4, 8))
        content[place : place + width] = chance.choice((b"\0", b"\xff", b"\x7f", b"\x80")) * width
    elif kind == "splice":
        other = chance.choice(whole)
        content[: len(other[:head])] = other[:head]
    elif kind == "zero":
        content[place : place + 4096] = bytes(len(content[place : place + 4096]))
    elif kind == "insert":
        content[place:place] = chance.randbytes(chance.choice((1, 10, 1000)))
    else:
        content += chance.choice(whole)[chance.choice((0, 44, 1000)) :]
    return bytes(content)


def outcome(path: Path) -> str:
    """What becomes of a file: the seconds read, or the refusal; any other exception is one of the test's findings."""
    duration(path)
    samples = 0
    try:
        with SoundReader(path) as reader:
            for block in reader.blocks():
                samples += len(block)
                if not np.isfinite(block).all() or block.shape[1] != reader.channels:
                    return "WRONG: blocks that are not finite or of another shape"
            return f"read {samples / reader.rate:.3f} s"
    except ValueError as error:
        text = str(error)
        return f"refused: {text}" if text.startswith(str(path)) and "\n" not in text else f"WRONG: {text!r}"


def main(first: int, last: int) -> None:
    """Say the outcome of each mutant."""
    whole = originals()
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + _MEMORY, used + _MEMORY))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "sound")
        for number in range(first, last):
            path.write_bytes(mutant(number, whole))
            faulthandler.dump_traceback_later(SECONDS_EACH, exit=True)
            print(number, outcome(path), flush=True)
            faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
