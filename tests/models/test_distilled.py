"""The distilled D of a codec: it starts as D, serves its numbers of steps alone, and goes with the codec's files."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from models import bitstream
from models.backbones.pretrained import load_dit
from models.codec import SPresso
from models.distilled import Distilled
from models.lora import DISTILLED, using
from models.sizes import LORA_VARIANTS, Sampling
from models.weights import save_weights
from tests.models.test_codec import make_codec, noise
from tests.models.test_lora import base
from tests.models.test_lora import codec as codec_of_variant

SAMPLING = Sampling(sampler="euler", steps=4, temperature=0.8)


def add(codec: SPresso, *, trained: bool = True) -> SPresso:
    """Distill a codec as if it had learned something."""
    codec.config.sampling = SAMPLING
    codec.add_distilled(Distilled(width=codec.dit.config.width, steps=[1, 2], sampling=dataclasses.asdict(SAMPLING)))
    if trained:
        torch.manual_seed(5)
        assert codec.distilled is not None
        for parameter in [*codec.adapter_parameters(DISTILLED).values(), *codec.distilled.parameters()]:
            parameter.data += 0.2 * torch.randn_like(parameter)
    return codec.eval().requires_grad_(False)


def in_steps(steps: int, **changes: object) -> Sampling:
    return dataclasses.replace(SAMPLING, steps=steps, **changes)


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    dit = base()
    save_weights(tmp_path / "dit.safetensors", dit.state_dict(), dataclasses.asdict(dit.config))
    codec = add(make_codec(load_dit(tmp_path / "dit.safetensors")))
    codec.save_pretrained(tmp_path / "export", base=tmp_path / "dit.safetensors", card="# {model}")
    return tmp_path / "export"


@pytest.mark.parametrize("variant", LORA_VARIANTS)
def test_at_the_start_it_is_the_teachers_eulers_step(variant):
    codec = codec_of_variant(variant, base())
    for parameter in [*codec.f.parameters(), *codec.adapter_parameters().values()]:
        parameter.data += 0.1 * torch.randn_like(parameter)
    start, z = codec.noise([1, 2], 7), torch.randn(2, codec.config.latent_encoder.z_channels, 7)
    plain = [codec.z_to_x0(z, start, sampling=in_steps(steps)) for steps in (1, 2)]
    codec = add(codec, trained=False)
    distilled = [codec.z_to_x0(z, start, sampling=in_steps(steps)) for steps in (1, 2)]
    torch.testing.assert_close(distilled, plain)


def test_it_decodes_its_own_steps_and_leaves_all_else_to_the_other():
    plain, codec = make_codec(), add(make_codec())
    stream = plain.encode(noise(1.0))
    as_before = [
        in_steps(4),
        in_steps(3),
        in_steps(2, guidance=2.0),
        in_steps(1, temperature=1.0),
        in_steps(1, sampler="heun"),
    ]
    for sampling in as_before:
        assert torch.equal(codec.decode(stream, sampling=sampling), plain.decode(stream, sampling=sampling))
    for steps in (1, 2):
        ours, theirs = (one.decode(stream, sampling=in_steps(steps)) for one in (codec, plain))
        assert (ours - theirs).abs().max() > 1e-4
        assert torch.equal(codec.decode(stream, sampling=in_steps(steps)), ours)
    # The other adapter is in use again, whatever was decoded last.
    x, t = torch.randn(1, 128, 27), torch.tensor([0.3])
    assert torch.equal(codec.dit(x, t), plain.dit(x, t))


def test_without_z_it_decodes_nothing():
    plain, codec = make_codec(), add(make_codec())
    start = codec.noise([3], 7)
    assert torch.equal(
        codec.z_to_x0(None, start, sampling=in_steps(1)), plain.z_to_x0(None, start, sampling=in_steps(1))
    )


def test_long_sounds_are_decoded_by_windows():
    codec = add(make_codec())
    z = torch.randn(2, 8, 40)
    told: list[tuple[int, int]] = []
    long = codec.z_to_x0(
        z, codec.noise([1, 2], 40), sampling=in_steps(2), progress=lambda done, total: told.append((done, total))
    )
    each = [codec.z_to_x0(z[row : row + 1], codec.noise([1 + row], 40), sampling=in_steps(2)) for row in (0, 1)]
    torch.testing.assert_close(long, torch.cat(each))
    assert told == [(1, 2), (2, 2)]


def test_saved_and_loaded_it_decodes_the_same_streams(exported, tmp_path):
    before = make_codec(load_dit(tmp_path / "dit.safetensors"))
    before.config.sampling = SAMPLING
    before.save_pretrained(tmp_path / "before", base=tmp_path / "dit.safetensors", card="")
    plain, loaded = SPresso.from_pretrained(tmp_path / "before"), SPresso.from_pretrained(exported)
    assert loaded.model_hash == plain.model_hash
    stream = bitstream.read(bitstream.write(plain.encode(noise(1.0))), frames_of=plain.z_frames)
    assert torch.equal(loaded.decode(stream), plain.decode(stream))
    made = add(make_codec(load_dit(tmp_path / "dit.safetensors")))
    made.model_hash = loaded.model_hash
    for steps in (1, 2):
        assert torch.equal(
            loaded.decode(stream, sampling=in_steps(steps)), made.decode(stream, sampling=in_steps(steps))
        )
    again = tmp_path / "again"
    loaded.save_pretrained(again, base=tmp_path / "dit.safetensors", card="# {model}")
    for name in ("distilled.safetensors", "distilled/adapter_model.safetensors", "adapter_model.safetensors"):
        assert (again / name).read_bytes() == (exported / name).read_bytes()


def test_its_adapter_is_what_peft_loads(exported, tmp_path):
    loaded = SPresso.from_pretrained(exported)
    theirs = PeftModel.from_pretrained(load_dit(tmp_path / "dit.safetensors"), str(exported / "distilled"))
    x, t = torch.randn(1, 128, 27), torch.tensor([0.3])
    with torch.no_grad():
        expected = theirs(x, t)
    assert not torch.allclose(loaded.dit(x, t), expected, atol=1e-4)
    with using(loaded.dit, DISTILLED):
        torch.testing.assert_close(loaded.dit(x, t), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda export: (export / "distilled.safetensors").unlink(), "holds files of another export"),
        (lambda export: shutil.rmtree(export / "distilled"), "adapter_model.safetensors"),
        (
            lambda export: shutil.copy(export / "adapter_model.safetensors", export / "distilled"),
            "the distilled has the hash",
        ),
    ],
)
def test_damaged_exports_say_what_is_wrong(exported, damage, message):
    damage(exported)
    with pytest.raises(ValueError, match=message):
        SPresso.from_pretrained(exported)


def test_a_config_that_no_distilled_d_has_is_refused(exported):
    def edit(**changes: object) -> None:
        from safetensors.torch import load_file

        made = SPresso.from_pretrained(exported).distilled
        assert made is not None
        save_weights(
            exported / "distilled.safetensors", load_file(exported / "distilled.safetensors"), made.config() | changes
        )

    original = (exported / "distilled.safetensors").read_bytes()
    for changes, message in (
        ({"steps": [9]}, "9 steps cannot be distilled from 4"),
        ({"sampling": None}, "its config builds no distilled"),
        ({"width": 32}, "distilled"),
    ):
        edit(**changes)
        with pytest.raises(ValueError, match=message):
            SPresso.from_pretrained(exported)
        (exported / "distilled.safetensors").write_bytes(original)


def test_a_users_files_beside_the_adapter_are_kept(exported, tmp_path):
    (exported / "distilled" / "notes.txt").write_text("mine")
    codec = make_codec(load_dit(tmp_path / "dit.safetensors"))
    codec.save_pretrained(exported, base=tmp_path / "dit.safetensors", card="# {model}")
    assert [path.read_text() for path in exported.glob("distilled.*.older/notes.txt")] == ["mine"]
    assert not (exported / "distilled").exists()
    assert "the distilled" not in json.loads((exported / "codec.json").read_text())["parts"]
