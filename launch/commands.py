"""What each command of `spresso` does with its options. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainer.recipes.schema import Config


def synth(options: argparse.Namespace) -> None:
    """Sounds for those who have none."""
    from launch.pipeline import synthesize

    synthesize(options.folder, hours=options.hours, seed=options.seed, workers=options.workers)


def index(options: argparse.Namespace) -> None:
    """An index for tars, or a check of one."""
    from launch import inspect_files

    if options.verify:
        inspect_files.verify(options.folder, workers=options.workers)
    else:
        inspect_files.index(
            options.folder, kind=options.autoencoder, weights=options.autoencoder_folder, workers=options.workers
        )


def data(options: argparse.Namespace) -> None:
    """A set of latents at a glance."""
    from launch import inspect_files

    if options.samples < 1:
        raise ValueError("--samples is at least 1")
    inspect_files.describe(options.location, samples=options.samples, play_to=options.play_to)


def checkpoint(options: argparse.Namespace) -> int:
    """The checkpoints of a run."""
    from launch import inspect_files

    return inspect_files.checkpoint(options.folder, verify=options.verify)


def run(options: argparse.Namespace) -> int:
    """All stages of a recipe."""
    from launch import pipeline
    from trainer.recipes.reading import load_recipe

    config = load_recipe(options.recipe, _overrides(options))
    if config.cluster.kind == "slurm":
        return _submit(config, None, dry=options.dry_run)
    return _outcome(pipeline.run(config))


def _submit(config: Config, stage: str | None, *, dry: bool) -> int:
    from launch.slurm import submit

    if not dry:
        submit.run(config, only=stage)
        return 0
    for name, text in submit.scripts(config, only=stage):
        print(f"# ---- {name}\n{text}")
    return 0


def sbatch(options: argparse.Namespace) -> None:
    """A script for plain sbatch."""
    from launch.slurm import submit
    from trainer.recipes.reading import load_recipe
    from trainer.stages import STAGES

    stage, overrides = _named_stage(options.overrides)
    if stage is not None and stage not in STAGES:
        raise ValueError(f"stage={stage} is none of {', '.join(STAGES)}")
    print(submit.whole_script(load_recipe(options.recipe, overrides), only=stage))


def _named_stage(overrides: list[str]) -> tuple[str | None, list[str]]:
    """The stage that `stage=…` names, and the other overrides."""
    named = [override.removeprefix("stage=") for override in overrides if override.startswith("stage=")]
    return named[-1] if named else None, [item for item in overrides if not item.startswith("stage=")]


def status(options: argparse.Namespace) -> None:
    """How far runs are."""
    from launch.status import table

    print(table.report(table.resolve(options.run) if options.run else None))


def logs(options: argparse.Namespace) -> None:
    """What a run writes."""
    from launch.status import logs, table

    logs.logs(table.resolve(options.run), stage=options.stage, rank=options.rank, follow=options.follow)


def cancel(options: argparse.Namespace) -> None:
    """End a run's jobs."""
    from launch.status import table

    print(table.cancel(table.resolve(options.run)), file=sys.stderr)


def requeue(options: argparse.Namespace) -> None:
    """Have a run leave its nodes and wait for others."""
    from launch.status import table

    run = table.resolve(options.run)
    told = table.requeue(run)
    if told is not None:
        print(told, file=sys.stderr)
        return
    from launch.slurm import submit
    from trainer.recipes.reading import load_recipe

    submit.run(load_recipe(str(run / "config.yaml"), []))


def _overrides(options: argparse.Namespace) -> list[str]:
    """The settings given, and `--resume`, which is one too."""
    return [*options.overrides, *([f"checkpoint.resume={options.resume}"] if options.resume else [])]


def train(options: argparse.Namespace) -> int:
    """One trained stage."""
    from launch import pipeline
    from trainer.recipes.reading import load_recipe
    from trainer.stages import is_trained, trained_stages

    stage, overrides = _named_stage(_overrides(options))
    if stage is None or not is_trained(stage):
        raise ValueError(f"say which stage to train: stage={'|'.join(trained_stages())}")
    config = load_recipe(options.recipe, overrides)
    if config.cluster.kind == "slurm":
        return _submit(config, stage, dry=options.dry_run)
    return _outcome(pipeline.train(config, stage))


def _outcome(outcome: str) -> int:
    from launch.signals import STOPPED

    if outcome == "stopped":
        print("spresso: stopped and saved; the same command goes on from there", file=sys.stderr)
        return STOPPED
    return 0


def prepare(options: argparse.Namespace) -> None:
    """Sound files → latents."""
    from launch import pipeline
    from trainer.recipes.reading import load_recipe

    part, parts = _part(options)
    pipeline.prepare_latents(load_recipe(options.recipe, options.overrides), part=part, parts=parts)


def evaluate(options: argparse.Namespace) -> None:
    """Figures of the trained codec."""
    from launch import pipeline
    from trainer.recipes.reading import load_recipe

    part, parts = _part(options)
    pipeline.evaluate(load_recipe(options.recipe, options.overrides), part=part, parts=parts)


def _part(options: argparse.Namespace) -> tuple[int, int]:
    part, slash, parts = (options.part or "0/1").partition("/")
    if not (slash and part.isdecimal() and parts.isdecimal() and int(part) < int(parts)):
        raise ValueError(f"--part {options.part} is not like 0/8, one of 0/8 to 7/8")
    return int(part), int(parts)


def listen_test(options: argparse.Namespace) -> None:
    """A blind listening test."""
    from launch import pipeline
    from trainer.recipes.reading import load_recipe

    systems = options.systems.split(",") if options.systems else None
    config = load_recipe(options.recipe, options.overrides)
    pipeline.listening_test(config, options.out, systems=systems, clips=options.clips, seed=options.seed)


def page(options: argparse.Namespace) -> None:
    """The page to listen to."""
    from launch import pipeline
    from trainer.recipes.reading import load_recipe

    pipeline.run_stage(load_recipe(options.recipe, options.overrides), "page")


def plan(options: argparse.Namespace) -> None:
    """The resolved config, batches and memory."""
    from launch.plan import plan
    from trainer.recipes.reading import load_recipe

    for line in plan(load_recipe(options.recipe, options.overrides, released=False)):
        print(line, flush=True)


def encode(options: argparse.Namespace) -> int:
    """Sound → streams."""
    from launch import codec_files

    failed = codec_files.encode(
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


def decode(options: argparse.Namespace) -> int:
    """Streams → sound."""
    from launch import codec_files

    failed = codec_files.decode(
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


def info(options: argparse.Namespace) -> None:
    """What a stream holds."""
    from launch import codec_files

    codec_files.info(options.input, codec=options.codec)
