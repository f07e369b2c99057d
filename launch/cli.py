"""The program `spresso`: its commands and their options.

The functions behind the commands are in `launch.commands`. They are imported only when a command is called, so that
`--help` is fast.
"""

from __future__ import annotations

import argparse
import atexit
import importlib
import os
import sys
import textwrap
from pathlib import Path
from typing import Any

from launch.number_option import add_number
from launch.output import survive_readers
from launch.signals import INTERRUPTED
from models.ranges import Range
from trainer.cpus import usable_cpus
from trainer.stages import STAGES, trained_stages

_OVERRIDES = (
    "settings that replace those of the recipe, such as autoencode.lr=1e-4 run_dir=runs/try2; `spresso plan RECIPE` "
    "lists all settings"
)
_WORKERS = Range(least=1, most=4096)
_SEED = Range(least=0)
_TRACED = Range(least=1, most=20)  # of `trainer.log.trace_request`, whose import takes as long as all of `--help`
_RATE = Range(least=100, most=768_000)  # of a stream, see `models.bitstream`, whose import takes longer than `--help`
_RECIPE = "a YAML file, or the name of a recipe in configs/, such as demo"


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit status: 2 for a user's mistake, which is reported in one line."""
    options = _parse(arguments)
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
        from launch.error_line import describe_error  # imported here, so that `--help` is fast

        print(textwrap.indent(describe_error(error), "spresso: "), file=sys.stderr)
        return 2


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse a command line; settings of a recipe may also follow an option, where argparse alone does not take them."""
    top = parser()
    options, rest = top.parse_known_args(arguments)
    if unknown := [word for word in rest if word.startswith("-") or "=" not in word or "overrides" not in options]:
        top.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        options.overrides += rest
    return options


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands and their options."""
    top = argparse.ArgumentParser(
        prog="spresso",
        description="Train S-PRESSO-type audio codecs and use them.",
        epilog="Begin with `spresso run tiny`, which tests the installation; `spresso COMMAND --help` explains more.",
        allow_abbrev=False,
    )
    top.add_argument("--version", action=_Version, help="print the version of the program and of its code, and exit")
    subs = top.add_subparsers(metavar="COMMAND", required=True)

    synth = _add_command(
        subs, "synth", "on_sounds:synth", "synthesize captioned sound effects, to try training without a data set"
    )
    synth.add_argument("folder", type=_path, help="folder to write the sounds to")
    hours = Range(above=0, most=100_000)
    add_number(synth, "--hours", hours, "hours of sound to make", kind=float, default=0.5)
    add_number(synth, "--seed", Range(least=0, most=2**64 - 1), "random seed of the sounds", default=0)
    _add_workers(synth)

    _add_recipe_commands(subs)
    _add_listening_test(subs)
    _add_run_commands(subs)
    _add_file_commands(subs)
    _add_codec_commands(subs)
    _add_hub_commands(subs)
    return top


def _add_recipe_commands(subs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the commands that take a recipe."""
    for name, command, help_ in (
        ("run", "on_recipes:run", "run all stages of a recipe in order; if repeated, resume where the run stopped"),
        ("prepare", "on_recipes:prepare", "encode sound files into shards of latents"),
        ("train", "on_recipes:train", f"train one stage, given as stage={'|'.join(trained_stages())}"),
        ("evaluate", "on_recipes:evaluate", "score the trained codec on held-out clips"),
        ("page", "on_recipes:page", "write the web page that plays and compares the evaluated clips"),
        (
            "plan",
            "on_recipes:plan",
            "print the resolved config, batch sizes, bit rates and memory per rank; start nothing",
        ),
        (
            "sbatch",
            "on_recipes:sbatch",
            "print one script for sbatch that runs all stages in one job, or only stage=STAGE",
        ),
    ):
        sub = _add_command(subs, name, command, help_)
        sub.add_argument("recipe", help=_RECIPE)
        sub.add_argument("overrides", nargs="*", metavar="key=value", help=_OVERRIDES)
        if name in STAGES and STAGES[name].array:
            sub.add_argument(
                "--part", metavar="K/N", help="process only part K of N, K from 0 to N-1 (default: 0/1, all)"
            )
        if name in ("run", "train"):
            sub.add_argument(
                "--dry-run",
                action="store_true",
                help="with cluster=slurm: print the scripts for sbatch, submit nothing",
            )
            sub.add_argument(
                "--resume",
                metavar="auto|never|PATH",
                help="auto: resume from the newest complete checkpoint of the run, if there is one (the default); "
                "never: refuse a directory that already holds a run; PATH, or a URL: resume from this checkpoint "
                "(train only)",
            )


def _add_file_commands(subs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the commands that inspect checkpoints and latents."""
    checkpoint = _add_command(
        subs, "checkpoint", "on_files:checkpoint", "list the checkpoints of a run, or describe one"
    )
    checkpoint.add_argument(
        "folder", type=_path, metavar="DIR", help="directory of a run; or of one checkpoint, step_…, to describe"
    )
    checkpoint.add_argument(
        "--verify",
        action="store_true",
        help="compare each checkpoint with its checksums, which reads all files in full",
    )

    index = _add_command(
        subs,
        "index",
        "on_files:index",
        "build the index of existing tar files of latents, or verify the files with it",
    )
    index.add_argument(
        "folder", help="folder with *.tar files, made by `spresso prepare`, WebDataset or tar; or with train/ and test/"
    )
    index.add_argument("--verify", action="store_true", help="compare the tar files with their index and write nothing")
    index.add_argument(
        "--autoencoder",
        choices=("spectral", "magnitude", "magnitude_stereo", "woosh", "oobleck", "same"),
        help="autoencoder that made the latents (default: the one that the existing index names)",
    )
    index.add_argument("--autoencoder-folder", type=_path, help="folder with its weights, for woosh, oobleck and same")
    _add_workers(index)

    data = _add_command(subs, "data", "on_files:data", "summarize a set of latents")
    data.add_argument("location", metavar="DIR", help="folder or URL of a set, or of its parent with train/ and test/")
    data.add_argument("--play-to", type=_path, metavar="FOLDER", help="decode some samples to wav files in this folder")
    add_number(data, "--samples", Range(least=1), "number of samples to decode", default=5)


def _add_codec_commands(subs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the commands that use a trained codec."""
    encode = _add_command(
        subs, "encode", "on_sounds:encode", "encode a sound file, or all sound files in a folder, into .spr streams"
    )
    encode.add_argument("input", type=_path, metavar="IN.wav", help="sound file, or folder of sound files")
    encode.add_argument("output", type=_path, metavar="OUT.spr", help="stream to write, or folder of streams")
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
        help="let several channels follow one another in short turns, so that the stream can be decoded while it comes",
    )
    _add_codec_options(encode)

    decode = _add_command(
        subs, "decode", "on_sounds:decode", "decode an .spr stream, or all streams in a folder, into sound files"
    )
    decode.add_argument(
        "input", type=_path, metavar="IN.spr", help="stream, folder of streams, or - for standard input"
    )
    decode.add_argument(
        "output",
        type=_path,
        nargs="?",
        metavar="OUT.wav",
        help="sound file to write, folder of sound files, or - for standard output (default: -), which gets a WAV file "
        "while the stream comes",
    )
    add_number(decode, "--seed", _SEED, "random seed; another seed gives another sound", default=0)
    steps = Range(least=1, most=100_000)
    add_number(decode, "--steps", steps, "steps of the diffusion sampler", without="as stored in the codec")
    times = "number of times to decode the same codes, to OUT.0.wav, OUT.1.wav …"
    add_number(decode, "--samples", Range(least=1, most=100_000), times, default=1)
    add_number(decode, "--rate", _RATE, "sample rate in Hz to write", without="that of the encoded sound")
    _add_codec_options(decode)

    info = _add_command(subs, "info", "on_sounds:info", "show the contents and the bit rate of a stream")
    info.add_argument("input", type=_path, metavar="FILE.spr", help="stream to read")
    info.add_argument(
        "--codec", type=_path, help="export folder, or name on the hub, of its codec (default: found under runs/)"
    )


def _add_hub_commands(subs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the commands for public weights and the hub."""
    weights = _add_command(
        subs, "weights", "on_hub:weights", "list the public weights to start from and how to get them, or check some"
    )
    weights.add_argument(
        "folder",
        nargs="?",
        type=_path,
        metavar="FOLDER",
        help="folder of a release or an export, name in the hub's cache, or archive, to check for missing and damaged "
        "files (default: list all weights)",
    )
    help_ = "put a codec on the Hugging Face hub, with its model card; `hf auth login` comes first"
    push = _add_command(subs, "push", "on_hub:push", help_)
    push.add_argument("codec", type=_path, metavar="RUN", help="directory or name of a run, or an export folder")
    push.add_argument("name", metavar="OWNER/NAME", help="name on the hub; the model is made if it is not there")
    push.add_argument("--private", action="store_true", help="make a private model")
    push.add_argument("--revision", metavar="BRANCH", help="branch to commit to (default: main)")
    push.add_argument(
        "--evaluation", type=_path, metavar="FOLDER", help="evaluation whose figures to show (default: the run's)"
    )
    sounds = "clips of the evaluation to upload, with their decodes; you need the right to publish them"
    add_number(push, "--sounds", Range(least=0, most=100), sounds, default=0)
    push.add_argument(
        "--license", metavar="ID", help="the codec's licence by the hub's name, such as cc-by-4.0 (default: its base's)"
    )
    push.add_argument("--dry-run", action="store_true", help="print the files and the card; upload nothing")


def _add_listening_test(subs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command that makes a listening test."""
    test = _add_command(
        subs,
        "listen-test",
        "on_recipes:listen_test",
        "make a blind MUSHRA listening test of the evaluated clips",
    )
    test.add_argument("recipe", help=_RECIPE)
    test.add_argument(
        "out",
        type=_path,
        metavar="OUT",
        help="folder to write, for webMUSHRA; keep OUT.key.json, which names the systems, from the listeners",
    )
    test.add_argument("overrides", nargs="*", metavar="key=value", help=_OVERRIDES)
    test.add_argument(
        "--systems", help="systems to test: keys in evaluation.json, separated by commas (default: all on the page)"
    )
    add_number(test, "--clips", Range(least=1), "number of clips to test", without="all on the page")
    add_number(test, "--seed", _SEED, "random seed of file names and order", default=0)


def _add_run_commands(subs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the commands that watch and control runs, on a cluster or on this machine."""
    run = "directory of a run, or its name under runs/"
    status = _add_command(subs, "status", "on_runs:status", "show the state, progress and expected end of runs")
    status.add_argument(
        "run",
        nargs="?",
        metavar="RUN",
        help=f"{run}; also shows each start of its jobs (default: an overview of all runs under runs/)",
    )
    logs = _add_command(subs, "logs", "on_runs:logs", "show the log of a run")
    logs.add_argument("run", metavar="RUN", help=run)
    logs.add_argument("--stage", help="stage whose log to show (default: the one that is running or ran last)")
    add_number(logs, "--rank", Range(least=0), "rank whose log to show", without="0")
    logs.add_argument("-f", "--follow", action="store_true", help="keep printing new lines until Ctrl-C")
    profile = _add_command(
        subs,
        "profile",
        "on_runs:profile",
        "trace some steps of a running training, which goes on, and show the costliest kernels; "
        "log.profile_steps=N does so for a new run",
    )
    profile.add_argument("run", metavar="RUN", help=run)
    add_number(profile, "--steps", _TRACED, "number of steps to trace", default=5)
    for name, command, help_ in (
        ("cancel", "on_runs:cancel", "cancel all jobs of a run; training jobs save first"),
        (
            "requeue",
            "on_runs:requeue",
            "make a running job save and return to the queue; if the run has no jobs, submit it again",
        ),
    ):
        _add_command(subs, name, command, help_).add_argument("run", metavar="RUN", help=run)


def _add_command(
    subs: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    command: str,
    help_: str,
) -> argparse.ArgumentParser:
    """Add a command, whose function is `command` (`module:function`) in `launch.commands`."""
    sub = subs.add_parser(name, help=help_, description=help_[0].upper() + help_[1:] + ".", allow_abbrev=False)
    sub.set_defaults(command=command)
    return sub


def _add_workers(sub: argparse.ArgumentParser) -> None:
    """Add the option that sets the number of processes."""
    without = "the number of CPUs that may be used, %(default)s"
    add_number(sub, "--workers", _WORKERS, "number of processes", default=usable_cpus(), without=without)


def _add_codec_options(sub: argparse.ArgumentParser) -> None:
    """Add the options that `encode` and `decode` share."""
    sub.add_argument(
        "--codec",
        type=_path,
        help="export folder of the codec, or OWNER/NAME[@REVISION] on the hub (default: the newest under runs/; for "
        "decode, the one that made the stream)",
    )
    sub.add_argument(
        "--device", default="auto", choices=("auto", "cpu", "cuda"), help="device to compute on (default: %(default)s)"
    )
    sub.add_argument("--force", action="store_true", help="in a folder, also redo files that are already converted")


def _path(text: str) -> Path:
    """Return a path with `~` expanded, which the shell leaves as it is after a `=`."""
    return Path(os.path.expanduser(text))  # noqa: PTH111 (pathlib raises RuntimeError for an unknown home)


class _Version(argparse.Action):
    """Prints the version. It is an action so that git runs only for `--version`, not at every start."""

    def __init__(self, option_strings: list[str], dest: str, **options: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, **options)

    def __call__(self, parser: argparse.ArgumentParser, *unused: Any) -> None:
        """Print the version and exit."""
        from importlib import metadata  # imported here: these two imports take as long as all of `--help`

        from trainer.provenance import code_version

        python = sys.version.partition(" ")[0]
        print(f"spresso {metadata.version('spresso')}, code {code_version()[:12]}, Python {python}")
        parser.exit()


def command() -> None:
    """Run `main` and end the process.

    If torch was imported, the process runs its exit handlers and then ends without the interpreter's own shutdown:
    threads of torch do not always survive that shutdown and would abort a command that has succeeded.
    """
    survive_readers()
    status = main()
    if "torch" in sys.modules:
        if not _hangs():
            atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _hangs() -> bool:
    """Whether a tracker was left behind that hangs: the exit handlers of its package would wait for it."""
    background = sys.modules.get("trainer.log.trackers.background")
    return background is not None and background.any_abandoned()


if __name__ == "__main__":
    command()
