"""The commands that take a recipe."""

from __future__ import annotations

from launch.number_option import add_number
from launch.options.common import SEED, Commands, add_command, path
from models.ranges import Range
from trainer.stages import STAGES, trained_stages

_OVERRIDES = (
    "settings that replace those of the recipe, such as autoencode.lr=1e-4 run_dir=runs/try2; `spresso plan RECIPE` "
    "lists all settings"
)
_RECIPE = "a YAML file, or the name of a recipe in configs/, such as demo"


def add_commands(subs: Commands) -> None:
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
        sub = add_command(subs, name, command, help_)
        sub.add_argument("recipe", help=_RECIPE)
        sub.add_argument("overrides", nargs="*", default=[], metavar="key=value", help=_OVERRIDES)
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
                "never: refuse a directory that already holds a run; PATH or URL: resume from this checkpoint "
                "(train only)",
            )
    _add_sweep(subs)
    _add_listening_test(subs)


def _add_sweep(subs: Commands) -> None:
    """Add the command that runs a recipe with many settings."""
    sweep = add_command(
        subs,
        "sweep",
        "on_sweeps:sweep",
        "run a recipe with every combination (point) of some settings, such as autoencode.lr=1e-4,3e-4; stages that "
        "are the same for several points run once; if repeated, resume and run what is new",
    )
    sweep.add_argument("recipe", help=_RECIPE)
    values = (
        f"{_OVERRIDES}; a setting with several values, key=a,b,c, makes a point for each. [1,2],[3,4] are two values"
    )
    sweep.add_argument("overrides", nargs="*", default=[], metavar="key=value", help=values)
    file = "YAML file of points, with `grid:`, `paired:` and `random:` as in docs/training.md"
    sweep.add_argument("--points", type=path, metavar="FILE.yaml", help=file)
    folder = "directory of the sweep (default: the recipe's run_dir with -sweep)"
    sweep.add_argument("--dir", type=path, metavar="FOLDER", help=folder)
    add_number(
        sweep, "--at-once", Range(least=1), "with cluster=slurm: most points to run at the same time", without="any"
    )
    sweep.add_argument(
        "--dry-run",
        action="store_true",
        help="show the points, what they share and what exists, with cluster=slurm also the scripts; start nothing",
    )


def _add_listening_test(subs: Commands) -> None:
    """Add the command that makes a listening test."""
    test = add_command(
        subs,
        "listen-test",
        "on_recipes:listen_test",
        "make a blind MUSHRA listening test of the evaluated clips",
    )
    test.add_argument("recipe", help=_RECIPE)
    test.add_argument(
        "out",
        type=path,
        metavar="OUT",
        help="folder to write, for webMUSHRA; keep OUT.key.json, which names the systems, from the listeners",
    )
    test.add_argument("overrides", nargs="*", default=[], metavar="key=value", help=_OVERRIDES)
    test.add_argument(
        "--systems", help="systems to test: keys in evaluation.json, separated by commas (default: all on the page)"
    )
    add_number(test, "--clips", Range(least=1), "number of clips to test", without="all on the page")
    add_number(test, "--seed", SEED, "random seed of file names and order", default=0)
