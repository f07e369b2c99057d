"""Evaluates a run: scores every system block by block, in one process or in several, and merges the results."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from models.codec import SPresso
from models.documents import write_json
from models.export import read_description
from trainer.cpus import usable_threads
from trainer.data.audio import write_audio
from trainer.evaluate.bit_curve import Probe, curve_of, probes_of
from trainer.evaluate.bootstrap import LEVEL
from trainer.evaluate.embeddings import make_embedding
from trainer.evaluate.other_codecs import other_sources
from trainer.evaluate.own_codecs import Export, OwnCodec, own_sources
from trainer.evaluate.pieces import Piece, Pieces
from trainer.evaluate.report import Gathered, results_of, systems_of, variability
from trainer.evaluate.report_file import read_report, read_speed, require_own_report
from trainer.evaluate.scored_clips import load_clips
from trainer.evaluate.scores import Scorer, figures_of
from trainer.evaluate.systems import RATE_RANGES
from trainer.evaluate.tables import write_tables
from trainer.evaluate.under_test import SystemUnderTest
from trainer.files import locked
from trainer.progress import Progress
from trainer.recipes.schema import Config
from trainer.recipes.values import hash_values
from trainer.run_directory import RunDirectory, stage_folder
from trainer.stage_inputs import recorded_export, require_recorded, stage_inputs
from trainer.stages import STAGES

_REPORT, _LOCK = "evaluation.json", ".merge.lock"
_FORMAT = 2  # version of the pieces; pieces of another version are not used
TIMED_CLIPS = 3
"""Clips over which the speed is measured."""


def evaluate(config: Config) -> dict[str, Any]:
    """Score the run's codec and the codecs that it is compared with.

    Writes `evaluate/evaluation.json`, the tables and the audio that the page plays. Pieces that an earlier call has
    finished, in one process or in parts, are reused.

    Returns:
        The report, as in `evaluation.json`.

    Raises:
        ValueError: a stage has not ended yet, or a codec or embedding of the recipe can't be loaded.
    """
    report = evaluate_part(config, part=0, parts=1)
    assert report is not None
    return report


def evaluate_part(
    config: Config, *, part: int, parts: int, sole: Callable[[], AbstractContextManager[object]] = nullcontext
) -> dict[str, Any] | None:
    """Score every `parts`-th block of clips, starting with block `part`; the last part to end merges the results.

    `sole` gives this part of the work to this process alone for as long as it writes.

    Returns:
        The report, or None if other parts have not ended yet. Except for `speed` and `created`, the report is
        bit-identical for any number of parts.

    Raises:
        ValueError: for the same reasons as `evaluate`, or `part` is not between 0 and `parts` - 1.
    """
    if not 0 <= part < parts:
        raise ValueError(f"an evaluation in {parts} part(s) has the parts 0 to {parts - 1}, not {part}")
    plan = _Plan(config)
    require_own_report(plan.folder)
    if (report := plan.finished()) is not None:
        return report
    # Sums depend on the number of threads, which a stage that was trained in this process may have changed.
    torch.set_num_threads(config.parallel.threads or usable_threads(1))
    with torch.inference_mode(), sole():
        plan.work(part, parts)
        if not plan.complete():
            return None
        with locked(plan.folder / _LOCK):
            if (report := plan.finished()) is not None:
                return report
            return plan.merge()


def evaluation_identity(config: Config) -> str:
    """Return a hash of everything that the figures depend on: models, sampling, clips, and the choice of figures.

    Raises:
        ValueError: a stage has not ended, or its settings or its inputs have changed since.
    """
    return _Plan(config).identity


class _Plan:
    """The pieces of one evaluation: which there are, where they are kept, and how the missing ones are made."""

    def __init__(self, config: Config) -> None:
        _require_ended(config)
        self.config, self.folder = config, stage_folder(config, "evaluate")
        use_cuda = torch.cuda.is_available() and config.parallel.device != "cpu"
        self.device = torch.device("cuda" if use_cuda else "cpu")
        self.clips = load_clips(config, self.device)
        self.blocks = self.clips.blocks(config.evaluate.batch)
        ours, floors = own_sources(config, self.clips, self.device)
        self.sources = [*ours, *other_sources(config, self.clips, self.device), *floors]
        self.probes = probes_of(config, ours)
        self._all: list[SystemUnderTest | Probe] = [*self.sources, *self.probes]
        self.pieces = Pieces(self.folder)
        chosen = config.evaluate
        self.embedding = make_embedding(chosen.embedding, self.device)
        of_all = {"format": _FORMAT, "clips": self.clips.identity, "batch": chosen.batch}
        of_all |= {"embedding": self.embedding.identity, "visqol": chosen.visqol}
        self.names = {
            source.key: f"{source.key}-{hash_values(of_all | {'source': source.identity})[:8]}" for source in self._all
        }
        if len(self.names) < len(self._all):
            raise ValueError(
                f"evaluate.codecs has titles that differ only in case or punctuation: {', '.join(chosen.codecs)}"
            )
        self._finetuned = next(
            source.export for source in self.sources if isinstance(source, OwnCodec) and source.key.startswith("zq")
        )
        timed = {"model": self._finetuned.model_hash, "sampling": dataclasses.asdict(config.sampling)}
        self.speed_name = f"speed-{hash_values(of_all | timed)[:8]}"
        order = [*(self.names[source.key] for source in self.sources), self.speed_name]
        self.identity = hash_values({"name": config.name, "systems": order, "decodes": chosen.decodes})

    def finished(self) -> dict[str, Any] | None:
        """Return the report of this evaluation, unless a system that was unavailable then is available now."""
        report = read_report(self.folder / _REPORT, self.identity)
        if report is None:
            return None
        if "curve" in report and (report["curve"] or {}).get("identity") != self._curve_identity:
            return None  # a report of an older version does not know of the curve and stays as it is
        recordings = [file for clip in report["clips"] for files in clip["audio"].values() for file in files]
        if not all((self.folder / file).is_file() for file in recordings):
            return None
        lacking = {system["key"] for system in report["systems"] if system["unavailable"]}
        return None if any(source.key in lacking and source.retry() for source in self.sources) else report

    def complete(self) -> bool:
        """Whether all pieces and the measured speed are on disk."""
        numbers = range(len(self.blocks))
        scored = all(self.pieces.path(name, number).is_file() for name in self.names.values() for number in numbers)
        return scored and self._speed_path.is_file()

    @property
    def _curve_identity(self) -> str | None:
        names = [self.names[probe.key] for probe in self.probes]
        return hash_values({"probes": names}) if names else None

    @property
    def _speed_path(self) -> Path:
        return self.folder / "pieces" / self.speed_name / "speed.json"

    def work(self, part: int, parts: int) -> None:
        """Make the missing pieces of this part; part 0 also measures the speed."""
        scorer = Scorer(self.embedding, self.clips.sample_rate, visqol=self.config.evaluate.visqol)
        mine = range(part, len(self.blocks), parts)
        total = len(self._all) * len(mine) + 1
        with Progress("evaluate", total=total, unit="pieces") as progress:
            for done, (source, number) in enumerate(self._ordered(mine), start=1):
                if not self._is_made(source, number):
                    self._make(source, number, scorer)
                progress.to(done, last=source.key)
            if part == 0 and not self._speed_path.is_file():
                write_json(self._speed_path, self._speed())
            progress.to(total)

    def _ordered(self, numbers: range) -> Iterator[tuple[SystemUnderTest | Probe, int]]:
        """Yield (source, block number), all sources of one codec together; then unload that codec."""
        groups: dict[int, list[SystemUnderTest | Probe]] = {}
        for source in self._all:
            groups.setdefault(id(getattr(source, "export", source)), []).append(source)
        for group in groups.values():
            for source in group:
                for number in numbers:
                    yield source, number
            group[0].unload()

    def _is_made(self, source: SystemUnderTest | Probe, number: int) -> bool:
        """Whether the piece exists; one without figures does not count if its codec is available now."""
        name = self.names[source.key]
        if not self.pieces.path(name, number).is_file():
            return False
        if not source.retry() and self.blocks[number][0] >= self.clips.on_page:
            return True  # a piece without recordings, which need not be read
        piece = self.pieces.read(name, number)
        if piece is None or not all((self.folder / file).is_file() for files in piece.audio.values() for file in files):
            return False
        return not (source.retry() and piece.unavailable)

    def _make(self, source: SystemUnderTest | Probe, number: int, scorer: Scorer) -> None:
        rows, clips = self.blocks[number], self.clips
        if isinstance(source, Probe):
            self.pieces.write(self.names[source.key], number, source.measure(rows))
            return
        made = source.decode(rows)
        piece = Piece(dataclasses.asdict(made.system), rows)
        if made.takes:
            takes = [take.to(self.device) for take in made.takes]
            piece.embedding, piece.windows = scorer.embed(takes[0])
            piece.failures = {clips.keys[row]: message for row, message in made.failures.items()}
            piece.windows, piece.embedding = _without(made.failures, rows, piece)
            piece.payload_bits, piece.file_bytes = made.payload_bits, made.file_bytes
            piece.coded_bits = made.coded_bits
            if made.system.role != "original":
                piece.figures = scorer.figures(clips.audio(rows), made, rows)
            if made.system.page:
                piece.audio = self._write_audio(self.names[source.key], rows, takes, made.failures)
        self.pieces.write(self.names[source.key], number, piece)

    def _write_audio(
        self, name: str, rows: list[int], takes: list[torch.Tensor], failures: dict[int, str]
    ) -> dict[str, list[str]]:
        """Write every take of the clips that the page plays; return the files by clip."""
        folder = self.pieces.audio(name)
        (self.folder / folder).mkdir(parents=True, exist_ok=True)
        written: dict[str, list[str]] = {}
        for index, row in enumerate(rows):
            if row >= self.clips.on_page or row in failures:
                continue
            key = self.clips.keys[row]
            files = [str(folder / f"{key}.{take}.flac") for take in range(len(takes))]
            for file, take_B1S in zip(files, takes, strict=True):
                write_audio(self.folder / file, take_B1S[index].cpu().numpy(), self.clips.sample_rate)
            written[key] = files
        return written

    def _speed(self) -> dict[str, Any]:
        """Measure real-time factors of the codec in normal use: one clip at a time, from audio to a stream and back."""
        export: Export = self._finetuned
        codec: SPresso = export.codec
        rows = range(min(TIMED_CLIPS, len(self.clips)))
        clips = self.clips.audio(rows)
        encoding, streams = _timed(lambda: [codec.encode(audio_1S) for audio_1S in clips], self.device)
        decoding, _ = _timed(
            lambda: [codec.decode(stream, sampling=export.sampling) for stream in streams], self.device
        )
        export.unload()
        on_gpu, threads = self.device.type == "cuda", torch.get_num_threads()
        return {
            "encode_realtime_factor": round(len(rows) * self.clips.seconds / encoding, 2),
            "decode_realtime_factor": round(len(rows) * self.clips.seconds / decoding, 2),
            "steps": export.sampling.steps,
            "device": torch.cuda.get_device_name() if on_gpu else f"CPU, {threads} thread{'s' * (threads > 1)}",
        }

    def merge(self) -> dict[str, Any]:
        """Write the report and its tables from the pieces, and remove the pieces of older evaluations."""
        report = self._report() | {"identity": self.identity}
        write_json(self.folder / _REPORT, report, indent=1)
        write_tables(report, self.folder)
        self.pieces.keep({*self.names.values(), self.speed_name})
        return report

    def _report(self) -> dict[str, Any]:
        config, clips = self.config, self.clips
        gathered = [self._gather(source) for source in self.sources]
        figures = figures_of(self.embedding, clips=len(clips), visqol=config.evaluate.visqol)
        results = results_of(gathered, gathered[0].embedding, figures)
        page = range(clips.on_page)
        return {
            "recipe": config.name,
            "model_hash": self._finetuned.model_hash,
            "created": datetime.now(UTC).date().isoformat(),
            "sample_rate": clips.sample_rate,
            "channels": clips.channels,
            "subtitle": f"{len(clips)} held-out clips of {clips.seconds:.1f} s, on which no stage was trained",
            "systems": systems_of(gathered),
            "tables": {key: each.title for key, each in RATE_RANGES.items()},
            "figures": [dataclasses.asdict(figure) for figure in figures],
            "embedding": self.embedding.name,
            "confidence": LEVEL,
            "results": results,
            "variability": variability(results, config.evaluate.decodes),
            "clips": [
                {
                    "key": clips.keys[row],
                    "caption": clips.metadata(row).get("caption", ""),
                    "seconds": clips.seconds,
                    "audio": {one.system.key: files for one in gathered if (files := one.audio.get(clips.keys[row]))},
                }
                for row in page
            ],
            "speed": read_speed(self._speed_path),
            "curve": self._curve(gathered),
        }

    def _curve(self, gathered: list[Gathered]) -> dict[str, Any] | None:
        """Return the curve of log-mel against bits; None if the recipe wants none."""
        if not self.probes:
            return None
        found = {source.key: one for source, one in zip(self.sources, gathered, strict=True)}
        found |= {probe.key: self._gather(probe) for probe in self.probes}
        curve = curve_of(self.config, found, on_page=self.clips.on_page)
        return curve | {"identity": self._curve_identity}

    def _gather(self, source: SystemUnderTest | Probe) -> Gathered:
        found = [self.pieces.read(self.names[source.key], number) for number in range(len(self.blocks))]
        pieces = [piece for piece in found if piece is not None]
        control_of = source.control_of if isinstance(source, SystemUnderTest) else ""
        return Gathered(pieces, seconds=self.clips.seconds, control_of=control_of)


def _require_ended(config: Config) -> None:
    for stage in STAGES["evaluate"].evaluates:
        if not STAGES[stage].needed(config):
            continue
        directory = RunDirectory(stage_folder(config, stage), stage)
        recorded_export(config, stage, needed_by="evaluate")
        require_recorded(config, stage, read_description(directory.export)["model"])
        directory.require_same(config, stage_inputs(config, stage))


def _without(failures: dict[int, str], rows: list[int], piece: Piece) -> tuple[list[int], torch.Tensor]:
    """Drop the embedding rows of the clips that failed; return the windows of each clip and the remaining rows."""
    parts = piece.embedding.split(piece.windows)
    kept = [part[:0] if row in failures else part for row, part in zip(rows, parts, strict=True)]
    return [len(part) for part in kept], torch.cat(kept)


def _timed(work: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    work()  # once to warm up
    start = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, result
