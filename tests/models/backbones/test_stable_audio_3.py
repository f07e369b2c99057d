"""Stable Audio 3 from a folder that diffusers' pipeline wrote, compared with diffusers' and transformers' classes."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file, save_file
from torch.nn.functional import pad

from models.backbones.pretrained import (
    latent_timing,
    load_autoencoder,
    load_dit,
    outline_autoencoder,
    read_dit_config,
    weight_files,
)
from models.backbones.same import SameAE, load_same
from models.backbones.stable_audio_3 import StableAudio3DiT, load_stable_audio_3
from models.decoder import make_decoder
from models.diffusion import FlowMatching
from models.lora import inject_lora
from models.sizes import block_counts, decoder_config, with_blocks
from models.text_encoder import load_stable_audio_3_text
from models.weights import hash_state
from tests import stable_audio_3 as release
from tests.stable_audio import shaken

FRAMES, BATCH = 20, 3
pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return release.write_release(tmp_path_factory.mktemp("release"))


@pytest.fixture(scope="module")
def dit(folder: Path) -> StableAudio3DiT:
    return load_stable_audio_3(folder)


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, t, text and its mask."""
    torch.manual_seed(0)
    x = torch.randn(BATCH, release.CHANNELS, FRAMES)
    mask = torch.arange(release.TOKENS) < torch.tensor([5, release.TOKENS, 1])[:, None]
    return x, torch.rand(BATCH), torch.randn(BATCH, release.TOKENS, release.WIDTH), mask


@torch.no_grad()
def pipelines(text: torch.Tensor | None, mask: torch.Tensor | None = None, given_frames: int = 1) -> torch.Tensor:
    """What the pipeline hands to its transformer, and what that gives; zeros for no text, as in the training.

    Nothing is given for inpainting: zeros in `given_frames` frames, which all frames share if it is 1.
    """
    x, t, _, _ = inputs()
    pipe = release.pipeline()
    seconds = FRAMES * release.HOP / release.RATE
    duration = pipe.encode_duration(seconds, torch.device("cpu"), 1, BATCH)
    whole = torch.ones(BATCH, release.TOKENS, dtype=torch.bool) if mask is None else mask
    context, context_mask = pipe.prepare_cross_attention(inputs()[2] if text is None else text, whole, duration)
    return pipe.transformer(
        x,
        t,
        encoder_hidden_states=torch.zeros_like(context) if text is None else context,
        encoder_attention_mask=None if text is None else context_mask,
        global_hidden_states=duration,
        local_add_cond=torch.zeros(1, release.CHANNELS + 1, given_frames),
        return_dict=False,
    )[0]


# --- D ----------------------------------------------------------------------------------------------------------------


def test_the_output_is_diffusers_to_the_bit_at_the_start(dit):
    x, t, text, mask = inputs()
    condition = torch.zeros(BATCH, dit.config.width, FRAMES)
    with torch.no_grad():
        assert torch.equal(dit(x, t), -pipelines(None))
        assert torch.equal(dit(x, t, text=text), -pipelines(text))
        assert torch.equal(dit(x, t, text=text, text_mask=mask, condition=condition), -pipelines(text, mask))
    assert not torch.allclose(pipelines(text, mask), pipelines(text), atol=1e-3)
    assert not torch.allclose(pipelines(text), pipelines(None), atol=1e-3)
    torch.testing.assert_close(pipelines(text, given_frames=FRAMES), pipelines(text))


def test_a_row_without_text_is_unconditional(dit):
    x, t, text, mask = inputs()
    mask[1] = False
    with torch.no_grad():
        mixed, unconditional = dit(x, t, text=text, text_mask=mask), dit(x, t)
    torch.testing.assert_close(mixed[1], unconditional[1], rtol=0, atol=1e-6)
    assert torch.equal(mixed[::2], -pipelines(text, inputs()[3])[::2])


def test_z_enters_at_the_input_and_its_gradient_comes_back(dit):
    x, t, _, _ = inputs()
    condition = torch.zeros(BATCH, dit.config.width, FRAMES, requires_grad=True)
    dit(x, t, condition=condition).square().mean().backward()
    assert condition.grad is not None
    assert (condition.grad.abs().amax((1, 2)) > 0).all()


def test_the_length_of_a_crop_is_told(dit):
    x, t, _, _ = inputs()
    told = dit.config.frame_seconds
    try:
        with torch.no_grad():
            before = dit(x, t)
            dit.config.frame_seconds = 100 * told
            assert not torch.equal(dit(x, t), before)
    finally:
        dit.config.frame_seconds = told


def test_in_lower_precision_late_tokens_and_t_keep_their_digits(folder):
    x, t, _, _ = inputs()
    lower = load_stable_audio_3(folder).bfloat16()
    assert (lower.turns.frequencies.dtype, lower.seconds.turns.frequencies.dtype) == (torch.float32, torch.float32)
    assert torch.equal(lower.turns.frequencies, release.transformer().rotary_pos_emb.inv_freq)
    with torch.no_grad():
        assert lower(x, t).dtype == torch.float32
        torch.testing.assert_close(lower(x, t), -pipelines(None), atol=0.1, rtol=0.05)
        assert not torch.equal(lower(x, torch.full((BATCH,), 0.5)), lower(x, torch.full((BATCH,), 0.5015)))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("x", (2, 9, 4)),
        ("t", (1,)),
        ("text", (2, 1, release.WIDTH)),
        ("text_mask", (2, 3)),
        ("condition", (2, 32, 5)),
    ],
)
def test_shapes_that_do_not_fit_are_refused(dit, name, shape):
    given = {
        "x": torch.zeros(2, release.CHANNELS, 4),
        "t": torch.zeros(2),
        "text": torch.zeros(2, release.TOKENS, release.WIDTH),
    }
    with pytest.raises(ValueError, match=f"{name} is"):
        dit(**given | {name: torch.zeros(shape)})


@pytest.mark.parametrize("variant", ["plain", "dora"])
def test_lora_is_on_the_attentions_and_the_mlp_of_every_block(folder, variant):
    dit = load_stable_audio_3(folder).requires_grad_(False)
    x, t, _, _ = inputs()
    before = dit(x, t)
    inject_lora(dit, {"rank": 2, "alpha": 2, "variant": variant})
    adapted = {name.split(".lora_")[0] for name, value in dit.named_parameters() if value.requires_grad}
    parts = ["self_attn.to_qkv", "self_attn.to_out", "ff.proj_in", "ff.proj_out"]
    parts += [f"cross_attn.{part}" for part in ("to_q", "to_kv", "to_out")]
    assert adapted == {f"blocks.{index}.{part}" for index in (0, 1) for part in parts}
    torch.testing.assert_close(dit(x, t), before, rtol=0, atol=0 if variant == "plain" else 1e-5)


def test_dora_is_the_releases_which_trains_the_norm_of_each_row(folder):
    """W' = m · (W + s B A) / ‖W + s B A‖ over a row, and m starts as ‖W‖."""
    dit = load_stable_audio_3(folder).requires_grad_(False)
    inject_lora(dit, {"rank": 2, "alpha": 3.0, "variant": "dora"})
    layer = dit.blocks[0].self_attn.to_qkv
    weight, magnitude = layer.get_base_layer().weight, layer.lora_magnitude_vector["default"].weight
    torch.testing.assert_close(magnitude.detach(), weight.norm(dim=1))
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        b.normal_()
        magnitude.mul_(1.5)
        moved = weight + 3.0 / 2 * b @ a
        x = torch.randn(4, weight.shape[1])
        expected = x @ (magnitude[:, None] * moved / moved.norm(dim=1, keepdim=True)).T
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


def test_sizes_survive_json_and_blocks_are_counted(dit):
    config = dit.config
    assert decoder_config(json.loads(json.dumps(vars(config)))) == config
    assert block_counts(config) == (0, 2)
    with torch.device("meta"):
        assert len(make_decoder(with_blocks(config, (0, 3))).blocks) == 3


# --- the formulation --------------------------------------------------------------------------------------------------


def test_the_velocitys_sign_and_the_time_are_those_of_the_releases_scheduler(dit):
    """A step of the release's sampler, from its own velocity at its own time, is a step of ours."""
    assert dit.diffusion == {"name": "flow_matching", "options": {}}
    x, _, text, _ = inputs()
    scheduler, flow = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1), FlowMatching()
    scheduler.set_timesteps(sigmas=[1.0, 0.6, 0.2])
    level, after = scheduler.timesteps[1], scheduler.sigmas[2]
    assert float(level) == pytest.approx(0.6)
    with torch.no_grad():
        ours = dit(x, level.expand(BATCH), text=text)
        scheduler.step(torch.zeros_like(x), scheduler.timesteps[0], x)
        theirs = scheduler.step(-ours, level, x).prev_sample
    x0 = flow.x0_of(ours, x, level.expand(BATCH))
    noise = x0 - flow.target(x0, x0 - ours, level.expand(BATCH))
    alpha, sigma = flow.coefficients(after)
    torch.testing.assert_close(alpha * x0 + sigma * noise, theirs)
    torch.testing.assert_close(x0, x - level * -ours)


# --- the autoencoder --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [1, 31, 32, 1000])
def test_the_autoencoder_is_diffusers_on_stereo(folder, samples):
    # torch rounds some products otherwise if a weight has a gradient
    ae, model = load_autoencoder("same", folder), release.autoencoder().requires_grad_(False)
    audio = torch.randn(2, 2, samples)
    with torch.no_grad():
        x0, decoded = ae.encode(audio), ae.decode(ae.encode(audio))
        expected = model.encode(pad(audio, (0, -samples % release.HOP))).latents
        assert torch.equal(x0, expected)
        assert torch.equal(decoded, model.decode(expected).sample)
    assert x0.shape == (2, release.CHANNELS, ae.frames(samples))
    assert decoded.shape == (2, 2, ae.frames(samples) * ae.hop)
    assert (ae.channels, ae.sample_rate, ae.hop, ae.surplus_frames, ae.context) == (2, 8000, release.HOP, 0, 2)


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"encoder_strides": [2, 2], "encoder_c_mults": [1, 2], "encoder_transformer_depths": [3, 1]},
        {"sliding_window": 2},
    ],
)
def test_long_sounds_are_encoded_in_blocks_without_a_seam(folder, tmp_path, sizes):
    release.write_release(tmp_path)
    model = release.autoencoder(**sizes)
    model.save_pretrained(tmp_path / "vae")
    ae = load_same(tmp_path)
    ae.most_frames = 10
    audio = torch.randn(1, 2, 45 * release.HOP)
    assert len(list(ae.ranges(audio.shape[2]))) == 5
    with torch.no_grad():
        whole = model.encode(audio).latents
        torch.testing.assert_close(ae.encode(audio), whole, rtol=0, atol=2e-5)
        torch.testing.assert_close(ae.decode(whole), model.decode(whole).sample, rtol=0, atol=2e-5)


def test_an_autoencoder_is_known_by_its_weights(folder, tmp_path):
    ae = load_same(folder)
    assert ae.identity() == load_same(folder).identity()
    release.write_release(tmp_path)
    shaken(model := release.autoencoder())
    model.save_pretrained(tmp_path / "vae")
    assert load_same(tmp_path).identity() != ae.identity()
    outlined = outline_autoencoder("same", folder)
    assert {name: value.shape for name, value in outlined.state_dict().items()} == {
        name: value.shape for name, value in ae.state_dict().items()
    }
    assert latent_timing("same", folder) == (8000, release.HOP)


# --- text -------------------------------------------------------------------------------------------------------------


def test_a_caption_is_what_the_pipeline_makes_of_it(folder):
    encoder, caption = load_stable_audio_3_text(folder), "a dog"
    with torch.no_grad():
        expected, mask = release.pipeline().encode_prompt(caption, torch.device("cpu"), 1)
    found = encoder.encode(caption)
    assert found.shape == (5, release.WIDTH)
    torch.testing.assert_close(found, expected[0, mask[0].bool()], rtol=1e-4, atol=1e-5)
    assert len(encoder.encode("z" * 50)) == release.TOKENS
    assert encoder.identity() == load_stable_audio_3_text(folder).identity()


# --- the layout -------------------------------------------------------------------------------------------------------


def test_sharded_weights_are_the_same(folder, tmp_path, dit):
    release.write_release(tmp_path, shards=True)
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 1
    assert hash_state({}, load_dit(tmp_path).state_dict()) == hash_state({}, dit.state_dict())
    assert load_same(tmp_path).identity() == load_same(folder).identity()
    assert read_dit_config(tmp_path) == dit.config
    parts = {Path(name).parts[0] for name in weight_files(folder)}
    assert parts == {"transformer", "duration_embedder", "scheduler"}


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return release.write_release(tmp_path / "release")


def edit(path: Path, **settings: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.mark.parametrize(
    ("file", "settings", "message"),
    [
        ("transformer/config.json", {"depth": 3}, r"do not fit the config; missing: transformer_blocks"),
        ("transformer/config.json", {"patch_size": 2}, "patch_size is 1"),
        ("transformer/config.json", {"io_channels": 9}, "io_channels is the autoencoder's latent_dim"),
        ("transformer/config.json", {"qk_norm": "rms"}, "qk_norm is unknown"),
        ("duration_embedder/config.json", {"output_dim": 8}, "global_cond_dim and the duration's output_dim"),
        ("duration_embedder/config.json", {"max_val": 0.0}, "max_val of the duration is above"),
        ("scheduler/scheduler_config.json", {"_class_name": "DDIMScheduler"}, "_class_name is one of FlowMatchEuler"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 1000}, "num_train_timesteps is 1"),
        ("vae/config.json", {"audio_channels": 3}, "audio_channels is 1 or 2"),
        ("vae/config.json", {"encoder_strides": [2, 2]}, "a number for each of encoder_strides"),
        ("vae/config.json", {"decoder_sinusoidal_blocks": []}, "or one number for all"),
    ],
)
def test_what_means_something_else_is_refused(copy, file, settings, message):
    edit(copy / file, **settings)
    with pytest.raises(ValueError, match=message):
        load_dit(copy)


def test_a_missing_part_or_tensor_and_a_pickle_are_named(copy):
    weights = copy / "duration_embedder" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    save_file({name: value for name, value in tensors.items() if name != "freqs"}, weights)
    with pytest.raises(ValueError, match=r"missing: duration_embedder\.freqs"):
        load_dit(copy)
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(ValueError, match="is a pickle"):
        load_dit(copy)
    (copy / "duration_embedder" / "config.json").unlink()
    with pytest.raises(ValueError, match=r"has no duration_embedder/config\.json"):
        load_dit(copy)


def test_the_authors_own_layout_is_refused_with_the_way_to_convert_it(tmp_path):
    (tmp_path / "model_config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    for load in (load_dit, lambda folder: load_autoencoder("same", folder), load_stable_audio_3_text):
        with pytest.raises(ValueError, match=r"stable-audio-tools.*convert_stable_audio_3_to_diffusers\.py"):
            load(tmp_path)


def test_a_hub_name_stands_for_its_copy_in_the_cache(copy, tmp_path, monkeypatch, dit):
    name = "stabilityai/stable-audio-3-small-sfx-base"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(ValueError, match=f"hf download {name}"):
        load_dit(name)
    cached = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    (cached / "snapshots").mkdir()
    copy.rename(cached / "snapshots" / ("0" * 40))
    assert read_dit_config(name) == dit.config
    assert isinstance(load_autoencoder("same", name), SameAE)


def test_without_the_package_one_line_says_what_to_install(folder, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *more: None if name == "diffusers" else found(name, *more)
    )
    for load in (load_stable_audio_3, load_same):
        with pytest.raises(ValueError, match=r"pip install 'spresso\[stable_audio\]'"):
            load(folder)
