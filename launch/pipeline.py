"""Runs the stages of a recipe in order. A repeated run resumes where it stopped and skips what is done."""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from launch import owner, this_process
from launch.local import train_here
from models.backbones.pretrained import load_autoencoder
from trainer.checkpoints.names import checkpoints
from trainer.checkpoints.resume import was_followed
from trainer.data.find_sounds import summary_of
from trainer.data.locate import Asked
from trainer.data.prepare import Tally, prepare
from trainer.data.remote import is_url
from trainer.data.set_description import info_of
from trainer.data.synth.dataset import write_sounds
from trainer.data.text_embeddings import embedder_factory
from trainer.evaluate import evaluation, tables
from trainer.evaluate.listening_test import write_listening_test
from trainer.exported import missing_export
from trainer.file_names import printable, printable_lines
from trainer.log.log_file import log_shown
from trainer.page import clear_page, write_page
from trainer.page.recordings import require_recordings
from trainer.progress import Progress, labelled
from trainer.recipes.privacy import public_yaml
from trainer.recipes.schema import Config
from trainer.run_directory import RunDirectory, stage_folder, write_config
from trainer.stage_inputs import stage_inputs
from trainer.stages import STAGES, trained_stages
from trainer.stores.fetch import fetch
from trainer.stores.uploads import finish_upload


def run(config: Config, stages: Sequence[str] | None = None) -> str:
    """Run all stages, or some of them; return "done", or "stopped" if a signal asked a stage to stop.

    Raises ValueError, OSError.
    """
    stages = config.stages if stages is None else stages
    require_settings_of_all_stages(config)
    for stage in trained_stages():
        RunDirectory(stage_folder(config, stage), stage).require_same(config)
    with owner.holding(Path(config.run_dir)):
        write_config(Path(config.run_dir), config)
        for number, stage in enumerate(stages, start=1):
            say(labelled(f"[{number}/{len(stages)}] {stage}"))
            if run_stage(config, stage) == "stopped":
                return "stopped"
    return "done"


def require_settings_of_all_stages(config: Config) -> None:
    """Raise ValueError for settings that make sense for a single stage alone."""
    for key, value in (("start_from", config.checkpoint.start_from), ("resume", config.checkpoint.resume)):
        if value not in (None, "auto", "never"):
            raise ValueError(
                f"checkpoint.{key}={value} applies to one stage: use `spresso train RECIPE stage=… "
                f"checkpoint.{key}={value}`, then `spresso run RECIPE` without it"
            )


def run_stage(config: Config, stage: str, *, part: int = 0, parts: int = 1) -> str:
    """Run one stage, or one of its `parts`; a stage that is done is skipped. Returns "done" or "stopped"."""
    if STAGES[stage].trained:
        return train(config, stage)
    cut = {"part": part, "parts": parts} if STAGES[stage].array and parts > 1 else {}
    UNTRAINED[stage](config, **cut)
    return "done"


def audio_source(config: Config) -> str | Path:
    """Return what holds the user's sounds, or the folder of the sounds that `synth` makes."""
    return config.data.audio if config.data.audio is not None else stage_folder(config, "audio")


def asked_sounds(config: Config) -> Asked:
    """Return what the recipe says of its sounds."""
    data, own = config.data, (Path(config.run_dir), Path(config.data.latents))
    return Asked(audio_source(config), data.audio_column, data.caption_column, data.cache.patience, own)


def shared_latents(config: Config) -> bool:
    """Whether `data.latents` holds sets that another run made, and this run has no sounds of its own."""
    needed = ("test",) if config.data.mix else ("train", "test")
    return (
        config.data.audio is None
        and not stage_folder(config, "audio").exists()
        and (
            is_url(config.data.latents)
            or all((Path(config.data.latents) / split / "set.json").is_file() for split in needed)
        )
    )


def require_own_preparation(config: Config) -> str:
    """Return how the sets of `shared_latents` were prepared, as far as the recipe says otherwise; empty if it doesn't.

    Raises:
        ValueError: it says otherwise, and the sets lie in the run's own directory, whose `config.yaml` speaks of them.
    """
    latents = Path(config.data.latents)
    info = None if is_url(config.data.latents) else info_of(latents / "test")
    prepared = info.prepared if info else {}
    wanted = {"data.clip_seconds": config.data.clip_seconds, "data.holdout": config.data.holdout, "seed": config.seed}
    found = {key: prepared.get(key.removeprefix("data."), value) for key, value in wanted.items()}
    words = " ".join(f"{key}={value}" for key, value in found.items() if value != wanted[key])
    if words and latents.resolve().is_relative_to(Path(config.run_dir).resolve()):
        raise ValueError(
            f"{latents} was prepared with other settings: set {words}, or move it elsewhere and name it in data.latents"
        )
    return words


def synth(config: Config) -> None:
    """Synthesize captioned sound effects, unless the recipe names latents that exist."""
    if shared_latents(config):
        say(f"  skipped: {config.data.latents} holds latents")
        return
    synthesize(
        stage_folder(config, "audio"), hours=config.data.synth_hours, seed=config.seed, workers=config.data.workers
    )


def synthesize(folder: Path, *, hours: float, seed: int, workers: int) -> None:
    """Write `hours` hours of synthesized sounds into a folder, with a progress bar."""
    with Progress("synth", total=hours * 60, unit="minutes") as progress:

        def show(done: float, total: float) -> None:
            progress.to(round(hours * 60 * done / total, 2))

        sole = functools.partial(owner.holding, folder)
        write_sounds(folder, hours=hours, seed=seed, workers=workers, progress=show, sole=sole)


def prepare_latents(config: Config, *, part: int = 0, parts: int = 1) -> None:
    """Encode sound files into shards of latents: all files, or those of one part of an array job.

    Runs may share their latents and begin at once: one of them encodes, and the others wait for it.
    """
    if shared_latents(config):
        other = require_own_preparation(config)
        say(f"  made before: {config.data.latents}{other and f', prepared with {other}'}")
        return
    factory = functools.partial(load_autoencoder, config.autoencoder.kind, config.autoencoder.folder)
    start = time.monotonic()
    with Progress("prepare", total=0, unit="files") as progress:

        def show(tally: Tally) -> None:
            speed = (tally.seconds - tally.found) / 3600 / max(1e-3, time.monotonic() - start)
            progress.to(
                tally.done,
                of=tally.files,
                hours=f"{tally.seconds / 3600:.2f}",
                hours_per_second=f"{speed:.3g}",
                left_out=tally.problems,
            )

        report = prepare(
            asked_sounds(config),
            Path(config.data.latents),
            factory,
            embedder_factory(config.text),
            clip_seconds=config.data.clip_seconds,
            holdout=config.data.holdout,
            seed=config.seed,
            ae_options=asdict(config.autoencoder),
            workers=config.data.workers,
            shard_mb=config.data.shard_mb,
            part=part,
            parts=parts,
            progress=show,
            sole=functools.partial(
                owner.holding,
                Path(config.data.latents),
                part=part,
                parts=parts,
                wait=lambda line: say(f"  waits: {line}"),
            ),
        )
    if report is None:
        say(f"  part {part} of {parts} is done; the sets are complete once all parts are")
        return
    say(f"  {report.files} files, {report.clips['train']} clips for training, {report.clips['test']} held out")
    if report.problems:
        say(f"  {len(report.problems)} files left out, see {config.data.latents}/report.json")
    if report.passed_over:
        say(f"  passed over: {summary_of(report.passed_over)}, see {config.data.latents}/report.json")
    for kind, entries in report.captions.items():
        say(f"  {kind} ({entries['count']:,}), such as {printable(', '.join(entries['names'][:3]))}")


def train(config: Config, stage: str, how: Callable[[Config, str], str] | None = None) -> str:
    """Train a stage, unless it is done with these settings; `how` replaces the training on this machine.

    Returns "done" or "stopped". Raises ValueError if the run directory holds a run with other settings.
    """
    directory = RunDirectory(stage_folder(config, stage), stage)
    with log_shown():
        fetch(config, stage, launch=this_process.launch())
    directory.require_same(config, stage_inputs(config, stage))
    if directory.done(config) and _resumes_own_run(config, directory):
        say(f"  done before: {directory.export}")
        if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
            finish_upload(config, stage)
        return "done"
    if gone := missing_export(directory.path, directory.status):
        if not checkpoints(directory.checkpoints):
            raise ValueError(f"{stage} was done, but {gone}")
        say(f"  its export {directory.export} is gone or not whole: it is made again from the last checkpoint")
    return (how or train_here)(config, stage)


def _resumes_own_run(config: Config, directory: RunDirectory) -> bool:
    """Whether the run is to resume from its own state: `auto`, or a path that the run has already resumed from."""
    return config.checkpoint.resume == "auto" or was_followed(directory, config.checkpoint.resume)


def evaluate(config: Config, *, part: int = 0, parts: int = 1) -> None:
    """Score all clips, or those of one part of an array job; print the table and write its files."""
    report = _evaluated(config, part=part, parts=parts)
    if report is None:
        say(f"  part {part} of {parts} is done; the table is made once all parts are")
        return
    print(tables.table(report))


def _evaluated(config: Config, *, part: int = 0, parts: int = 1) -> dict[str, Any] | None:
    """Return the report of an evaluation, which is made first if it is missing; None if other parts are unfinished."""
    sole = functools.partial(owner.holding, stage_folder(config, "evaluate"), part=part, parts=parts)
    return evaluation.evaluate_part(config, part=part, parts=parts, sole=sole)


def listening_test(config: Config, out: Path, *, systems: list[str] | None, clips: int | None, seed: int) -> None:
    """Write a folder for webMUSHRA with the clips that the page plays. Raises ValueError."""
    folder = stage_folder(config, "evaluate")
    report = _evaluated(config)
    assert report is not None
    sole = functools.partial(owner.holding, out)
    made = write_listening_test(report, folder, out, systems=systems, clips=clips, seed=seed, sole=sole)
    say(f"{made.trials} trials of {made.conditions} sounds: copy {out}/configs into webMUSHRA's folder and open")
    say(f"  …/webMUSHRA/?config={made.config.name}; keep {made.key} from the listeners: it names the systems")


def page(config: Config) -> Path:
    """Write the listening page; return the path to open."""
    report = _evaluated(config)
    assert report is not None
    curves = {stage: stage_folder(config, stage) / "metrics.jsonl" for stage in trained_stages()}
    with owner.holding(stage_folder(config, "page")):
        require_recordings(report, stage_folder(config, "evaluate"))  # before anything of an older page goes
        clear_page(stage_folder(config, "page"))
        index = write_page(
            report,
            stage_folder(config, "page"),
            audio_root=stage_folder(config, "evaluate"),
            curves={stage: path for stage, path in curves.items() if path.exists()},
            config_text=public_yaml(config),
        )
    say(f"open {index.resolve()}")
    return index


def say(text: str) -> None:
    """Print a line to stderr, which keeps stdout free for tables."""
    print(printable_lines(text), file=sys.stderr, flush=True)


UNTRAINED: dict[str, Callable[..., object]] = {
    "synth": synth,
    "prepare": prepare_latents,
    "evaluate": evaluate,
    "page": page,
}
"""Stage that trains nothing → the function that runs it; a stage with parts also gets `part` and `parts`."""
