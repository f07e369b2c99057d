"""Stable Audio 3 in a run: from a release's folder, in stereo and with text, through every stage to an export."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from peft import PeftConfig

from launch import pipeline
from models import bitstream
from models.backbones.stable_audio_3 import StableAudio3DiT
from models.codec import SPresso
from tests import stable_audio_3 as release
from tests.trainer.ranks.strategies import group
from tests.trainer.test_backbones import learned_curve
from tests.trainer.test_loop import losses, stop_after, tensors
from trainer.checkpoints import checkpoint
from trainer.data.shard_set import ShardSet
from trainer.evaluate.evaluation import evaluate
from trainer.inputs import Inputs
from trainer.loop import train
from trainer.recipes.reading import load_recipe
from trainer.recipes.schema import Config
from trainer.tasks import make_task

pytestmark = pytest.mark.filterwarnings("ignore")
CAPTIONS = {f"sound_{letter * 3}.wav": f"a {letter * 2} sound" for letter in "abcdefghij"}
MONO = "sound_aaa.wav"
FRAMES = 104


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten captioned sounds, nine of them in stereo, and a release of Stable Audio 3."""
    root = tmp_path_factory.mktemp("stable_audio_3")
    release.write_release(root / "release")
    (root / "audio").mkdir()
    random = np.random.default_rng(0)
    for name in CAPTIONS:
        channels = 1 if name == MONO else 2
        soundfile.write(root / "audio" / name, 0.1 * random.standard_normal((9000, channels)), 8000)
    lines = (json.dumps({"file": name, "caption": caption}) for name, caption in CAPTIONS.items())
    (root / "audio" / "captions.jsonl").write_text("\n".join(lines))
    return root


def recipe(root: Path, run: Path, *overrides: str) -> Config:
    small = ["data.clip_seconds=0.45", "data.holdout=0.25", "data.workers=1", "parallel.device=cpu"]
    stages = [f"{stage}.crop_frames={FRAMES}" for stage in ("autoencode", "quantize", "finetune")]
    stages += ["autoencode.samples=32", "finetune.samples=16", "autoencode.text_dropout=0.5", "evaluate.clips=2"]
    stages += ["evaluate.decodes=2", "evaluate.page_clips=1", "evaluate.batch=2", "sampling.steps=2"]
    log = ["log.every=8", "log.samples_every=16", "log.clips=1", "log.held_out=2", "checkpoint.every=8"]
    weights = [f"pretrained.folder={root / 'release'}", "parallel.threads=1", "latent_encoder.pooling=4"]
    where = [f"run_dir={run}", f"data.audio={root / 'audio'}", f"data.latents={root / 'latents'}"]
    return load_recipe("tiny", ["model=stable_audio_3", *where, *small, *stages, *log, *weights, *overrides])


@pytest.fixture(scope="module")
def make(root: Path) -> Callable[..., Config]:
    """The tiny recipe with `model=stable_audio_3`, on prepared latents with text."""
    pipeline.prepare_latents(recipe(root, root / "prepare"))
    return lambda run, *overrides: recipe(root, run, *overrides)


@pytest.fixture(scope="module")
def trained(make, root: Path) -> Path:
    """All three steps, which nothing interrupted."""
    config = make(root / "run")
    for stage in ("autoencode", "quantize", "finetune"):
        assert train(config, stage) == "done"
    return root / "run"


def test_latents_are_of_both_channels_and_text_is_as_d_reads_it(make, root):
    from models.backbones.pretrained import load_autoencoder
    from models.text_encoder import load_stable_audio_3_text

    encoder, ae = load_stable_audio_3_text(root / "release"), load_autoencoder("same", root / "release")
    mono = 0
    for split in ("train", "test"):
        shard_set = ShardSet(root / "latents" / split)
        assert shard_set.info.text == {"encoder": encoder.identity(), "tokens": release.TOKENS, "width": release.WIDTH}
        for id_ in range(len(shard_set)):
            metadata = shard_set.metadata(id_)
            text_NE = encoder.encode(metadata["caption"]).numpy().astype(np.float16)
            assert np.array_equal(shard_set.text(id_), text_NE)
            sound, _ = soundfile.read(root / "audio" / metadata["source"], dtype="float32", always_2d=True)
            start = round(metadata["start"] * 8000)
            clip_2S = np.broadcast_to(sound[start : start + 3600].T, (2, 3600)) * 10 ** (metadata["gain_db"] / 20)
            x0_CT = ae.encode(torch.from_numpy(clip_2S.astype(np.float32))[None])[0]
            np.testing.assert_allclose(shard_set.latents([id_])[0], x0_CT, atol=2e-3)
            mono += metadata["source"] == MONO
            if split == "test":
                assert shard_set.audio(id_).shape == (2, 3600)
    assert mono


def test_step_1_resumes_to_the_bit(trained, make, tmp_path):
    config = make(tmp_path / "run")
    assert train(config, "autoencode", stop=stop_after(2)) == "stopped"
    assert train(config, "autoencode") == "done"
    last = [checkpoint.checkpoints(run / "autoencode" / "checkpoints")[-1] for run in (trained, tmp_path / "run")]
    one, other = map(tensors, last)
    assert one.keys() == other.keys()
    assert any(name.endswith("lora_magnitude_vector.default.weight") for name in one)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert losses(trained, "autoencode") == losses(tmp_path / "run", "autoencode")


@pytest.mark.parametrize(
    ("channels", "wanted", "layout", "rows"),
    [(1, "auto", "joint", 1), (2, "auto", "joint", 1), (2, "mid_side", "mid_side", 2), (3, "auto", "separate", 3)],
)
def test_the_export_codes_stereo_in_one_row(trained, root, channels, wanted, layout, rows):
    export = trained / "finetune" / "export"
    codec = SPresso.from_pretrained(export)
    assert isinstance(codec.dit, StableAudio3DiT)
    assert json.loads((export / "codec.json").read_text())["base"]["path"] == str(root / "release")
    adapter = PeftConfig.from_pretrained(str(export))
    assert (set(adapter.target_modules), adapter.use_dora) == (set(StableAudio3DiT.lora_targets), True)
    audio = 0.1 * torch.randn(channels, 9001)
    stream = codec.encode(audio, channels=wanted)
    assert (stream.header.layout, len(stream.codes)) == (layout, rows)
    read = bitstream.read(bitstream.write(stream), frames_of=codec.z_frames)
    decoded = codec.decode(read, seed=3)
    assert decoded.shape == audio.shape
    assert torch.isfinite(decoded).all()
    assert torch.equal(decoded, codec.decode(stream, seed=3))


def test_a_pretrained_d_is_unchanged_at_step_0_whatever_z_is(make, tmp_path):
    task = make_task(make(tmp_path), "autoencode")
    x0_BCT, t_B = torch.randn(2, release.CHANNELS, FRAMES), torch.tensor([0.3, 0.9])
    with torch.no_grad():
        condition = task.codec.f(task.codec.g(x0_BCT))
        assert (condition == 0).all()
        given = task.codec.dit(x0_BCT, t_B, condition=condition)
        assert torch.equal(given, task.codec.dit(x0_BCT, t_B))


def test_text_reaches_d_and_none_is_as_without(make, tmp_path):
    module = make_task(make(tmp_path), "autoencode").module
    x0_BCT, positions_B = torch.randn(4, release.CHANNELS, FRAMES), torch.arange(4)
    text, mask = torch.randn(4, release.TOKENS, release.WIDTH).half(), torch.zeros(4, release.TOKENS, dtype=torch.bool)
    mask[2] = True
    with torch.no_grad():
        read, without = (
            module(Inputs(x0=x0_BCT, positions=positions_B, conditions=conditions)).total({})
            for conditions in ({"text": text, "text_mask": mask}, {})
        )
    differs = (read - without).abs() > 1e-5
    assert differs.tolist() == [False, False, True, False]


def test_stereo_is_scored_in_both_channels(trained, make, root):
    report = evaluate(make(root / "run"))
    assert report is not None
    assert report["channels"] == 2
    assert report["results"]["autoencoder"]["log_mel"]["mean"] > 0
    clip = report["clips"][0]["audio"]
    for key in ("original", "autoencoder", "z"):
        assert soundfile.info(root / "run" / "evaluate" / clip[key][0]).channels == 2


WAYS = {
    "recomputed": ("parallel.checkpoint_activations=true",),
    "fsdp2": ("parallel.strategy=fsdp2", "parallel.shard_base=true", "parallel.checkpoint_activations=true"),
    "zero3": ("parallel.strategy=zero3",),
}


def test_every_strategy_learns_the_same(make, tmp_path):
    tokens = torch.randn(4, release.TOKENS, release.WIDTH).half()
    mask = torch.arange(release.TOKENS) < torch.tensor([3, 0, 12, 5])[:, None]
    x0_BCT, conditions = torch.randn(4, release.CHANNELS, FRAMES), {"text": tokens, "text_mask": mask}
    with group():
        reference = learned_curve(make(tmp_path, "autoencode.global_batch=4"), x0_BCT, conditions)
        for way, overrides in WAYS.items():
            curve = learned_curve(make(tmp_path, "autoencode.global_batch=4", *overrides), x0_BCT, conditions)
            assert curve == pytest.approx(reference, rel=1e-5), way


def test_it_is_distilled_and_learns_where_a_step_ends(trained, make, tmp_path):
    for stage in ("autoencode", "quantize", "finetune"):
        (tmp_path / stage).symlink_to(trained / stage)
    settings = ("distillation.steps=[1]", "distill.samples=16", "distill.warmup=0", "distill.lr=1e-2")
    assert train(make(tmp_path, *settings, f"distill.crop_frames={FRAMES}"), "distill") == "done"
    before, after = (SPresso.from_pretrained(tmp_path / stage / "export") for stage in ("finetune", "distill"))
    stream = before.encode(0.1 * torch.randn(2, 9001))
    taught, untaught = (dataclasses.replace(before.config.sampling, steps=steps) for steps in (1, 2))
    assert torch.equal(after.decode(stream, sampling=untaught), before.decode(stream, sampling=untaught))
    assert not torch.equal(after.decode(stream, sampling=taught), before.decode(stream, sampling=taught))
    assert after.distilled is not None
    x_BCT, t_B, shift_BD = torch.randn(1, release.CHANNELS, FRAMES), torch.tensor([0.5]), torch.ones(1, 32)
    assert after.distilled.second_time.out.weight.abs().max() > 0
    with torch.no_grad():
        assert torch.equal(after.dit(x_BCT, t_B, time_shift=0 * shift_BD), after.dit(x_BCT, t_B))
        assert not torch.equal(after.dit(x_BCT, t_B, time_shift=shift_BD), after.dit(x_BCT, t_B))
