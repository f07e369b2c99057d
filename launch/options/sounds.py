"""The commands that make, encode and decode sounds."""

from __future__ import annotations

import argparse

from launch.number_option import add_number
from launch.options.common import SEED, Commands, add_command, add_workers, path
from models.ranges import Range

_RATE = Range(least=100, most=768_000)  # of a stream, see `models.bitstream`, whose import takes longer than `--help`


def add_synth(subs: Commands) -> None:
    """Add the command that synthesizes sounds."""
    synth = add_command(
        subs, "synth", "on_sounds:synth", "synthesize captioned sound effects, to try training without a data set"
    )
    synth.add_argument("folder", type=path, help="folder to write the sounds to")
    hours = Range(above=0, most=100_000)
    add_number(synth, "--hours", hours, "hours of sound to make", kind=float, default=0.5)
    add_number(synth, "--seed", Range(least=0, most=2**64 - 1), "random seed of the sounds", default=0)
    add_workers(synth)


def add_codec_commands(subs: Commands) -> None:
    """Add the commands that use a trained codec."""
    encode = add_command(
        subs, "encode", "on_sounds:encode", "encode a sound file, or all sound files in a folder, into .spr streams"
    )
    encode.add_argument("input", type=path, metavar="IN.wav", help="sound file, or folder of sound files")
    encode.add_argument("output", type=path, metavar="OUT.spr", help="stream to write, or folder of streams")
    add_number(encode, "--books", Range(least=1), "codebooks to use; fewer give a lower bit rate", without="all")
    encode.add_argument(
        "--channels",
        default="auto",
        choices=("auto", "separate", "mid_side"),
        help="how to code stereo; auto: as mid and side, unless one channel is far quieter (default: %(default)s)",
    )
    encode.add_argument(
        "--no-entropy-coding",
        action="store_true",
        help="write plain codes even if the codec has a prior for entropy coding",
    )
    help_ = "with a prior: thousandths of the variance of z by which a vector's error may grow for each bit saved"
    add_number(encode, "--error-per-bit", Range(least=0), help_, kind=float, default=0.0)
    encode.add_argument(
        "--live",
        action="store_true",
        help="interleave several channels in short turns, so that the stream can be decoded while it arrives",
    )
    _add_codec_options(encode)

    decode = add_command(
        subs, "decode", "on_sounds:decode", "decode an .spr stream, or all streams in a folder, into sound files"
    )
    decode.add_argument("input", type=path, metavar="IN.spr", help="stream, folder of streams, or - for standard input")
    decode.add_argument(
        "output",
        type=path,
        nargs="?",
        metavar="OUT.wav",
        help="sound file to write, folder of sound files, or - for standard output (default: -), which gets a WAV file "
        "while the stream arrives",
    )
    add_number(decode, "--seed", SEED, "random seed; another seed gives another sound", default=0)
    steps = Range(least=1, most=100_000)
    add_number(decode, "--steps", steps, "steps of the diffusion sampler", without="as stored in the codec")
    times = "number of times to decode the same codes, to OUT.0.wav, OUT.1.wav …"
    add_number(decode, "--samples", Range(least=1, most=100_000), times, default=1)
    add_number(decode, "--rate", _RATE, "sample rate in Hz to write", without="that of the encoded sound")
    _add_codec_options(decode)

    info = add_command(subs, "info", "on_sounds:info", "show the contents and the bit rate of a stream")
    info.add_argument("input", type=path, metavar="FILE.spr", help="stream to read")
    info.add_argument(
        "--codec", type=path, help="export folder, or name on the hub, of its codec (default: found under runs/)"
    )


def _add_codec_options(sub: argparse.ArgumentParser) -> None:
    """Add the options that `encode` and `decode` share."""
    sub.add_argument(
        "--codec",
        type=path,
        help="export folder of the codec, or OWNER/NAME[@REVISION] on the hub (default: the newest under runs/; for "
        "decode, the one that made the stream)",
    )
    sub.add_argument(
        "--device", default="auto", choices=("auto", "cpu", "cuda"), help="device to compute on (default: %(default)s)"
    )
    sub.add_argument("--force", action="store_true", help="in a folder, also redo files that are already converted")
