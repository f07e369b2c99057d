"""The command `spresso`: all its commands and their options.

What a command does is in `launch.commands`, and is imported when the command is called, so that `--help` answers at
once.
"""

from __future__ import annotations

import argparse
import atexit
import errno
import importlib
import os
import sys
import textwrap
from pathlib import Path
from typing import Any

from launch.signals import INTERRUPTED
from trainer.stages import STAGES, trained_stages

_OVERRIDES = (
    "settings of the recipe, such as autoencode.lr=1e-4 run_dir=runs/try2; `spresso plan RECIPE` shows them all"
)
_RECIPE = "a YAML file, or the name of one in configs/, such as demo"


def main(arguments: list[str] | None = None) -> int:
    """Run the command; a user's mistake is one clear line and exit status 2."""
    options = parser().parse_args(arguments)
    try:
        module, _, function = options.command.partition(":")
        command = getattr(importlib.import_module(f"launch.commands.{module}"), function)
        return command(options) or 0
    except KeyboardInterrupt:
        print("spresso: interrupted", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, OSError) as error:
        if "SPRESSO_DEBUG" in os.environ:
            raise
        print(textwrap.indent(_line(error), "spresso: "), file=sys.stderr)
        return 2


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    top = argparse.ArgumentParser(
        prog="spresso", description="Train S-PRESSO-type audio codecs and use them.", allow_abbrev=False
    )
    top.add_argument("--version", action=_Version, help="print the version of this program and of its code")
    subs = top.add_subparsers(metavar="COMMAND", required=True)

    synth = _command(
        subs, "synth", "on_sounds:synth", "make captioned sound effects, for those who have no sounds at hand"
    )
    synth.add_argument("folder", type=Path, help="where the sounds go")
    synth.add_argument("--hours", type=float, default=0.5, help="hours of sound (%(default)s)")
    synth.add_argument("--seed", type=int, default=0, help="another seed, other sounds (%(default)s)")
    synth.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (%(default)s)")

    _of_recipes(subs)
    _listening(subs)
    _of_runs(subs)
    _of_files(subs)
    _of_streams(subs)
    return top


def _of_recipes(subs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Commands that take a recipe."""
    for name, command, help_ in (
        ("run", "on_recipes:run", "all stages of a recipe in order; run again it goes on where it stopped"),
        ("prepare", "on_recipes:prepare", "sound files → latents in shards"),
        ("train", "on_recipes:train", f"one trained stage: stage={'|'.join(trained_stages())}"),
        ("evaluate", "on_recipes:evaluate", "figures of the trained codec on held-out clips"),
        ("page", "on_recipes:page", "the page to listen to"),
        ("plan", "on_recipes:plan", "the resolved config, the batches, the memory of each rank; starts nothing"),
        ("sbatch", "on_recipes:sbatch", "one script for plain sbatch: all stages in one job, or stage=… alone"),
    ):
        sub = _command(subs, name, command, help_)
        sub.add_argument("recipe", help=_RECIPE)
        sub.add_argument("overrides", nargs="*", metavar="key=value", help=_OVERRIDES)
        if name in STAGES and STAGES[name].array:
            sub.add_argument("--part", metavar="K/N", help="only part K, 0 to N-1, of a job that is cut into N")
        if name in ("run", "train"):
            sub.add_argument("--dry-run", action="store_true", help="cluster=slurm: print what sbatch would be given")
            sub.add_argument(
                "--resume",
                metavar="auto|never|PATH",
                help="from the run's newest whole checkpoint (auto, the default), from PATH, or refuse to go on",
            )


def _of_files(subs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Commands that look into checkpoints and latents."""
    checkpoint = _command(subs, "checkpoint", "on_files:checkpoint", "what checkpoints a run has, and what is in them")
    checkpoint.add_argument(
        "folder", type=Path, metavar="DIR", help="a run's directory, or one step_… in it to explain"
    )
    checkpoint.add_argument("--verify", action="store_true", help="hold them against their checksums: reads all of it")

    index = _command(subs, "index", "on_files:index", "an index for tars of latents that are there, or a check of one")
    index.add_argument("folder", help="holds *.tar, made by `spresso prepare`, WebDataset or tar; or train/ and test/")
    index.add_argument("--verify", action="store_true", help="hold the tars against their index, and write nothing")
    index.add_argument(
        "--autoencoder", choices=("spectral", "woosh", "oobleck"), help="whose latents (default: as before)"
    )
    index.add_argument("--autoencoder-folder", type=Path, help="of a pretrained autoencoder")
    index.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (%(default)s)")

    data = _command(subs, "data", "on_files:data", "a set of latents at a glance")
    data.add_argument("location", metavar="DIR", help="a set, or a folder with train/ and test/; or its URL")
    data.add_argument("--play-to", type=Path, metavar="FOLDER", help="decode some samples to wav files there")
    data.add_argument("--samples", type=int, default=5, help="so many of them (%(default)s)")


def _of_streams(subs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Commands that use a trained codec."""
    encode = _command(subs, "encode", "on_sounds:encode", "a sound file → a stream, or a folder of them")
    encode.add_argument("input", type=Path, metavar="IN.wav", help="or a folder")
    encode.add_argument("output", type=Path, metavar="OUT.spr", help="or a folder")
    encode.add_argument("--books", type=int, help="use the first so many codebooks: fewer bits (default: all)")
    encode.add_argument(
        "--channels",
        default="auto",
        choices=("auto", "separate", "mid_side"),
        help="how stereo is coded (auto: as mid and side)",
    )
    encode.add_argument("--no-entropy-coding", action="store_true", help="also where the codec has a prior for it")
    _codec_options(encode)

    decode = _command(subs, "decode", "on_sounds:decode", "a stream → a sound file, or a folder of them")
    decode.add_argument("input", type=Path, metavar="IN.spr", help="or a folder")
    decode.add_argument("output", type=Path, metavar="OUT.wav", help="or a folder")
    decode.add_argument(
        "--seed", type=int, default=0, help="another seed, another sound with the same codes (%(default)s)"
    )
    decode.add_argument("--steps", type=int, help="steps of the sampler (default: the codec's)")
    decode.add_argument(
        "--samples", type=int, default=1, help="so many decodes of the same codes: OUT.0.wav, OUT.1.wav … (%(default)s)"
    )
    decode.add_argument("--rate", type=int, help="samples a second (default: those of the sound that was encoded)")
    _codec_options(decode)

    info = _command(subs, "info", "on_sounds:info", "what a stream holds, and what it costs")
    info.add_argument("input", type=Path, metavar="FILE.spr")
    info.add_argument("--codec", type=Path, help="the export that made it (default: the one under runs/)")


def _listening(subs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    test = _command(
        subs, "listen-test", "on_recipes:listen_test", "a blind MUSHRA test of the evaluated clips, for webMUSHRA"
    )
    test.add_argument("recipe", help=_RECIPE)
    test.add_argument("out", type=Path, metavar="OUT", help="the folder to make; beside it OUT.key.json, to keep back")
    test.add_argument("overrides", nargs="*", metavar="key=value", help=_OVERRIDES)
    test.add_argument("--systems", help="their keys in evaluation.json, with commas (default: all that the page plays)")
    test.add_argument("--clips", type=int, help="(default: all that the page plays)")
    test.add_argument("--seed", type=int, default=0, help="another seed, other names and orders (%(default)s)")


def _of_runs(subs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Commands about runs that are under way, on a cluster or here."""
    run = "a run's directory, or its name under runs/"
    status = _command(subs, "status", "on_runs:status", "what runs, where, how far, and when it will be done")
    status.add_argument("run", nargs="?", metavar="RUN", help=f"{run}; default: all under runs/, in short")
    logs = _command(subs, "logs", "on_runs:logs", "what a run writes")
    logs.add_argument("run", metavar="RUN", help=run)
    logs.add_argument("--stage", help="(default: the one that runs, or ran last)")
    logs.add_argument("--rank", type=int, help="(default: 0)")
    logs.add_argument("-f", "--follow", action="store_true", help="go on as it is written, until Ctrl-C")
    for name, command, help_ in (
        ("cancel", "on_runs:cancel", "end all jobs of a run; those that train save first"),
        (
            "requeue",
            "on_runs:requeue",
            "have a run's job save, leave its nodes and wait for new ones; or submit it anew",
        ),
    ):
        _command(subs, name, command, help_).add_argument("run", metavar="RUN", help=run)


def _command(
    subs: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    command: str,
    help_: str,
) -> argparse.ArgumentParser:
    """Add a command; `command` is `module:function` in `launch.commands`."""
    sub = subs.add_parser(name, help=help_, description=help_[0].upper() + help_[1:] + ".", allow_abbrev=False)
    sub.set_defaults(command=command)
    return sub


def _codec_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--codec",
        type=Path,
        help="an export folder (default: the newest under runs/; decode takes the one that fits the stream)",
    )
    sub.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="(%(default)s)")
    sub.add_argument("--force", action="store_true", help="of a folder also do again what is there")


class _Version(argparse.Action):
    """Print the version when it is asked for: git is not asked at every start."""

    def __init__(self, option_strings: list[str], dest: str, **options: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, **options)

    def __call__(self, parser: argparse.ArgumentParser, *unused: Any) -> None:
        """Print it and leave."""
        from importlib import metadata  # here, with the next: together they take as long as all of `--help`

        from trainer.provenance import code_version

        python = sys.version.partition(" ")[0]
        print(f"spresso {metadata.version('spresso')}, code {code_version()[:12]}, Python {python}")
        parser.exit()


def _line(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        where = f" for {error.filename}" if error.filename else ""
        return f"no space left on the disk{where}: free some, or take another run_dir=…, and run the same command again"
    return str(error)


def command() -> None:
    """`main` as a process of its own.

    Where torch was used it ends here and now, when all that is registered for the end has been done: threads of torch
    and of what computes for it do not always survive the interpreter's own end, and abort what has succeeded.
    """
    status = main()
    if "torch" in sys.modules:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    command()
