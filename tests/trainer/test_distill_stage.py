"""The stage `distill`: taught by the codec's own decodes, resumed like every stage, evaluated beside the rest."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from models.codec import SPresso
from models.lora import ADAPTER, DISTILLED, using
from models.samplers import Solver, generate
from tests.trainer.test_loop import losses, stop_after, tensors
from trainer.checkpoints.names import checkpoints
from trainer.evaluate.own_codecs import own_sources
from trainer.evaluate.scored_clips import load_clips
from trainer.inputs import Inputs
from trainer.loop import train
from trainer.memory.estimate import Estimate
from trainer.randomness import normal
from trainer.recipes.reading import load_recipe
from trainer.recipes.schema import Config
from trainer.run_directory import stage_folder
from trainer.stage_inputs import training_sets
from trainer.tasks import make_task

BRIEF = (
    *("pretrain.samples=128", "autoencode.samples=64", "finetune.samples=16", "quantizer.vectors=1000"),
    *("pretrain.lr=3e-3", "autoencode.lr=3e-3", "log.samples_every=0", "log.every=8", "log.held_out=8"),
    *("distill.samples=128", "distill.global_batch=8", "distill.crop_frames=63", "distill.lr=1e-2", "distill.warmup=0"),
    *("distill.ema_halflife=8", "distillation.steps=[2,1]", "checkpoint.every=64"),
    *("sampling.steps=4", "sampling.guidance=1.5", "sampling.temperature=0.9"),
)


@pytest.fixture(scope="module")
def run(prepared, tmp_path_factory) -> Config:
    """The tiny recipe, run to the end of `distill`."""
    folder = tmp_path_factory.mktemp("distill")
    paths = [f"run_dir={folder}", f"data.latents={prepared / 'latents'}", f"data.audio={prepared / 'audio'}"]
    config = load_recipe("tiny", [*paths, "parallel.threads=1", "parallel.device=cpu", *BRIEF])
    for stage in ("pretrain", "autoencode", "quantize", "finetune", "distill"):
        assert train(config, stage) == "done"
    return config


def again(config: Config, folder: Path, *overrides: str) -> Config:
    """The same recipe in a folder that has the earlier stages' exports."""
    for stage in ("pretrain", "autoencode", "quantize", "finetune"):
        (folder / stage).parent.mkdir(parents=True, exist_ok=True)
        (folder / stage).symlink_to(stage_folder(config, stage))
    paths = [f"run_dir={folder}", f"data.latents={config.data.latents}", f"data.audio={config.data.audio}"]
    return load_recipe("tiny", [*paths, "parallel.threads=1", "parallel.device=cpu", *BRIEF, *overrides])


def micro_batch(rows: int = 4) -> Inputs:
    x0_BCT = torch.randn(rows, 128, 63, generator=torch.Generator().manual_seed(4))
    return Inputs(x0=x0_BCT, positions=torch.arange(rows))


def exports(config: Config, *stages: str) -> list[SPresso]:
    return [SPresso.from_pretrained(stage_folder(config, stage) / "export") for stage in stages]


def test_it_makes_no_other_model_and_changes_no_other_weight(run):
    before, after = exports(run, "finetune", "distill")
    assert after.model_hash == before.model_hash
    state = after.state_dict()
    assert all(torch.equal(state[name], value) for name, value in before.state_dict().items())
    status = json.loads((stage_folder(run, "distill") / "status.json").read_text())
    assert status["export"] == before.model_hash
    assert "distilled/adapter_model.safetensors" in status["files"]


def test_it_learns_and_has_a_curve_for_each_number_of_steps(run):
    text = (stage_folder(run, "distill") / "metrics.jsonl").read_text()
    found = [line for line in map(json.loads, text.splitlines()) if line["kind"] == "train"]
    assert found[-1]["loss"] < found[0]["loss"]
    assert {"steps_1", "steps_2"} <= set(found[0]["loss_terms"])


def test_it_decodes_nearer_to_the_teacher_than_the_undistilled_in_as_few_steps(run):
    """On crops that it may have learned from: so brief a training says little of others."""
    (codec,), (shards,) = exports(run, "distill"), training_sets(run)
    x0 = torch.stack([torch.from_numpy(x0)[:, :63].float() for x0 in shards.latents(range(8))])
    z = codec.quantizer.decode(codec.quantizer.encode(codec.g(x0).transpose(1, 2))).transpose(1, 2)
    start = codec.noise(list(range(8)), 7)
    teacher = codec.z_to_x0(z, start, sampling=run.sampling)
    for steps in (1, 2):
        sampling = dataclasses.replace(run.sampling, steps=steps)
        few = codec.z_to_x0(z, start, sampling=sampling)
        with using(codec.dit, ADAPTER):
            plain = generate(codec.dit, codec.diffusion, start, {"condition": codec.f(z)}, sampling=sampling)
        assert (few - teacher).square().mean() < 0.9 * (plain - teacher).square().mean()


def test_the_teacher_is_the_finetuned_d_with_the_recipes_sampling(run):
    task, inputs = make_task(run, "distill"), micro_batch()
    module = task.module
    draws = module.draws(inputs.positions)
    conditions = module.conditions(inputs.x0, draws)
    noise = normal(draws["noise_key"], 128, 63)
    states = module.teacher_states(noise, conditions)
    (finetuned,) = exports(run, "finetune")
    expected = generate(finetuned.dit, finetuned.diffusion, noise, conditions, sampling=run.sampling)
    torch.testing.assert_close(states[-1], expected)
    assert len(states) == run.sampling.steps + 1


def test_a_student_that_arrives_where_the_teacher_does_has_no_loss(run):
    """Where the teacher's own steps are Euler's, a student that steps as often has nothing to learn."""
    config = load_recipe("tiny", ["sampling.sampler=euler"])
    task, inputs = make_task(run, "distill"), micro_batch()
    module = task.module
    module.distilled.sampling = dataclasses.replace(config.sampling, steps=4)
    module.solver = Solver(module.diffusion, steps=4, sampler="euler")
    module.spans = {4: [(0, 1), (1, 2), (2, 3), (3, 4)], 1: [(0, 4)]}
    terms = module(inputs).terms
    assert terms["steps_4"].max() < 1e-6 < 1e-3 < terms["steps_1"].min()


def test_only_what_is_distilled_is_learned(run):
    task = make_task(run, "distill")
    kinds = {name.split(".")[0] for name in task.learned}
    assert kinds == {"dit", "distilled"}
    assert all(f".{DISTILLED}." in name for name in task.learned if name.startswith("dit."))
    task.module(micro_batch()).total({}).mean().backward()
    assert all(value.grad is None for value in task.module.parameters() if not value.requires_grad)
    # The last layer of the shift starts at zero, so nothing before that layer has a gradient yet.
    assert all(value.grad is not None and value.grad.isfinite().all() for value in task.learned.values())


def test_padding_counts_in_no_loss(run):
    module, inputs = make_task(run, "distill").module, micro_batch()
    mask = torch.ones(4, 63, dtype=torch.bool)
    mask[3, 18:] = False
    plain, masked = module(inputs).total({}), module(dataclasses.replace(inputs, mask=mask)).total({})
    torch.testing.assert_close(masked[:3], plain[:3])
    assert masked[3] != plain[3]


@pytest.mark.parametrize("recomputed", ["true", "false"])
def test_stopped_and_resumed_it_is_the_same_to_the_bit(run, recomputed, tmp_path):
    """Recomputed blocks are the student's, although the teacher has used them since."""
    config = again(run, tmp_path / "run", f"parallel.checkpoint_activations={recomputed}")
    assert train(config, "distill", stop=stop_after(5)) == "stopped"
    assert train(config, "distill") == "done"
    assert losses(tmp_path / "run", "distill") == losses(Path(run.run_dir), "distill")
    ours, theirs = (tensors(checkpoints(Path(at) / "distill/checkpoints")[-1]) for at in (config.run_dir, run.run_dir))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("strategy", ["zero3", "fsdp2"])
def test_ranks_that_share_weights_learn_the_same(run, strategy, tmp_path):
    shares = ["parallel.shard_base=true"] if strategy == "fsdp2" else []
    config = again(run, tmp_path / "run")
    settings = [f"parallel.strategy={strategy}", "parallel.processes=2", *shares, *BRIEF]
    paths = [f"run_dir={config.run_dir}", f"data.latents={config.data.latents}", f"data.audio={config.data.audio}"]
    command = [sys.executable, "-m", "launch.cli", "train", "tiny", "stage=distill", *paths, *settings]
    quiet = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "parallel.device=cpu"], env=quiet, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    ours, theirs = losses(tmp_path / "run", "distill"), losses(Path(run.run_dir), "distill")
    assert list(ours) == list(theirs)
    assert list(ours.values()) == pytest.approx(list(theirs.values()), rel=1e-3)


def test_evaluation_has_a_row_for_each_number_of_steps(run):
    clips = load_clips(run, torch.device("cpu"))
    sources, _ = own_sources(run, clips, torch.device("cpu"))
    found = {source.key: source for source in sources}
    assert {"zq4_in2", "zq4_in1"} <= set(found)
    with torch.inference_mode():
        made, plain = found["zq4_in1"].decode([0]), found["zq4"].decode([0])
        export, one = found["zq4_in1"].export, dataclasses.replace(run.sampling, steps=1)
        z, _ = export.through_files([0], 4)
        expected = export.codec.z_to_audio(z, export.codec.noise(clips.seeds([0]), z.shape[-1]), sampling=one)
    assert made.system.title == "0.22 kbps in 1 step"
    assert made.system.payload_kbps == plain.system.payload_kbps
    torch.testing.assert_close(made.takes[0], export.back(expected))
    assert found["zq4_in1"].identity != found["zq4_in2"].identity


def test_the_plan_counts_all_of_a_students_steps(run):
    finetuned, distilled = (Estimate(run, stage, 1) for stage in ("finetune", "distill"))
    saved = [one.activations(one.own).saved for one in (finetuned, distilled)]
    assert saved[1] > 2 * saved[0]


def test_steps_that_cannot_be_distilled_are_refused(tiny):
    asked = ("distill.samples=8", "distill.crop_frames=63", "distill.global_batch=8")
    with pytest.raises(ValueError, match=r"distillation\.steps holds 4, which is not below sampling\.steps=4"):
        tiny(*asked, "distillation.steps=[4,1]")
    with pytest.raises(ValueError, match=r"distillation\.steps is empty"):
        tiny(*asked, "distillation.steps=[]")
    assert "distill" not in tiny("distillation.steps=[4,1]").stages
