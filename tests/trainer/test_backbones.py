"""Pretrained backbones in a run: from a release's folder, with text, through prepare, step 1, resume and the export."""

from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import webdataset
from peft import PeftConfig

from launch import inspect_files, pipeline
from models.backbones.stable_audio import StableAudioDiT
from models.codec import SPresso
from tests import stable_audio as release
from tests.models.backbones.test_pretrained import ae_folder, flow_folder
from tests.trainer.ranks.strategies import group
from tests.trainer.test_loop import losses, stop_after, tensors
from trainer.checkpoints import checkpoint
from trainer.data.shard_set import ShardSet
from trainer.feed import Feed
from trainer.inputs import Inputs
from trainer.loop import train
from trainer.memory.activations import Pass, activations
from trainer.memory.outline import outline
from trainer.ranks.gate import NO_LIMIT, Gate
from trainer.ranks.parallel import Parallel
from trainer.recipes.reading import load_recipe
from trainer.recipes.schema import Config
from trainer.tasks import make_task

pytestmark = pytest.mark.filterwarnings("ignore")
CAPTIONS = {f"sound_{letter * 3}.wav": f"a {letter * 2} sound" for letter in "abcdefghij"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten captioned sounds, and a release of Stable Audio Open."""
    root = tmp_path_factory.mktemp("backbones")
    release.write_release(root / "release")
    (root / "audio").mkdir()
    random = np.random.default_rng(0)
    for name in CAPTIONS:
        soundfile.write(root / "audio" / name, 0.1 * random.standard_normal(9000), 8000)
    lines = (json.dumps({"file": name, "caption": caption}) for name, caption in CAPTIONS.items())
    (root / "audio" / "captions.jsonl").write_text("\n".join(lines))
    return root


def recipe(root: Path, run: Path, *overrides: str, model: str = "stable_audio_open") -> Config:
    small = ["data.clip_seconds=0.45", "data.holdout=0.25", "data.workers=1", "parallel.device=cpu"]
    stage = [f"autoencode.{setting}" for setting in ("samples=32", "text_dropout=0.5")]
    log = ["log.every=8", "log.samples_every=0", "log.clips=1", "log.held_out=2", "checkpoint.every=8"]
    weights = [f"pretrained.folder={root / 'release'}"] if model == "stable_audio_open" else []
    where = [f"run_dir={run}", f"data.audio={root / 'audio'}", f"data.latents={root / 'latents'}"]
    return load_recipe(
        "tiny", [f"model={model}", *where, *small, *stage, *log, *weights, "parallel.threads=1", *overrides]
    )


@pytest.fixture(scope="module")
def make(root: Path) -> Callable[..., Config]:
    """The tiny recipe with `model=stable_audio_open`, on prepared latents with text."""
    pipeline.prepare_latents(recipe(root, root / "prepare"))
    return lambda run, *overrides: recipe(root, run, *overrides)


@pytest.fixture(scope="module")
def trained(make, root: Path) -> Path:
    """Step 1, which nothing interrupted, and the codebooks on top."""
    config = make(root / "run")
    assert train(config, "autoencode") == "done"
    assert train(config, "quantize") == "done"
    return root / "run"


# --- prepare ----------------------------------------------------------------------------------------------------------


def test_text_lies_in_the_shards_as_d_reads_it(make, root, capsys):
    from models.text_encoder import load_stable_audio_text

    shard_set = ShardSet(root / "latents" / "train")
    encoder = load_stable_audio_text(root / "release")
    assert shard_set.info.text == {"encoder": encoder.identity(), "tokens": release.TOKENS, "width": release.WIDTH}
    for id_ in range(len(shard_set)):
        caption = shard_set.metadata(id_)["caption"]
        assert caption in CAPTIONS.values()
        assert np.array_equal(shard_set.text(id_), encoder.encode(caption).numpy().astype(np.float16))
    for sample in webdataset.WebDataset([str(shard_set.paths[0])], shardshuffle=False).decode():
        assert sample["text.npy"].shape[1] == release.WIDTH
        assert sample["x0.npy"].shape == (release.CHANNELS, 113)
    inspect_files.describe(str(root / "latents" / "train"), samples=1, play_to=None)
    assert (
        f"tokens of {release.WIDTH} features per caption, up to {release.TOKENS}, by {encoder.identity()}"
        in capsys.readouterr().out
    )
    inspect_files.verify(str(root / "latents"), workers=1)


def test_an_index_made_again_knows_of_the_text(make, root, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    with tarfile.open(ShardSet(root / "latents" / "train").paths[0]) as tar:
        tar.extractall(copy, filter="data")
    with tarfile.open(tmp_path / "some.tar", "w") as tar:
        for path in sorted(copy.iterdir()):
            tar.add(path, path.name)
    for path in copy.iterdir():
        path.unlink()
    (tmp_path / "some.tar").rename(copy / "some.tar")
    inspect_files.index(str(copy), kind="oobleck", weights=root / "release", workers=1)
    made, before = ShardSet(copy), ShardSet(root / "latents" / "train")
    assert made.info.text is not None
    assert made.info.text["width"] == release.WIDTH
    keys = [[shard_set.metadata(id_)["key"] for id_ in range(len(shard_set))] for shard_set in (made, before)]
    for id_, key in enumerate(keys[0]):
        assert np.array_equal(made.text(id_), before.text(keys[1].index(key)))


def test_embeddings_made_elsewhere_are_taken_by_name(root, tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    for number, name in enumerate(list(CAPTIONS)[1:]):
        np.save(texts / Path(name).with_suffix(".npy"), np.full((3 + number, 24), number, np.float32))
    ae, flow = tmp_path / "ae", tmp_path / "flow"
    for folder in (ae, flow):
        folder.mkdir()
    given = [f"autoencoder.folder={ae_folder(ae)}", f"pretrained.folder={flow_folder(flow)}", "text.kind=files"]
    given += [f"text.folder={texts}", "text.tokens=11", f"data.latents={tmp_path / 'latents'}", "data.clip_seconds=0.2"]
    given += [f"{stage}.crop_frames=198" for stage in ("autoencode", "quantize", "finetune")]
    config = recipe(root, tmp_path / "run", *given, model="woosh")
    pipeline.prepare_latents(config)
    shard_set = ShardSet(tmp_path / "latents" / "train")
    for id_ in range(len(shard_set)):
        number = list(CAPTIONS).index(shard_set.metadata(id_)["source"]) - 1
        tokens = 0 if number < 0 else min(11, 3 + number)
        assert shard_set.text(id_).shape == (tokens, 24)
        assert (shard_set.text(id_) == number).all()
    report = json.loads((tmp_path / "latents" / "report.json").read_text())
    assert [problem["file"] for problem in report["problems"]] == ["sound_aaa.wav"]
    # the authors' release, step 1 from its folders, with text
    assert train(config, "autoencode") == "done"
    codec = SPresso.from_pretrained(tmp_path / "run" / "autoencode" / "export")
    z = codec.audio_to_z(torch.randn(1, 1, 12_000))
    assert codec.z_to_audio(z, codec.noise([0], z.shape[-1])).shape == (1, 1, z.shape[-1] * 9 * 48)


# --- the stream -------------------------------------------------------------------------------------------------------


def feed_of(config: Config) -> Feed:
    task = make_task(config, "autoencode")
    feed = Feed(config, config.autoencode, Parallel(config.parallel), errors=Path(config.run_dir) / "errors.jsonl")
    feed.require(task)
    return feed


def test_a_batch_has_the_text_of_its_samples_where_it_is_kept(make, tmp_path, root):
    feed = feed_of(make(tmp_path))
    shard_set, kept = ShardSet(root / "latents" / "train"), 0
    for step in range(6):
        batch = feed.stream.batch(8 * step)
        halves = [feed.stream.batch(8 * step, rank=rank, world_size=2) for rank in range(2)]
        text_BNE, mask_BN = batch.conditions["text"], batch.conditions["text_mask"]
        for row, id_ in enumerate(batch.ids.tolist()):
            half = halves[row % 2].conditions
            assert torch.equal(text_BNE[row], half["text"][row // 2])
            assert torch.equal(mask_BN[row], half["text_mask"][row // 2])
            count = int(mask_BN[row].sum())
            kept += count > 0
            if count:
                assert np.array_equal(text_BNE[row, :count].numpy(), shard_set.text(id_))
            assert (text_BNE[row, count:] == 0).all()
    assert 12 < kept < 36
    assert feed.stream.blank(3).conditions["text_mask"].sum() == 0


def test_text_that_d_can_not_read_is_refused_and_what_it_is_not_to_is_left_alone(make, tmp_path):
    assert feed_of(make(tmp_path, "autoencode.text_dropout=1")).stream.batch(0).conditions == {}
    config = make(tmp_path)
    task, feed = (
        make_task(config, "autoencode"),
        Feed(config, config.autoencode, Parallel(config.parallel), errors=tmp_path / "errors.jsonl"),
    )
    task.module.dit.config.text_width = 7
    with pytest.raises(ValueError, match=r"D reads 12 tokens of 7: prepare .* autoencode\.text_dropout=1"):
        feed.require(task)


def test_damaged_text_is_no_text_and_named(make, tmp_path, root):
    latents = shutil.copytree(root / "latents", tmp_path / "latents")
    row = ShardSet(latents / "train").index[0]
    with ShardSet(latents / "train").paths[row["shard"]].open("r+b") as file:
        file.seek(int(row["text_offset"]))
        file.write(b"\x7f\x7f\x7f")
    config = make(tmp_path, f"data.latents={latents}", "autoencode.text_dropout=0", "data.max_damaged=0.5")
    feed = feed_of(config)
    for step in range(3):
        batch = feed.stream.batch(8 * step)
        assert torch.equal(batch.conditions["text_mask"].any(1), batch.ids != 0)
    lines = (tmp_path / "errors.jsonl").read_text().splitlines()
    assert [json.loads(line)["sample"] for line in lines] == [0]
    assert "checksum of the text" in lines[0]


# --- training ---------------------------------------------------------------------------------------------------------


def test_step_1_resumes_to_the_bit(trained, make, tmp_path):
    config = make(tmp_path / "run")
    assert train(config, "autoencode", stop=stop_after(2)) == "stopped"
    assert train(config, "autoencode") == "done"
    last = [checkpoint.checkpoints(run / "autoencode" / "checkpoints")[-1] for run in (trained, tmp_path / "run")]
    assert last[0].name == last[1].name
    one, other = map(tensors, last)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert losses(trained, "autoencode") == losses(tmp_path / "run", "autoencode")


def test_the_export_encodes_and_decodes(trained, root):
    export = trained / "quantize" / "export"
    codec = SPresso.from_pretrained(export)
    assert isinstance(codec.dit, StableAudioDiT)
    assert (codec.z_rate, codec.compression) == (125.0, 4.0)
    assert json.loads((export / "codec.json").read_text())["base"]["path"] == str(root / "release")
    assert set(PeftConfig.from_pretrained(str(export)).target_modules) == set(StableAudioDiT.lora_targets)
    audio = 0.1 * torch.randn(1, 9001)
    stream = codec.encode(audio)
    decoded = codec.decode(stream, seed=3)
    assert decoded.shape == audio.shape
    assert torch.isfinite(decoded).all()
    assert torch.equal(decoded, codec.decode(stream, seed=3))


def test_text_reaches_d_and_none_is_as_without(make, tmp_path):
    module = make_task(make(tmp_path), "autoencode").module
    x0_BCT, positions_B = torch.randn(4, release.CHANNELS, 106), torch.arange(4)
    text, mask = torch.randn(4, release.TOKENS, release.WIDTH).half(), torch.zeros(4, release.TOKENS, dtype=torch.bool)
    mask[2] = True
    with torch.no_grad():
        read, without = (
            module(Inputs(x0=x0_BCT, positions=positions_B, conditions=conditions)).total({})
            for conditions in ({"text": text, "text_mask": mask}, {})
        )
    assert (read != without).tolist() == [False, False, True, False]


WAYS = {
    "recomputed": ("parallel.checkpoint_activations=true",),
    "fsdp2": ("parallel.strategy=fsdp2", "parallel.shard_base=true", "parallel.checkpoint_activations=true"),
    "zero3": ("parallel.strategy=zero3",),
}


def learned_curve(config: Config, x0_BCT: torch.Tensor, conditions: dict[str, torch.Tensor]) -> list[float]:
    """Loss and gradient norm of two steps of step 1."""
    parallel, found = Parallel(config.parallel), []
    torch.manual_seed(0)
    task = make_task(config, "autoencode")
    with torch.no_grad():  # f begins at zero, and g and LoRA would have no gradient for two steps
        for parameter in task.learned.values():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    strategy = parallel.prepare(task.module, config.autoencode)
    for step in range(2):
        with strategy.reducing(last=True):
            inputs = Inputs(x0=x0_BCT, positions=torch.arange(4) + 4 * step, conditions=conditions)
            losses_B = strategy.forward(inputs).total({})
            strategy.backward(losses_B.mean(), last=True)
        found += [float(losses_B.mean()), float(strategy.step(1e-3, Gate(torch.zeros(()), NO_LIMIT)))]
    strategy.close()
    return found


def test_every_strategy_learns_the_same(make, tmp_path):
    torch.manual_seed(0)
    tokens = torch.randn(4, release.TOKENS, release.WIDTH).half()
    mask = torch.arange(release.TOKENS) < torch.tensor([3, 0, 12, 5])[:, None]
    x0_BCT, conditions = torch.randn(4, release.CHANNELS, 106), {"text": tokens, "text_mask": mask}
    linear = torch.nn.functional.linear
    with group():
        reference = learned_curve(make(tmp_path, "autoencode.global_batch=4"), x0_BCT, conditions)
        for way, overrides in WAYS.items():
            config = make(tmp_path, "autoencode.global_batch=4", *overrides)
            assert learned_curve(config, x0_BCT, conditions) == pytest.approx(reference, rel=1e-5), way
    assert torch.nn.functional.linear is linear  # a stage that follows in this process computes as it would alone


def test_the_memory_of_a_run_is_told(make, tmp_path):
    config = make(tmp_path)
    found, module = outline(config, "autoencode"), make_task(config, "autoencode").module
    named = dict(module.named_parameters())
    assert found.trained == {name: value.shape for name, value in named.items() if value.requires_grad}
    assert found.frozen == {name: value.shape for name, value in named.items() if not value.requires_grad}
    assert len(found.blocks) == 2 + 1 + 1  # of D, g and f
    how = Pass(4, 106, "fp32", lower_trained=False, recomputed=False, cuda=False)
    without = activations(config, "autoencode", found.dit, how)
    more = activations(config, "autoencode", found.dit, Pass(**vars(how) | {"text": True}))
    assert more.saved > without.saved > 0
