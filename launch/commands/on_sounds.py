"""Commands that synthesize sounds or use a trained codec: `synth`, `encode`, `decode`, `info`."""

from __future__ import annotations

import argparse

from launch import codec_files
from launch.pipeline import synthesize


def synth(options: argparse.Namespace) -> None:
    """Synthesize captioned sound effects."""
    synthesize(options.folder, hours=options.hours, seed=options.seed, workers=options.workers)


def encode(options: argparse.Namespace) -> int:
    """Encode sounds into streams; return 1 if a file failed."""
    failed = codec_files.encode(
        options.input,
        options.output,
        codec=options.codec,
        device=options.device,
        books=options.books,
        channels=options.channels,
        entropy=not options.no_entropy_coding,
        error_per_bit=options.error_per_bit,
        live=options.live,
        force=options.force,
    )
    return 1 if failed else 0


def decode(options: argparse.Namespace) -> int:
    """Decode streams into sounds; return 1 if a file failed."""
    failed = codec_files.decode(
        options.input,
        options.output or codec_files.STANDARD,
        codec=options.codec,
        device=options.device,
        seed=options.seed,
        steps=options.steps,
        samples=options.samples,
        rate=options.rate,
        force=options.force,
    )
    return 1 if failed else 0


def info(options: argparse.Namespace) -> None:
    """Print the contents and the bit rate of a stream."""
    codec_files.info(options.input, codec=options.codec)
