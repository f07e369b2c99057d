"""The command `spresso`. Nothing heavy is imported before a command needs it, so that `--help` answers at once."""

from __future__ import annotations

import argparse
import atexit
import errno
import os
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainer.config import Config

_OVERRIDES = (
    "settings of the recipe, such as autoencode.lr=1e-4 run_dir=runs/try2; `spresso plan RECIPE` shows them all"
)
_RECIPE = "a YAML file, or the name of one in configs/, such as demo"


def main(arguments: list[str] | None = None) -> int:
    """Run the command; a user's mistake is one clear line and exit status 2."""
    options = parser().parse_args(arguments)
    try:
        return options.command(options) or 0
    except KeyboardInterrupt:
        from launch.preemption import INTERRUPTED

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
    commands = top.add_subparsers(metavar="COMMAND", required=True)

    synth = _command(commands, "synth", _synth, "make captioned sound effects, for those who have no sounds at hand")
    synth.add_argument("folder", type=Path, help="where the sounds go")
    synth.add_argument("--hours", type=float, default=0.5, help="hours of sound (%(default)s)")
    synth.add_argument("--seed", type=int, default=0, help="another seed, other sounds (%(default)s)")
    synth.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (%(default)s)")

    for name, command, help_ in (
        ("run", _run, "all stages of a recipe in order; run again it goes on where it stopped"),
        ("prepare", _prepare, "sound files → latents in shards"),
        ("train", _train, "one trained stage: stage=pretrain, autoencode, quantize, prior or finetune"),
        ("evaluate", _evaluate, "figures of the trained codec on held-out clips"),
        ("page", _page, "the page to listen to"),
        ("plan", _plan, "the resolved config, the batches, the memory of each rank; starts nothing"),
        ("sbatch", _sbatch, "one script for plain sbatch: all stages in one job, or stage=… alone"),
    ):
        sub = _command(commands, name, command, help_)
        sub.add_argument("recipe", help=_RECIPE)
        sub.add_argument("overrides", nargs="*", metavar="key=value", help=_OVERRIDES)

        if name in ("prepare", "evaluate"):
            sub.add_argument("--part", metavar="K/N", help="only part K, 0 to N-1, of a job that is cut into N")
        if name in ("run", "train"):
            sub.add_argument("--dry-run", action="store_true", help="cluster=slurm: print what sbatch would be given")
        if name in ("run", "train"):
            sub.add_argument(
                "--resume",
                metavar="auto|never|PATH",
                help="from the run's newest whole checkpoint (auto, the default), from PATH, or refuse to go on",
            )

    _listening(commands)
    _of_runs(commands)

    checkpoint = _command(commands, "checkpoint", _checkpoint, "what checkpoints a run has, and what is in them")
    checkpoint.add_argument(
        "folder", type=Path, metavar="DIR", help="a run's directory, or one step_… in it to explain"
    )
    checkpoint.add_argument("--verify", action="store_true", help="hold them against their checksums: reads all of it")

    index = _command(commands, "index", _index, "an index for tars of latents that are there, or a check of one")
    index.add_argument("folder", help="holds *.tar, made by `spresso prepare`, WebDataset or tar; or train/ and test/")
    index.add_argument("--verify", action="store_true", help="hold the tars against their index, and write nothing")
    index.add_argument(
        "--autoencoder", choices=("spectral", "woosh", "oobleck"), help="whose latents (default: as before)"
    )
    index.add_argument("--autoencoder-folder", type=Path, help="of a pretrained autoencoder")
    index.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (%(default)s)")

    data = _command(commands, "data", _data, "a set of latents at a glance")
    data.add_argument("location", metavar="DIR", help="a set, or a folder with train/ and test/; or its URL")
    data.add_argument("--play-to", type=Path, metavar="FOLDER", help="decode some samples to wav files there")
    data.add_argument("--samples", type=int, default=5, help="so many of them (%(default)s)")

    _of_streams(commands)
    return top


def _of_streams(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Commands that use a trained codec."""
    encode = _command(commands, "encode", _encode, "a sound file → a stream, or a folder of them")
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

    decode = _command(commands, "decode", _decode, "a stream → a sound file, or a folder of them")
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

    info = _command(commands, "info", _info, "what a stream holds, and what it costs")
    info.add_argument("input", type=Path, metavar="FILE.spr")
    info.add_argument("--codec", type=Path, help="the export that made it (default: the one under runs/)")


def _listening(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    test = _command(commands, "listen-test", _listen_test, "a blind MUSHRA test of the evaluated clips, for webMUSHRA")
    test.add_argument("recipe", help=_RECIPE)
    test.add_argument("out", type=Path, metavar="OUT", help="the folder to make; beside it OUT.key.json, to keep back")
    test.add_argument("overrides", nargs="*", metavar="key=value", help=_OVERRIDES)
    test.add_argument("--systems", help="their keys in evaluation.json, with commas (default: all that the page plays)")
    test.add_argument("--clips", type=int, help="(default: all that the page plays)")
    test.add_argument("--seed", type=int, default=0, help="another seed, other names and orders (%(default)s)")


def _of_runs(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Commands about runs that are under way, on a cluster or here."""
    run = "a run's directory, or its name under runs/"
    status = _command(commands, "status", _status, "what runs, where, how far, and when it will be done")
    status.add_argument("run", nargs="?", metavar="RUN", help=f"{run}; default: all under runs/, in short")
    logs = _command(commands, "logs", _logs, "what a run writes")
    logs.add_argument("run", metavar="RUN", help=run)
    logs.add_argument("--stage", help="(default: the one that runs, or ran last)")
    logs.add_argument("--rank", type=int, help="(default: 0)")
    logs.add_argument("-f", "--follow", action="store_true", help="go on as it is written, until Ctrl-C")
    for name, command, help_ in (
        ("cancel", _cancel, "end all jobs of a run; those that train save first"),
        ("requeue", _requeue, "have a run's job save, leave its nodes and wait for new ones; or submit it anew"),
    ):
        _command(commands, name, command, help_).add_argument("run", metavar="RUN", help=run)


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    command: Callable[[argparse.Namespace], int | None],
    help_: str,
) -> argparse.ArgumentParser:
    sub = commands.add_parser(name, help=help_, description=help_[0].upper() + help_[1:] + ".", allow_abbrev=False)
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


def _synth(options: argparse.Namespace) -> None:
    from launch.pipeline import synthesize

    synthesize(options.folder, hours=options.hours, seed=options.seed, workers=options.workers)


def _index(options: argparse.Namespace) -> None:
    from launch import files

    if options.verify:
        files.verify(options.folder, workers=options.workers)
    else:
        files.index(
            options.folder, kind=options.autoencoder, weights=options.autoencoder_folder, workers=options.workers
        )


def _data(options: argparse.Namespace) -> None:
    from launch import files

    if options.samples < 1:
        raise ValueError("--samples is at least 1")
    files.describe(options.location, samples=options.samples, play_to=options.play_to)


def _checkpoint(options: argparse.Namespace) -> int:
    from launch import files

    return files.checkpoint(options.folder, verify=options.verify)


def _run(options: argparse.Namespace) -> int:
    from launch import pipeline
    from trainer.recipe import load

    config = load(options.recipe, _overrides(options))
    if config.cluster.kind == "slurm":
        return _submit(config, None, dry=options.dry_run)
    return _outcome(pipeline.run(config))


def _submit(config: Config, stage: str | None, *, dry: bool) -> int:
    from launch import submission

    if not dry:
        submission.run(config, only=stage)
        return 0
    for name, text in submission.scripts(config, only=stage):
        print(f"# ---- {name}\n{text}")
    return 0


def _sbatch(options: argparse.Namespace) -> None:
    from launch import submission
    from trainer.config import STAGES
    from trainer.recipe import load

    stage, overrides = _named_stage(options.overrides)
    if stage is not None and stage not in STAGES:
        raise ValueError(f"stage={stage} is none of {', '.join(STAGES)}")
    print(submission.whole_script(load(options.recipe, overrides), only=stage))


def _named_stage(overrides: list[str]) -> tuple[str | None, list[str]]:
    """The stage that `stage=…` names, and the other overrides."""
    named = [override.removeprefix("stage=") for override in overrides if override.startswith("stage=")]
    return named[-1] if named else None, [item for item in overrides if not item.startswith("stage=")]


def _status(options: argparse.Namespace) -> None:
    from launch import status

    print(status.report(status.resolve(options.run) if options.run else None))


def _logs(options: argparse.Namespace) -> None:
    from launch import logs, status

    logs.logs(status.resolve(options.run), stage=options.stage, rank=options.rank, follow=options.follow)


def _cancel(options: argparse.Namespace) -> None:
    from launch import status

    print(status.cancel(status.resolve(options.run)), file=sys.stderr)


def _requeue(options: argparse.Namespace) -> None:
    from launch import status

    run = status.resolve(options.run)
    told = status.requeue(run)
    if told is not None:
        print(told, file=sys.stderr)
        return
    from launch import submission
    from trainer.recipe import load

    submission.run(load(str(run / "config.yaml"), []))


def _overrides(options: argparse.Namespace) -> list[str]:
    """The settings given, and `--resume`, which is one too."""
    return [*options.overrides, *([f"checkpoint.resume={options.resume}"] if options.resume else [])]


def _train(options: argparse.Namespace) -> int:
    from launch import pipeline
    from trainer.config import TRAINED_STAGES
    from trainer.recipe import load

    stage, overrides = _named_stage(_overrides(options))
    if stage not in TRAINED_STAGES:
        raise ValueError(f"say which stage to train: stage={'|'.join(TRAINED_STAGES)}")
    config = load(options.recipe, overrides)
    if config.cluster.kind == "slurm":
        return _submit(config, stage, dry=options.dry_run)
    return _outcome(pipeline.train(config, stage))


def _outcome(outcome: str) -> int:
    from launch.preemption import STOPPED

    if outcome == "stopped":
        print("spresso: stopped and saved; the same command goes on from there", file=sys.stderr)
        return STOPPED
    return 0


def _prepare(options: argparse.Namespace) -> None:
    from launch import pipeline
    from trainer.recipe import load

    part, parts = _part(options)
    pipeline.prepare_latents(load(options.recipe, options.overrides), part=part, parts=parts)


def _evaluate(options: argparse.Namespace) -> None:
    from launch import pipeline
    from trainer.recipe import load

    part, parts = _part(options)
    pipeline.evaluate(load(options.recipe, options.overrides), part=part, parts=parts)


def _part(options: argparse.Namespace) -> tuple[int, int]:
    part, slash, parts = (options.part or "0/1").partition("/")
    if not (slash and part.isdecimal() and parts.isdecimal() and int(part) < int(parts)):
        raise ValueError(f"--part {options.part} is not like 0/8, one of 0/8 to 7/8")
    return int(part), int(parts)


def _listen_test(options: argparse.Namespace) -> None:
    from launch import pipeline
    from trainer.recipe import load

    systems = options.systems.split(",") if options.systems else None
    config = load(options.recipe, options.overrides)
    pipeline.listening_test(config, options.out, systems=systems, clips=options.clips, seed=options.seed)


def _stage(name: str) -> Callable[[argparse.Namespace], None]:
    def command(options: argparse.Namespace) -> None:
        from launch import pipeline
        from trainer.recipe import load

        pipeline.run_stage(load(options.recipe, options.overrides), name)

    return command


def _page(options: argparse.Namespace) -> None:
    _stage("page")(options)


def _plan(options: argparse.Namespace) -> None:
    from launch.plan import plan
    from trainer.recipe import load

    for line in plan(load(options.recipe, options.overrides, released=False)):
        print(line, flush=True)


def _encode(options: argparse.Namespace) -> int:
    from launch import streams

    failed = streams.encode(
        options.input,
        options.output,
        codec=options.codec,
        device=options.device,
        books=options.books,
        channels=options.channels,
        entropy=not options.no_entropy_coding,
        force=options.force,
    )
    return 1 if failed else 0


def _decode(options: argparse.Namespace) -> int:
    from launch import streams

    failed = streams.decode(
        options.input,
        options.output,
        codec=options.codec,
        device=options.device,
        seed=options.seed,
        steps=options.steps,
        samples=options.samples,
        rate=options.rate,
        force=options.force,
    )
    return 1 if failed else 0


def _info(options: argparse.Namespace) -> None:
    from launch import streams

    streams.info(options.input, codec=options.codec)


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
