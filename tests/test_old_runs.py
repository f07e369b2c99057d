"""Run directories, checkpoints, exports, streams and latents of older code are still read as that code read them.

The code of an older commit made the run in `golden/old_run`; see `golden/README.md`.
"""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file

from launch.cli import main
from models.codec import SPresso
from tests.golden.make_old_run import SAMPLES, STAGES, STREAMS, decoded_samples, numerics
from trainer import randomness
from trainer.data.shard_set import open_set

OLD = Path(__file__).parent / "golden/old_run"
RECORDED = json.loads((OLD / "streams/recorded.json").read_text())
STEPS = [path.relative_to(OLD) for path in sorted(OLD.glob("*/checkpoints/step_*"))]
RUN, FORK = Path("runs/old"), Path("runs/fork")
HALF, END = f"step_{SAMPLES // 2:012d}", f"step_{SAMPLES:012d}"
FACTS = {
    "plain": ("44 bytes", "1.400 s at 48000 Hz, 2 channel(s)\n", "2 codebook(s) of 8", "0.137 kbps, not entropy-coded"),
    "entropy_coded": (
        *("55 bytes", "1.400 s at 48000 Hz, 2 channel(s), as mid and side\n", "3 codebook(s) of 8"),
        *("0.206 kbps without entropy coding", "0.189 kbps entropy-coded by the prior 4b3e"),
    ),
}
"""The facts that `spresso info` prints about the streams."""
HALVED = ("pretrain", "autoencode")
"""The stages whose half-way checkpoint was kept."""


@pytest.fixture(autouse=True)
def _copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copy the old run to the path in its own config, below the working directory.

    The old code took torch's square root for its noise, which MKL rounds otherwise; so do these tests, to compare all
    else to the bit.
    """
    monkeypatch.setattr(randomness, "_sqrt", torch.sqrt)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(OLD, RUN)


@pytest.fixture(scope="module")
def rounds_alike() -> bool:
    """Whether this machine rounds like the one that made the old run, so that all numbers must match bit for bit."""
    return numerics() == RECORDED["numerics"]


def spresso(*arguments: object) -> None:
    assert main([str(argument) for argument in arguments]) == 0, arguments


def checkpoint(run: Path, stage: str, name: str) -> Path:
    return run / stage / "checkpoints" / name


def read_tensors(step: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a checkpoint that one rank wrote."""
    return load_file(step / "rank_00000.safetensors")


def read_meta(step: Path) -> dict:
    return json.loads((step / "manifest.json").read_text())["meta"]


def read_status(run: Path, stage: str) -> dict:
    return json.loads((run / stage / "status.json").read_text())


def require_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], kind: str) -> float:
    """Return the Euclidean distance of two checkpoints over all tensors of a kind (`param`, `exp_avg`, `ema` …)."""
    squares = [(one[name] - other[name]).double().square().sum() for name in other if name.startswith(f"{kind}/")]
    return float(torch.stack(squares).sum().sqrt())


def require_same_end(run: Path, stage: str, *, to_the_bit: bool) -> None:
    """Assert that the second half of a stage's training ended where the old code's uninterrupted training ended."""
    ours, theirs = (read_tensors(checkpoint(where, stage, END)) for where in (run, OLD))
    meta, old_meta = (read_meta(checkpoint(where, stage, END)) for where in (run, OLD))
    for key in ("stage", "config", "base", "latents", "samples", "steps", "passed_over", "good", "unsaved"):
        assert meta[key] == old_meta[key], key
    if to_the_bit:
        require_equal(ours, theirs)
        assert meta["held_out_loss"] == old_meta["held_out_loss"]
        assert read_status(run, stage)["export"] == read_status(OLD, stage)["export"]
        return
    half = read_tensors(checkpoint(OLD, stage, HALF))
    for kind in ("param", "exp_avg", "exp_avg_sq", "ema"):
        assert distance(ours, theirs, kind) < 1e-4 * distance(half, theirs, kind), kind


def fork(stage: str, *overrides: str) -> tuple[object, ...]:
    """Return the command that trains a stage with the old config in a new run whose earlier stages are done."""
    for earlier in STAGES[: STAGES.index(stage)]:
        shutil.copytree(RUN / earlier, FORK / earlier)
    paths = (f"run_dir={FORK}", f"data.latents={RUN / 'latents'}")
    return ("train", RUN / "config.yaml", f"stage={stage}", *paths, *overrides)


# --- run directories and checkpoints ----------------------------------------------------------------------------------


def test_all_checkpoints_are_listed_and_whole(capsys):
    spresso("checkpoint", RUN)
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split()[:2] for line in lines] == [[str(RUN / step), str(int(step.name[5:]))] for step in STEPS]
    assert all("ddp on 1 rank" in line and "DAMAGED" not in line for line in lines)
    spresso("checkpoint", RUN, "--verify")
    assert capsys.readouterr().out.count("all checksums right") == len(STEPS)


@pytest.mark.parametrize("step", STEPS, ids=lambda step: f"{step.parts[0]}-{step.name}")
def test_each_checkpoint_is_explained(step, capsys):
    spresso("checkpoint", RUN / step)
    facts = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()[1:] if " " in line)
    meta = read_meta(OLD / step)
    assert facts["stage"] == step.parts[0]
    assert facts["samples"] == f"{meta['samples']} in {meta['steps']} steps"
    assert facts["config"] == meta["config"]


def test_the_run_is_done(capsys):
    spresso("status", RUN)
    assert capsys.readouterr().out.count(f"{SAMPLES} of {SAMPLES}") == len(STAGES)


def test_run_again_does_nothing(capsys):
    before = {path: path.read_bytes() for stage in STAGES for path in (RUN / stage).rglob("*") if path.is_file()}
    report = (RUN / "evaluate/evaluation.json").read_bytes()
    spresso("run", RUN / "config.yaml")
    log = capsys.readouterr().err
    assert [log.count(f"done before: {RUN / stage / 'export'}") for stage in STAGES] == [1] * len(STAGES)
    after = {path: path.read_bytes() for stage in STAGES for path in (RUN / stage).rglob("*") if path.is_file()}
    assert after == before
    assert (RUN / "evaluate/evaluation.json").read_bytes() == report
    assert (RUN / "page/index.html").is_file()


@pytest.mark.parametrize("stage", HALVED)
def test_a_run_that_was_killed_goes_on_to_the_same_end(stage, rounds_alike, capsys):
    shutil.rmtree(checkpoint(RUN, stage, END))
    shutil.rmtree(RUN / stage / "export")
    (RUN / stage / "status.json").unlink()
    spresso("train", RUN / "config.yaml", f"stage={stage}")
    assert f"resumed from {checkpoint(RUN, stage, HALF)} at {SAMPLES // 2} samples" in capsys.readouterr().err
    require_same_end(RUN, stage, to_the_bit=rounds_alike)


@pytest.mark.parametrize("stage", HALVED)
def test_another_run_goes_on_from_half_way_to_the_same_end(stage, rounds_alike):
    spresso(*fork(stage, f"checkpoint.resume={checkpoint(RUN, stage, HALF)}"))
    require_same_end(FORK, stage, to_the_bit=rounds_alike)


@pytest.mark.parametrize("stage", STAGES)
def test_another_run_takes_over_the_end_of_each_stage(stage, rounds_alike):
    spresso(*fork(stage, f"checkpoint.resume={checkpoint(RUN, stage, END)}"))
    require_equal(*(read_tensors(checkpoint(run, stage, END)) for run in (FORK, OLD)))
    assert read_meta(checkpoint(FORK, stage, END))["config"] == read_meta(checkpoint(OLD, stage, END))["config"]
    if stage != "quantize" or rounds_alike:  # this machine computes the vectors that replace unused codewords
        assert read_status(FORK, stage)["export"] == read_status(OLD, stage)["export"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_new_run_starts_from_the_averages_of_a_checkpoint(stage):
    averages = {
        name.replace("ema/", "param/"): value
        for name, value in read_tensors(checkpoint(OLD, stage, END)).items()
        if name.startswith(("ema/", "statistics/"))
    }
    require_equal(started_from(stage, checkpoint(RUN, stage, END)), averages)


@pytest.mark.parametrize("stage", STAGES)
def test_a_new_run_starts_from_an_export(stage):
    weights = exported_weights(OLD / stage / "export")
    started = started_from(stage, RUN / stage / "export")
    require_equal(started, {name: weights[name.partition("/")[2]].flatten() for name in started})


def started_from(stage: str, source: Path) -> dict[str, torch.Tensor]:
    """Start a new run from a checkpoint or export and return its weights after one step at a learning rate of 0."""
    spresso(*fork(stage, f"checkpoint.start_from={source}", f"{stage}.samples=4", f"{stage}.lr=0"))
    tensors = read_tensors(checkpoint(FORK, stage, f"step_{4:012d}"))
    return {name: value for name, value in tensors.items() if name.startswith(("param/", "statistics/"))}


def exported_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Read all weights of an export, under the names that checkpoints use."""
    parts = {"dit": "dit", "latent_encoder": "g", "upsampler": "f", "quantizer": "quantizer", "prior": "prior"}
    weights = {
        f"{parts[path.stem]}.{name}": value
        for path in folder.glob("*.safetensors")
        if path.stem in parts
        for name, value in load_file(path).items()
    }
    adapter = load_file(folder / "adapter_model.safetensors") if (folder / "codec.json").exists() else {}
    return weights | {
        name.replace("base_model.model.", "dit.").replace(".weight", ".default.weight"): value
        for name, value in adapter.items()
    }


# --- exports and streams ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES[1:])
def test_each_export_loads_and_has_its_hash(stage):
    codec = SPresso.from_pretrained(RUN / stage / "export")
    assert codec.model_hash == read_status(OLD, stage)["export"]
    written = codec.save_pretrained(Path("again"), base=RUN / "pretrain/export/dit.safetensors", card="{model}")
    assert written == codec.model_hash
    for path in sorted((OLD / stage / "export").glob("*.safetensors")):
        require_equal(load_file(Path("again") / path.name), load_file(path))


@pytest.mark.parametrize("name", STREAMS)
def test_what_a_stream_holds(name, capsys):
    spresso("info", RUN / f"streams/{name}.spr")
    told = capsys.readouterr().out
    assert str(RUN / "finetune/export") in told
    assert [fact for fact in FACTS[name] if fact not in told] == []


@pytest.mark.parametrize("name", STREAMS)
def test_the_clip_is_encoded_to_the_same_bytes(name):
    spresso("encode", RUN / "streams/clip.flac", "again.spr", "--codec", RUN / "finetune/export", *STREAMS[name])
    assert Path("again.spr").read_bytes() == (OLD / f"streams/{name}.spr").read_bytes()


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_is_decoded_to_the_same_sound(name, rounds_alike):
    spresso("decode", RUN / f"streams/{name}.spr", "back.wav", "--codec", RUN / "finetune/export")
    digest, samples = decoded_samples(Path("back.wav"))
    recorded = np.load(OLD / f"streams/{name}.npy")
    assert soundfile.info("back.wav").frames == soundfile.info(OLD / "streams/clip.flac").frames
    np.testing.assert_allclose(samples, recorded, rtol=0, atol=1e-4 * np.abs(recorded).max())
    if rounds_alike:
        assert digest == RECORDED["decoded"][name]


# --- latents ----------------------------------------------------------------------------------------------------------


def test_the_latents_are_as_indexed(capsys):
    spresso("index", RUN / "latents", "--verify")
    assert capsys.readouterr().err.count("all match the index") == 2


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_latents_are_those_in_the_tars(split):
    shard_set = open_set(str(RUN / "latents" / split))
    with tarfile.open(OLD / "latents" / split / "00000-00000.tar") as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}
    keys = [name.removesuffix(".x0.npy") for name in members if name.endswith(".x0.npy")]
    assert len(shard_set) == len(keys)
    for id_, key in enumerate(keys):
        np.testing.assert_array_equal(shard_set.latents([id_])[0], np.load(io.BytesIO(members[f"{key}.x0.npy"])))
        assert shard_set.metadata(id_) == json.loads(members[f"{key}.json"])
        if split == "test":
            audio, _ = soundfile.read(io.BytesIO(members[f"{key}.flac"]), dtype="float32")
            np.testing.assert_array_equal(np.ravel(shard_set.audio(id_)), audio)
