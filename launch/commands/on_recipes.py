"""Commands that take a recipe: `run`, `train`, `prepare`, `evaluate`, `page`, `plan`, `sbatch`, `listen-test`."""

from __future__ import annotations

import argparse
import sys

from launch import pipeline
from launch.plan import plan as plan_lines
from launch.signals import STOPPED
from launch.slurm import submit
from trainer.recipes.reading import load_recipe
from trainer.recipes.schema import Config
from trainer.stages import STAGES, is_trained, trained_stages


def run(options: argparse.Namespace) -> int:
    """All stages of a recipe."""
    config = load_recipe(options.recipe, _overrides(options))
    if config.cluster.kind == "slurm":
        return _submit(config, None, dry=options.dry_run)
    return _outcome(pipeline.run(config))


def _submit(config: Config, stage: str | None, *, dry: bool) -> int:
    if not dry:
        submit.run(config, only=stage)
        return 0
    for name, text in submit.scripts(config, only=stage):
        print(f"# ---- {name}\n{text}")
    return 0


def train(options: argparse.Namespace) -> int:
    """One trained stage."""
    stage, overrides = _named_stage(_overrides(options))
    if stage is None or not is_trained(stage):
        raise ValueError(f"say which stage to train: stage={'|'.join(trained_stages())}")
    config = load_recipe(options.recipe, overrides)
    if config.cluster.kind == "slurm":
        return _submit(config, stage, dry=options.dry_run)
    return _outcome(pipeline.train(config, stage))


def _overrides(options: argparse.Namespace) -> list[str]:
    """The settings given, and `--resume`, which is one too."""
    return [*options.overrides, *([f"checkpoint.resume={options.resume}"] if options.resume else [])]


def _named_stage(overrides: list[str]) -> tuple[str | None, list[str]]:
    """The stage that `stage=…` names, and the other overrides."""
    named = [override.removeprefix("stage=") for override in overrides if override.startswith("stage=")]
    return named[-1] if named else None, [item for item in overrides if not item.startswith("stage=")]


def _outcome(outcome: str) -> int:
    if outcome == "stopped":
        print("spresso: stopped and saved; the same command goes on from there", file=sys.stderr)
        return STOPPED
    return 0


def prepare(options: argparse.Namespace) -> None:
    """Sound files → latents."""
    part, parts = _part(options)
    pipeline.prepare_latents(load_recipe(options.recipe, options.overrides), part=part, parts=parts)


def evaluate(options: argparse.Namespace) -> None:
    """Figures of the trained codec."""
    part, parts = _part(options)
    pipeline.evaluate(load_recipe(options.recipe, options.overrides), part=part, parts=parts)


def _part(options: argparse.Namespace) -> tuple[int, int]:
    part, slash, parts = (options.part or "0/1").partition("/")
    if not (slash and part.isdecimal() and parts.isdecimal() and int(part) < int(parts)):
        raise ValueError(f"--part {options.part} is not like 0/8, one of 0/8 to 7/8")
    return int(part), int(parts)


def page(options: argparse.Namespace) -> None:
    """The page to listen to."""
    pipeline.run_stage(load_recipe(options.recipe, options.overrides), "page")


def plan(options: argparse.Namespace) -> None:
    """The resolved config, batches and memory."""
    for line in plan_lines(load_recipe(options.recipe, options.overrides, released=False)):
        print(line, flush=True)


def listen_test(options: argparse.Namespace) -> None:
    """A blind listening test."""
    systems = options.systems.split(",") if options.systems else None
    config = load_recipe(options.recipe, options.overrides)
    pipeline.listening_test(config, options.out, systems=systems, clips=options.clips, seed=options.seed)


def sbatch(options: argparse.Namespace) -> None:
    """A script for plain sbatch."""
    stage, overrides = _named_stage(options.overrides)
    if stage is not None and stage not in STAGES:
        raise ValueError(f"stage={stage} is none of {', '.join(STAGES)}")
    print(submit.whole_script(load_recipe(options.recipe, overrides), only=stage))
