"""The stages of a recipe: one row for each, with everything about a stage that does not need torch.

The recipe's schema, the pipeline, the launchers, the status table, the help texts and the memory plan read these rows.
A new trained stage needs a row here and a Task (`trainer.tasks`); a new stage that trains nothing needs a row here and
a function in `launch.pipeline`. The README shows the rows as a table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.recipes.schema import Config


def _always(config: Config) -> bool:
    return True


@dataclass(frozen=True)
class Stage:
    """One stage. Its settings are under its name in the recipe, and its files are in a folder of that name."""

    name: str
    help: str
    """A phrase that says what the stage does."""
    task: str = ""
    """`module:class` of the stage's Task; empty for a stage that trains nothing."""
    needed: Callable[[Config], bool] = _always
    """Whether a recipe needs the stage."""
    builds_on: tuple[str, ...] = ()
    """Candidates for the previous stage, whose export this stage uses: the first one that the recipe needs."""
    evaluates: tuple[str, ...] = ()
    """Trained stages whose exports this stage evaluates. All of them that the recipe needs must be done before."""
    learned_from: tuple[str, ...] = ()
    """Keys of the recipe that decide what the stage learns or makes, in addition to the stage's own key and, for a
    trained stage, those that all of them share. A trained stage whose recipe changes one of them is not resumed, and
    points of a sweep that differ in one of them do not share the stage."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Defaults of the stage's `TrainConfig` that differ from those of the class."""
    crop_unit: str = "latent_encoder.pooling"
    """Key of the recipe whose value must divide the stage's `crop_frames`."""
    makes_latents: bool = False
    """Whether the stage is skipped if `data.latents` holds latents that another run made."""
    resources: Mapping[str, int] = field(default_factory=dict)
    """Resources that the stage's cluster jobs request instead of the recipe's: `nodes`, `tasks_per_node`, and
    `gpus_per_node`, which is limited to the recipe's value."""
    array: bool = False
    """Whether the stage can be split into parts that run as a job array."""
    array_by_default: bool = False
    """Whether `cluster.array` splits the stage. If not, only the stage's own `cluster.stages.NAME.array` does."""
    progress_files: str | None = None
    """For a stage that trains nothing: glob of the files in the stage's folder whose number measures its progress.
    Empty: each start begins from scratch. None: the stage's progress cannot be measured."""

    @property
    def trained(self) -> bool:
        """Whether the stage has a Task and runs in the training loop."""
        return bool(self.task)

    @property
    def stops_at_once(self) -> bool:
        """Whether a signal may end the stage at any moment, because it keeps its finished work and saves nothing."""
        return not self.trained

    def learned_keys(self) -> tuple[str, ...]:
        """Return all keys of the recipe that decide what the stage learns or makes."""
        return (*(_LEARNED_FROM_BY_ALL if self.trained else ()), *self.learned_from, self.name)


_LEARNED_FROM_BY_ALL = (
    "seed",
    "checkpoint.start_from",
    *(f"data.{key}" for key in ("shuffle", "block", "window_mib", "window", "lanes", "buckets")),
    "autoencoder",
)
_ONE_CPU_TASK = {"nodes": 1, "gpus_per_node": 0, "tasks_per_node": 1}

STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage(
            "synth",
            "makes captioned sound effects, if you gave none",
            needed=lambda config: config.data.audio is None,
            learned_from=("seed", "data.synth_hours"),
            makes_latents=True,
            resources=_ONE_CPU_TASK,
        ),
        Stage(
            "prepare",
            "sound files → latents x0, in plain tar shards; holds out clips that no stage trains on",
            learned_from=(
                *("seed", "autoencoder", "text"),
                *(f"data.{key}" for key in ("audio", "clip_seconds", "holdout", "shard_mb")),
            ),
            makes_latents=True,
            resources=_ONE_CPU_TASK,
            array=True,
            array_by_default=True,
        ),
        Stage(
            "pretrain",
            "the diffusion transformer D from scratch, unless you bring a pretrained one",
            task="trainer.tasks:Pretrain",
            needed=lambda config: config.pretrained.folder is None,
            learned_from=("dit", "diffusion"),
            defaults={"text_dropout": 0.1},
            crop_unit="dit.patch_size",
        ),
        Stage(
            "autoencode",
            "g, f and LoRA on D, together",
            task="trainer.tasks:Autoencode",
            builds_on=("pretrain",),
            learned_from=("dit", "diffusion", "pretrained", "latent_encoder", "lora"),
        ),
        Stage(
            "quantize",
            "the quantizer: QINCo2, or plain codebooks",
            task="trainer.code_tasks:Quantize",
            builds_on=("autoencode",),
            learned_from=("latent_encoder", "quantizer"),
            defaults={"samples": 0},
            resources={"nodes": 1},
        ),
        Stage(
            "prior",
            "how likely codes are, for entropy coding; if the recipe asks for it",
            task="trainer.code_tasks:FitPrior",
            needed=lambda config: config.stage("prior").samples > 0,
            builds_on=("quantize",),
            learned_from=("quantizer",),
            defaults={"samples": 0, "lr": 3e-3},
        ),
        Stage(
            "finetune",
            "f and LoRA on the quantized z",
            task="trainer.tasks:Finetune",
            builds_on=("prior", "quantize"),
            learned_from=("diffusion", "quantizer"),
        ),
        Stage(
            "distill",
            "D in one to four steps, taught by its own decodes; if the recipe asks for it",
            task="trainer.distillation:Distill",
            needed=lambda config: config.stage("distill").samples > 0,
            builds_on=("finetune",),
            learned_from=("diffusion", "quantizer", "sampling", "distillation"),
            defaults={"samples": 0, "condition_dropout": 0.0, "text_dropout": 1.0},
        ),
        Stage(
            "evaluate",
            "figures on the held-out clips",
            learned_from=("sampling",),
            evaluates=("autoencode", "quantize", "finetune", "distill"),
            resources={"nodes": 1, "gpus_per_node": 1, "tasks_per_node": 1},
            array=True,
            progress_files="pieces/*/*",
        ),
        Stage("page", "a page to hear them", resources=_ONE_CPU_TASK, progress_files=""),
    )
}
"""All stages, in the order in which a recipe runs them."""


def register(stage: Stage, *, before: str) -> None:
    """Add a stage that runs immediately before the stage `before`."""
    rows = {name: row for name, row in STAGES.items() if name != stage.name}
    STAGES.clear()
    for name, row in rows.items():
        if name == before:
            STAGES[stage.name] = stage
        STAGES[name] = row


def trained_stages() -> tuple[str, ...]:
    """Return the names of the stages that have a Task, in order."""
    return tuple(name for name, stage in STAGES.items() if stage.trained)


def is_trained(name: str) -> bool:
    """Whether a stage of this name exists and has a Task."""
    return name in STAGES and STAGES[name].trained


def decided_by(key: str, keys: tuple[str, ...]) -> bool:
    """Whether a dotted key is one of the keys, or belongs to one of them."""
    return key in keys or key.startswith(tuple(f"{name}." for name in keys))


def stage_before(config: Config, name: str) -> str | None:
    """Return the trained stage whose export a stage builds on in this recipe; None if there is none."""
    return next((other for other in STAGES[name].builds_on if STAGES[other].needed(config)), None)
