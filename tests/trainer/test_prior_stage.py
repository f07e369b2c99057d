"""The stage `prior`: trained by the one loop, kept in the exports, optional."""

from __future__ import annotations

import json

import pytest
import torch

from models import bitstream
from models.codec import SPresso
from trainer.evaluate.own_codecs import own_sources
from trainer.evaluate.scored_clips import load_clips
from trainer.inputs import Inputs
from trainer.loop import train
from trainer.run_directory import stage_folder
from trainer.stage_inputs import training_sets
from trainer.stages import stage_before
from trainer.tasks import make_task

BRIEF = (
    *("pretrain.samples=8", "autoencode.samples=8", "finetune.samples=8", "quantizer.vectors=1000"),
    *("prior.samples=160", "prior.global_batch=8", "prior.crop_frames=63", "prior.lr=0.03", "prior.warmup=8"),
    *("prior.ema_halflife=8", "log.samples_every=0", "log.held_out=8", "checkpoint.every=1000"),
)


@pytest.fixture(scope="module")
def trained(prepared, tmp_path_factory):
    """A recipe with a prior, run to the end of `finetune`."""
    from trainer.recipes.reading import load_recipe

    folder = tmp_path_factory.mktemp("prior")
    paths = [f"run_dir={folder}", f"data.latents={prepared / 'latents'}", f"data.audio={prepared / 'audio'}"]
    config = load_recipe("tiny", [*paths, "parallel.threads=1", "parallel.device=cpu", *BRIEF])
    for stage in ("pretrain", "autoencode", "quantize", "prior", "finetune"):
        assert train(config, stage) == "done"
    return config


def lines(config, kind: str) -> list[dict]:
    text = (stage_folder(config, "prior") / "metrics.jsonl").read_text()
    return [line for line in map(json.loads, text.splitlines()) if line["kind"] == kind]


def test_its_loss_is_bits_a_code_and_falls(trained):
    losses = [line["loss"] for line in lines(trained, "train")]
    assert losses[0] < 5.5  # log2 of 32 codewords, and a little for what it expects wrongly
    assert losses[-1] < losses[0]
    codec = SPresso.from_pretrained(stage_folder(trained, "prior") / "export")
    assert codec.prior.config()["books"] == trained.quantizer.books


def test_finetune_builds_on_it_and_keeps_it(trained, tiny):
    assert stage_before(trained, "finetune") == "prior"
    assert stage_before(tiny(), "finetune") == "quantize"
    before, after = (
        SPresso.from_pretrained(stage_folder(trained, stage) / "export") for stage in ("prior", "finetune")
    )
    assert after.coder().hash == before.coder().hash
    assert json.loads((stage_folder(trained, "finetune") / "inputs.json").read_text())["prior"] == before.model_hash
    assert SPresso.from_pretrained(stage_folder(trained, "quantize") / "export").model_hash == before.model_hash


def test_files_are_shorter_by_it(trained):
    """Of sounds that it has seen: so brief a training says little of others."""
    codec = SPresso.from_pretrained(stage_folder(trained, "finetune") / "export")
    audio = codec.autoencoder.decode(sounds(trained))[0]
    for books in trained.rates:
        stream = codec.encode(audio, books=books)
        plain, coded = bitstream.write(stream), bitstream.write(stream, coder=codec.coder())
        assert len(coded) < len(plain)
        assert (bitstream.read(coded, frames_of=codec.z_frames, coder=codec.coder()).codes == stream.codes).all()


def sounds(config) -> torch.Tensor:
    """Latents (1, C, T) of clips that the stages have learned from, end to end."""
    (shards,) = training_sets(config)
    return torch.cat([torch.from_numpy(x0) for x0 in shards.latents(range(16))], dim=-1).float()[None]


def test_every_rate_is_learned_and_padding_counts_in_no_loss(trained):
    task = make_task(trained, "prior")
    with torch.no_grad():
        for value in task.codec.prior.parameters():
            value.normal_()
    x0, positions = sounds(trained)[..., : 63 * 8].unflatten(-1, (8, 63))[0].transpose(0, 1), torch.arange(8)
    losses = task.module(Inputs(x0=x0, positions=positions)).total({})
    mask = torch.ones(8, 63, dtype=torch.bool)
    mask[3, 18:] = False
    masked = task.module(Inputs(x0=x0, positions=positions, mask=mask)).total({})
    assert torch.equal(losses[torch.arange(8) != 3], masked[torch.arange(8) != 3])
    assert losses[3] != masked[3]
    z = task.codec.g(x0).transpose(1, 2)
    heard = [task.codec.prior(task.codec.quantizer.encode(z[3:4, :2], books=books)).mean() for books in trained.rates]
    assert torch.isclose(masked[3], torch.stack(heard), rtol=1e-4).any()
    each = [task.codec.prior(task.codec.quantizer.encode(z, books=books)).mean((1, 2)) for books in trained.rates]
    drawn = torch.stack([torch.isclose(losses, rate, rtol=1e-4) for rate in each])
    assert drawn.any(0).all()
    assert drawn.any(1).all()


def test_evaluation_counts_entropy_coded_bits(trained):
    """Those of a stream as `spresso encode` would write it, headers aside."""
    clips = load_clips(trained, torch.device("cpu"))
    ours, _ = own_sources(trained, clips, torch.device("cpu"))
    source = next(source for source in ours if source.key == f"zq{trained.rates[0]}")
    with torch.inference_mode():
        made = source.decode([0, 1])
    codec = SPresso.from_pretrained(stage_folder(trained, "finetune") / "export")
    streams = [codec.encode(clips.audio([row])[0], books=trained.rates[0]) for row in (0, 1)]
    written = [bitstream.write(stream, coder=codec.coder()) for stream in streams]
    assert made.coded_bits == [8 * bitstream.read_header(file)[1] for file in written]
    assert made.file_bytes == [len(bitstream.write(stream)) for stream in streams]


def test_ranks_call_it_alike_whatever_rates_they_draw(trained):
    """Under zero3 and fsdp2 each call gathers weights from all ranks, which would wait for one that is not made."""
    task, calls = make_task(trained, "prior"), []
    task.codec.prior.register_forward_hook(lambda module, given, bits: calls.append(bits.shape[-1]))
    for position in range(4):
        inputs = Inputs(x0=sounds(trained)[..., :63], positions=torch.tensor([position]))
        losses = task.module(inputs).total({})
        assert torch.isfinite(losses).all()
        losses.mean().backward()
        assert all(torch.isfinite(value.grad).all() for value in task.learned.values())
    assert calls == 4 * list(trained.rates)
