"""Commands that take a recipe: `run`, `train`, `prepare`, `evaluate`, `page`, `plan`, `sbatch`, `listen-test`."""

from __future__ import annotations

import argparse
import re
import sys

from launch import pipeline
from launch.launcher_variables import require_whole_launch
from launch.notify import telling
from launch.plan import plan as plan_lines
from launch.signals import STOPPED
from launch.slurm import submit
from trainer.file_names import printable_lines
from trainer.recipes.reading import load_recipe
from trainer.recipes.schema import Config
from trainer.stages import STAGES, is_trained, trained_stages

_PART = re.compile(r"(\d{1,6})/(\d{1,6})", re.ASCII)


def run(options: argparse.Namespace) -> int:
    """Run all stages of a recipe, or submit them as jobs; return the exit status."""
    config = load_recipe(options.recipe, _overrides(options))
    if config.cluster.kind == "slurm":
        return _submit(config, None, dry=options.dry_run)
    _require_no_dry_run(options)
    require_whole_launch()
    return _exit_status(telling(config, lambda: pipeline.run(config)))


def _submit(config: Config, stage: str | None, *, dry: bool) -> int:
    if stage is None:
        pipeline.require_settings_of_all_stages(config)
    if not dry:
        submit.run(config, only=stage)
        return 0
    for name, text in submit.scripts(config, only=stage):
        print(f"# ---- {name}\n{text}")
    return 0


def _require_no_dry_run(options: argparse.Namespace) -> None:
    if options.dry_run:
        raise ValueError(
            f"--dry-run prints the scripts of cluster=slurm: add that, or take `spresso plan {options.recipe}`, which "
            "shows what a run would do here"
        )


def train(options: argparse.Namespace) -> int:
    """Train one stage, or submit it as a job; return the exit status. Raises ValueError without a trained stage."""
    stage, overrides = _named_stage(_overrides(options))
    if stage is None or not is_trained(stage):
        raise ValueError(f"name the stage to train: stage={'|'.join(trained_stages())}")
    config = load_recipe(options.recipe, overrides)
    if config.cluster.kind == "slurm":
        return _submit(config, stage, dry=options.dry_run)
    _require_no_dry_run(options)
    require_whole_launch()
    return _exit_status(telling(config, lambda: pipeline.train(config, stage), stage=stage))


def _overrides(options: argparse.Namespace) -> list[str]:
    """Return the overrides, with `--resume` as one of them."""
    return [*options.overrides, *([f"checkpoint.resume={options.resume}"] if options.resume else [])]


def _named_stage(overrides: list[str]) -> tuple[str | None, list[str]]:
    """Return the stage that `stage=…` names, or None, and the other overrides."""
    named = [override.removeprefix("stage=") for override in overrides if override.startswith("stage=")]
    return named[-1] if named else None, [item for item in overrides if not item.startswith("stage=")]


def _exit_status(outcome: str) -> int:
    if outcome == "stopped":
        print("spresso: stopped and saved; repeat the command to resume", file=sys.stderr)
        return STOPPED
    return 0


def prepare(options: argparse.Namespace) -> None:
    """Encode sound files into latents."""
    part, parts = _part(options)
    pipeline.prepare_latents(load_recipe(options.recipe, options.overrides), part=part, parts=parts)


def evaluate(options: argparse.Namespace) -> None:
    """Score the trained codec."""
    part, parts = _part(options)
    pipeline.evaluate(load_recipe(options.recipe, options.overrides), part=part, parts=parts)


def _part(options: argparse.Namespace) -> tuple[int, int]:
    match = _PART.fullmatch(options.part or "0/1")
    if not match or int(match[1]) >= int(match[2]):
        raise ValueError(f"--part {options.part} is not K/N with K from 0 to N-1, such as 0/8, and N below a million")
    return int(match[1]), int(match[2])


def page(options: argparse.Namespace) -> None:
    """Write the listening page."""
    pipeline.run_stage(load_recipe(options.recipe, options.overrides), "page")


def plan(options: argparse.Namespace) -> None:
    """Print the resolved config, batch sizes, bit rates and memory."""
    for line in plan_lines(load_recipe(options.recipe, options.overrides, released=False)):
        print(printable_lines(line), flush=True)


def listen_test(options: argparse.Namespace) -> None:
    """Make a blind listening test."""
    systems = options.systems.split(",") if options.systems else None
    config = load_recipe(options.recipe, options.overrides)
    pipeline.listening_test(config, options.out, systems=systems, clips=options.clips, seed=options.seed)


def sbatch(options: argparse.Namespace) -> None:
    """Print a script for plain sbatch; raises ValueError if `stage=…` names no stage."""
    stage, overrides = _named_stage(options.overrides)
    if stage is not None and stage not in STAGES:
        raise ValueError(f"stage={stage} is not one of {', '.join(STAGES)}")
    print(submit.whole_script(load_recipe(options.recipe, overrides), only=stage))
