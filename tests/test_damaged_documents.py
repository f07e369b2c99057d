"""Whatever a document of a run, a set, an export or a release becomes, a command says a clear line or is right."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from launch import owner, pipeline
from launch.cli import main
from launch.conversions import _require_report
from launch.encode_record import EncodeRecord
from launch.slurm import begin_end
from launch.slurm.attempt import Attempt, history, record
from launch.slurm.requeue_policy import judge
from launch.slurm.submitted_jobs import Submitted, keep
from launch.sweep import outcomes
from launch.sweep import record as sweep_record
from launch.sweep.record import RecordedPoint
from models.backbones.oobleck import read_oobleck_config
from models.backbones.same import read_same_config
from models.backbones.woosh import read_woosh_sizes
from tests.damage import Document, Folder, LinesDocument, YamlDocument, watched
from tests.mutant_counts import MutantCounts
from trainer.checkpoints import checkpoint, inventory, resume
from trainer.checkpoints.manifest import digest
from trainer.data import mixed_sources, prepare, prepare_report, shard_plan
from trainer.data.find_sounds import Counts
from trainer.data.locate import Asked
from trainer.data.mixed_sources import AllSources
from trainer.data.origins import Lost
from trainer.data.reader import Damage
from trainer.data.set_content import Content
from trainer.data.set_description import info_of
from trainer.data.shard_set import open_set
from trainer.data.shards import DamagedSample
from trainer.data.sources import SoundFile, Sources
from trainer.data.synth.dataset import write_sounds
from trainer.evaluate import evaluation, tables
from trainer.evaluate.listening_test import _key_in, write_listening_test
from trainer.log.metrics import Metrics
from trainer.log.trace_request import TraceRequest, read_request, write_request
from trainer.log.trackers.events import Points
from trainer.log.trackers.record import TrackerRecord
from trainer.log.training_log import TrainingLog
from trainer.page import write_page
from trainer.page.curves import loss_chart, read_curve
from trainer.recipes.reading import load_recipe
from trainer.run_directory import RunDirectory
from trainer.stage_inputs import stage_inputs
from trainer.stores.layout import run_id

OLD = Path(__file__).parent / "golden/old_run"
RUN, STAGE, STEP = Path("runs/old"), Path("runs/old/pretrain"), "pretrain/checkpoints/step_000000000032"
FIRST = 4
"""Ways in which each kind of document is damaged in the default suite."""
MANY = 150
"""Ways in the slow one."""
_statuses: list[int] = []
"""Exit statuses of the commands that the last reader has called."""


class Sealed(Document):
    """A checkpoint's manifest, whose checksum is right again after the damage."""

    def dump(self, value: object) -> bytes:
        if not isinstance(value, dict):
            return super().dump(value)
        value.pop("sha256", None)
        value = json.loads(json.dumps(value))
        return super().dump({**value, "sha256": digest(value)})


class Header(Document):
    """The config in the header of a safetensors file; its weights stay as they are."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.state, self.whole = load_file(path), self.content
        with safe_open(path, "pt") as file:
            self.content = file.metadata()["config"].encode()

    def write(self, content: bytes) -> None:
        if content == self.content:
            self.path.write_bytes(self.whole)
        else:
            save_file(self.state, self.path, {"config": content.decode("utf-8", "replace")})


@dataclass
class Kind:
    """A kind of document: where it lies, how it is written, and what reads it."""

    path: str
    read: Callable[[], object]
    document: type[Document] = Document
    by_key: bool = False
    """Whether an error names the key of a recipe instead of the file."""


def spresso(*arguments: object) -> int:
    """Call a command as a user does; errors that it reports in a line end with status 2."""
    _statuses.append(main([str(argument) for argument in arguments]))
    return _statuses[-1]


def done_before(stage: str) -> None:
    """Decide whether a stage is done, as `spresso run` and `spresso train` do; train nothing."""
    config = load_recipe(str(RUN / "config.yaml"), [])
    pipeline.train(config, stage, how=lambda config, stage: "done")


def resumes(stage: str) -> None:
    config = load_recipe(str(RUN / "config.yaml"), [f"checkpoint.resume={RUN / STEP}"])
    resume.was_followed(RunDirectory(RUN / stage, stage), config.checkpoint.resume)
    path = RUN / STEP
    checkpoint.newest(path.parent)
    if path.exists():
        resume.describe_resumed(path, strategy="ddp", world_size=1, base_hash="")
        inventory.explanation(path)


def takes_over() -> None:
    spresso("status", RUN)
    spresso("cancel", RUN)


def is_owned() -> None:
    spresso("status", RUN)
    os.environ.pop("SPRESSO_ATTEMPT", None)
    owner.take(STAGE, owner.by_hand())
    owner.require(STAGE)


def is_judged() -> None:
    spresso("status", RUN)
    attempt = Attempt(STAGE, "7", 2)
    begin_end._close_killed_attempt(attempt)
    past = begin_end.ended(history(STAGE), "7")
    for status in (0, 1, 137):
        judge(status, attempt.notes(), past, 32, tasks=2)


def is_drawn() -> None:
    spresso("status", RUN)
    loss_chart("pretrain", read_curve(STAGE / "metrics.jsonl"))
    run = RunDirectory(STAGE, "pretrain")
    Metrics(run, resumed_at=48, sample_rate=48000).close()


def goes_on_tracking() -> None:
    record = TrackerRecord(RunDirectory(STAGE, "pretrain"), "wandb")
    record.is_new(Points("train", 16, {}))
    record.name_it()


def is_shown() -> None:
    """Read the report as `evaluate`, `page` and `listen-test` do; what scores clips is not part of it."""
    identity = json.loads((OLD / "evaluate/evaluation.json").read_text())["identity"]
    plan = object.__new__(evaluation._Plan)
    plan.folder, plan.identity, plan.sources = RUN / "evaluate", identity, []
    if (report := plan.finished()) is None:
        return
    tables.table(report)
    tables.write_tables(report, Path("tables"))
    write_page(report, Path("page"), audio_root=RUN / "evaluate", curves={}, config_text="")
    write_listening_test(report, RUN / "evaluate", Path("listening"), clips=1)


def is_indexed() -> None:
    spresso("data", RUN / "latents")
    info_of(RUN / "latents/train")
    for split in ("train", "test"):
        shard_set = open_set(str(RUN / "latents" / split))
        assert shard_set.fingerprint
        shard_set.latents([0])
    spresso("index", RUN / "latents", "--verify", "--workers", 1)
    stage_inputs(load_recipe(str(RUN / "config.yaml"), []), "pretrain")


def is_decoded() -> None:
    spresso("info", RUN / "streams/entropy_coded.spr")
    spresso("info", RUN / "streams/entropy_coded.spr", "--codec", RUN / "finetune/export")
    spresso("decode", RUN / "streams/plain.spr", "back.wav", "--codec", RUN / "finetune/export", "--steps", 1)


def is_prepared() -> None:
    settings = json.loads((OLD / "latents/report.json").read_text())["settings"]
    sources = AllSources(Asked("sounds"), [], Path("sounds"), "", Sources([], Counts(), Counts()))
    if report := prepare_report.finished(RUN / "latents", settings, sources, Content(sources, None)):
        assert report.clips["train"] + report.clips["test"] >= 0


def goes_on_preparing() -> None:
    unit = shard_plan.Unit("train", 0, [])
    prepare._begin(Path("work"), {"ae": "x", "seed": 0}, None)
    if prepare._count_if_done(Path("work"), unit, prepare.Tally(1)):
        prepare._record(Path("work"), unit)
    shard_plan.durations([SoundFile(Path("a.wav"), "a.wav", "a", "")], Path("work/.prepare/durations.json"))


def is_noted() -> None:
    shard_set = SimpleNamespace(location="set", __len__=lambda: 10)
    damage = Damage(Path("damaged.jsonl"), most=1e9)
    shard_set = type("Set", (), {"location": "set", "__len__": lambda self: 10})()
    damage.note(shard_set, 3, DamagedSample("cut off"))


def has_an_incident() -> None:
    log = SimpleNamespace(run=SimpleNamespace(path=STAGE))
    TrainingLog._incident(log, "went back", position=8)  # type: ignore[arg-type]


def is_remembered() -> None:
    records = EncodeRecord()
    records.checksum(Path("streams/a.spr"))
    records.holds(Path("damaged.jsonl"), Path("streams/a.spr"), "codec")


KINDS: dict[str, Kind] = {
    "codec.json": Kind("finetune/export/codec.json", is_decoded),
    **{
        f"{name} of the codec": Kind(f"finetune/export/{name}.safetensors", is_decoded, Header)
        for name in ("dit", "latent_encoder", "upsampler", "quantizer", "prior")
    },
    "status.json": Kind("pretrain/status.json", lambda: (spresso("status", RUN), done_before("autoencode"))),
    "inputs.json": Kind("pretrain/inputs.json", lambda: done_before("pretrain")),
    "config.yaml of a stage": Kind("pretrain/config.yaml", lambda: done_before("pretrain"), YamlDocument),
    "config.yaml": Kind("config.yaml", lambda: load_recipe(str(RUN / "config.yaml"), []), YamlDocument, by_key=True),
    "resumed_from.json": Kind("pretrain/resumed_from.json", lambda: resumes("pretrain")),
    "manifest.json": Kind(f"{STEP}/manifest.json", lambda: (spresso("checkpoint", RUN), resumes("pretrain"))),
    "sealed manifest.json": Kind(
        f"{STEP}/manifest.json", lambda: (spresso("checkpoint", RUN / STEP), resumes("pretrain")), Sealed
    ),
    "metrics.jsonl": Kind("pretrain/metrics.jsonl", is_drawn, LinesDocument),
    "incident.json": Kind("pretrain/incident.json", has_an_incident),
    "request.json": Kind("pretrain/profile/request.json", lambda: read_request(STAGE)),
    "record of a tracker": Kind("pretrain/trackers/wandb.json", goes_on_tracking),
    "jobs.jsonl": Kind("jobs.jsonl", takes_over, LinesDocument),
    "upload.json": Kind("pretrain/upload.json", lambda: spresso("status", RUN)),
    "store.json": Kind("store.json", lambda: run_id(RUN)),
    "sweep.json": Kind("../../sweep/sweep.json", lambda: spresso("status", Path("sweep"))),
    "outcomes.jsonl": Kind("../../sweep/outcomes.jsonl", lambda: spresso("status", Path("sweep")), LinesDocument),
    "owner.json": Kind("pretrain/owner.json", is_owned),
    "history.jsonl": Kind("pretrain/attempts/history.jsonl", is_judged, LinesDocument),
    "rank_0.json": Kind("pretrain/attempts/7_2/rank_0.json", is_judged),
    "evaluation.json": Kind("evaluate/evaluation.json", is_shown),
    "set.json": Kind("latents/test/set.json", is_indexed),
    "report.json": Kind("latents/report.json", is_prepared),
    "settings.json": Kind("../../work/.prepare/settings.json", goes_on_preparing),
    "durations.json": Kind("../../work/.prepare/durations.json", goes_on_preparing),
    "sounds.jsonl": Kind(
        "../../work/.prepare/sounds.jsonl",
        lambda: mixed_sources._read_record(Path("work/.prepare/sounds.jsonl")),
        LinesDocument,
    ),
    "train-00000.json": Kind("../../work/.prepare/train-00000.json", goes_on_preparing),
    "damaged.jsonl": Kind("../../damaged.jsonl", is_noted, LinesDocument),
    "synth.json": Kind("../../sounds/synth.json", lambda: write_sounds(Path("sounds"), hours=1e-9, seed=0)),
    ".encoded.jsonl": Kind("../../streams/.encoded.jsonl", is_remembered, LinesDocument),
    "encode.report.json": Kind(
        "../../streams/encode.report.json",
        lambda: _require_report(Path("streams/encode.report.json"), "spresso encode"),
    ),
    "key of a listening test": Kind("../../test.key.json", lambda: _key_in(Path("test.key.json"))),
    "config.yaml of Woosh": Kind("../../woosh/config.yaml", lambda: read_woosh_sizes("woosh"), YamlDocument),
    "config.json of SAME": Kind("../../release_3/vae/config.json", lambda: read_same_config("release_3")),
    "config.json of a release": Kind("../../release/vae/config.json", lambda: read_oobleck_config("release")),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Make a folder with an old run, and with a document of each kind that the old run does not hold."""
    place, before = tmp_path_factory.mktemp("damaged"), Path.cwd()
    os.chdir(place)
    try:
        shutil.copytree(OLD, RUN)
        write({RUN / "pretrain/resumed_from.json": {"path": str(RUN / STEP)}})
        write({RUN / "pretrain/incident.json": [{"what": "went back", "position": 4, "time": "2026"}]})
        write({STAGE / "trackers/wandb.json": {"id": "c0ffee", "rows": 2, "until": {"train": 16}}})
        write_request(STAGE, TraceRequest(steps=5, asked=time.time()))
        keep(RUN, [Submitted("pretrain", "7", "", "logs/job_7.out", time.time() - 99)])
        owner.take(STAGE, owner.by_job(Attempt(STAGE, "7", 2)))
        for restart, then in enumerate(("requeued", "requeued", "over")):
            who = {"job": "7", "restart": restart}
            record(STAGE, {"began": time.time() - 900, **who, "nodes": "n1", "count": "1"})
            end = {"ended": time.time() - 800, **who, "place": 32, "then": then, "why": "x", "failure": "boom"}
            record(STAGE, end)
        Attempt(STAGE, "7", 2).note(0, "failed", type="RuntimeError", message="boom")
        points = [RecordedPoint(name, {"seed": name}, {"pretrain": "shared/pretrain-1"}) for name in ("1", "2")]
        sweep_record.write(Path("sweep"), sweep_record.Record(sweep_record.FORMAT, "a", "tiny", ["seed"], points, 2))
        outcomes.append(Path("sweep"), "points/1", outcomes.FAILED, "boom")
        write(
            {
                RUN / "pretrain/upload.json": {"url": "s3://a", "time": 9.5, "sending": "a", "sent": 1, "of": 2},
                RUN / "store.json": {"run": "c0ffee"},
                Path("work/.prepare/settings.json"): {"ae": "x", "seed": 0},
                Path("work/.prepare/durations.json"): {"a": 1.5},
                Path("work/.prepare/train-00000.json"): {"seconds": 1.5, "problems": [], "shards": ["00000-00000.tar"]},
                Path("release/vae/config.json"): oobleck_settings(),
                Path("release_3/vae/config.json"): same_settings(),
                Path("streams/encode.report.json"): {"written_by": "spresso encode", "source": "a", "problems": []},
                Path("test.key.json"): {"seed": 0, "trials": {"trial1": {"clip": "a", "files": {"a.wav": "z"}}}},
            }
        )
        Path("work/train").mkdir()
        source = SoundFile(Path("a.wav"), "a.wav", "a", "a bell", {}, Lost("a.tar member a.wav", "is a link"))
        mixed_sources._write_record(Path("work/.prepare/sounds.jsonl"), Sources([source], Counts(), Counts()))
        Path("work/train/00000-00000.tar").touch()
        EncodeRecord().add(Path("streams/a.spr"), "c0ffee00", [1, 2, 3], "c0ffee", "codec")
        Path("damaged.jsonl").write_text('{"set": "set", "sample": 1, "reason": "x"}\n' * 3)
        write_sounds(Path("sounds"), hours=1e-9, seed=0)
        Path("woosh").mkdir()
        Path("woosh/config.yaml").write_text(yaml.safe_dump(woosh_settings()))
    finally:
        os.chdir(before)
    return Folder(place)


def write(documents: dict[Path, object]) -> None:
    for path, content in documents.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))


def oobleck_settings() -> dict[str, object]:
    return {
        "_class_name": "AutoencoderOobleck",
        "encoder_hidden_size": 16,
        "downsampling_ratios": [4, 8],
        "channel_multiples": [1, 2],
        "decoder_channels": 8,
        "decoder_input_channels": 8,
        "audio_channels": 2,
        "sampling_rate": 8000,
    }


def same_settings() -> dict[str, object]:
    return {
        "_class_name": "AutoencoderSAME",
        "audio_channels": 2,
        "patch_size": 8,
        "encoder_channels": 8,
        "encoder_c_mults": [2],
        "encoder_strides": [4],
        "encoder_transformer_depths": [2],
        "latent_dim": 8,
        "use_differential_attention": True,
        "dim_heads": 8,
        "ff_mult": 2,
        "sliding_window": 1,
        "encoder_sinusoidal_blocks": [0],
        "decoder_sinusoidal_blocks": [1],
        "sampling_rate": 8000,
    }


def woosh_settings() -> dict[str, object]:
    with safe_open(Path(__file__).parent / "golden/woosh_flow_short.safetensors", "pt") as file:
        return {"model_type": "LatentDiffusionModel", **json.loads(file.metadata()["config"])}


@pytest.fixture(autouse=True)
def _there(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.folder)
    monkeypatch.setattr("launch.slurm.scheduler.states", lambda jobs: {job: [] for job in jobs})
    monkeypatch.setattr("launch.slurm.scheduler.alive", lambda jobs: [])
    monkeypatch.delenv("SPRESSO_ATTEMPT", raising=False)


def require_answer(folder: Folder, kind: Kind, random: Random, counts: MutantCounts) -> None:
    """Damage a document and read it; anything but an answer or an error that a user understands is a failure."""
    way = kind.document(RUN / kind.path).damage(random)
    name = f"documents: {Path(kind.path).name}"
    counts.begin(name)
    _statuses.clear()
    try:
        with watched():
            kind.read()
        counts.end(name, refused=2 in _statuses)
    except (ValueError, OSError) as error:
        path = Path(kind.path)
        if not kind.by_key and path.name not in str(error) and path.parent.name not in str(error):
            raise AssertionError(f"{kind.path}, {way}: the error does not name it: {error}") from error
        counts.end(name, refused=True)
    except BaseException as error:
        raise AssertionError(f"{kind.path}, {way}: {type(error).__name__}: {error}") from error
    finally:
        folder.restore()


@pytest.mark.parametrize("name", KINDS)
def test_an_undamaged_document_is_read(folder, name):
    KINDS[name].read()
    folder.restore()


@pytest.mark.parametrize("name", KINDS)
def test_a_damaged_document_is_answered(folder, name, mutant_counts):
    for seed in range(FIRST):
        require_answer(folder, KINDS[name], Random(f"{name} {seed}"), mutant_counts)


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_a_document_damaged_in_many_ways_is_answered(folder, name, mutant_counts):
    for seed in range(FIRST, MANY):
        require_answer(folder, KINDS[name], Random(f"{name} {seed}"), mutant_counts)
