"""Stable Audio Open: the same outputs as diffusers' own classes, from its layout and from nothing else."""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from pathlib import Path

import pytest
import torch
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from safetensors.torch import load_file, save_file
from torch.nn.functional import pad
from transformers import RobertaConfig, RobertaModel

from models.backbones.oobleck import OobleckAE, load_oobleck
from models.backbones.pretrained import latent_timing, load_autoencoder, load_dit, outline_autoencoder, read_dit_config
from models.backbones.stable_audio import StableAudioDiT, load_stable_audio
from models.decoder import make_decoder
from models.diffusion import VPrediction
from models.lora import inject_lora
from models.sizes import block_counts, decoder_config, with_blocks
from models.text_encoder import load_stable_audio_text, load_text_encoder
from models.weights import hash_state
from tests import stable_audio as release

FRAMES, BATCH = 20, 3
pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return release.write_release(tmp_path_factory.mktemp("release"))


@pytest.fixture(scope="module")
def dit(folder: Path) -> StableAudioDiT:
    return load_stable_audio(folder)


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, t and text."""
    torch.manual_seed(0)
    x = torch.randn(BATCH, release.CHANNELS, FRAMES)
    return x, torch.rand(BATCH), torch.randn(BATCH, release.TOKENS, release.WIDTH)


@torch.no_grad()
def pipelines(text: torch.Tensor | None) -> torch.Tensor:
    """What the release's pipeline hands to its transformer, and what that gives; zeros for no text, as for guidance."""
    x, t, _ = inputs()
    seconds = torch.full((BATCH,), FRAMES * 32 / 8000)
    told = release.projection()(start_seconds=torch.zeros(BATCH), end_seconds=seconds)
    start, end = told.seconds_start_hidden_states, told.seconds_end_hidden_states
    cross = torch.zeros(BATCH, release.TOKENS + 2, release.WIDTH)
    return release.transformer()(
        x,
        t,
        encoder_hidden_states=cross if text is None else torch.cat((text, start, end), 1),
        global_hidden_states=torch.cat((start, end), 2),
        rotary_embedding=get_1d_rotary_pos_embed(8, FRAMES + 1, use_real=True, repeat_interleave_real=False),
        return_dict=False,
    )[0]


# --- D ----------------------------------------------------------------------------------------------------------------


def test_the_output_is_diffusers_to_the_bit_at_the_start(dit):
    x, t, text = inputs()
    mask = torch.arange(release.TOKENS) < torch.tensor([5, release.TOKENS, 1])[:, None]
    condition = torch.zeros(BATCH, dit.config.width, FRAMES)
    with torch.no_grad():
        assert torch.equal(dit(x, t), pipelines(None))
        assert torch.equal(dit(x, t, text=text), pipelines(text))
        masked = dit(x, t, text=text, text_mask=mask, condition=condition)
    assert torch.equal(masked, pipelines(text * mask[..., None]))
    assert not torch.allclose(pipelines(text), pipelines(None), atol=1e-3)


def test_a_row_without_text_is_unconditional(dit):
    x, t, text = inputs()
    mask = torch.ones(BATCH, release.TOKENS, dtype=torch.bool)
    mask[1] = False
    with torch.no_grad():
        mixed, unconditional = dit(x, t, text=text, text_mask=mask), dit(x, t)
    assert torch.equal(mixed[1], unconditional[1])
    assert torch.equal(mixed[::2], pipelines(text)[::2])


def test_z_enters_at_the_input_and_its_gradient_comes_back(dit):
    x, t, _ = inputs()
    condition = torch.zeros(BATCH, dit.config.width, FRAMES, requires_grad=True)
    dit(x, t, condition=condition).square().mean().backward()
    assert condition.grad is not None
    assert (condition.grad.abs().amax((1, 2)) > 0).all()


def test_the_length_of_a_crop_is_told(dit):
    x, t, _ = inputs()
    with torch.no_grad():
        told = dit.config.frame_seconds
        dit.config.frame_seconds = 2 * told
        longer = dit(x, t)
        dit.config.frame_seconds = told
        assert not torch.equal(longer, dit(x, t))


def test_in_lower_precision_t_keeps_its_digits(folder):
    x, t, _ = inputs()
    lower = load_stable_audio(folder).bfloat16()
    with torch.no_grad():
        assert lower(x, t).dtype == torch.float32
        torch.testing.assert_close(lower(x, t), pipelines(None), atol=0.1, rtol=0.05)
        assert torch.tensor(0.5015).bfloat16() == 0.5
        assert not torch.equal(lower(x, torch.full((BATCH,), 0.5)), lower(x, torch.full((BATCH,), 0.5015)))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("x", (2, 9, 4)),
        ("t", (1,)),
        ("text", (2, 1, release.WIDTH)),
        ("text_mask", (2, 3)),
        ("condition", (2, 64, 5)),
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
    with pytest.raises(ValueError, match="text_mask without text"):
        dit(given["x"], given["t"], text_mask=torch.zeros(2, release.TOKENS))


def test_lora_is_on_the_attentions_and_the_mlp_of_every_block(folder):
    dit = load_stable_audio(folder).requires_grad_(False)
    x, t, _ = inputs()
    before = dit(x, t)
    inject_lora(dit, {"rank": 2, "alpha": 2})
    adapted = {name.split(".lora_")[0] for name, value in dit.named_parameters() if value.requires_grad}
    attention = [f"attn{number}.{part}" for number in (1, 2) for part in ("to_q", "to_k", "to_v", "to_out.0")]
    parts = [*attention, "ff.net.0.proj", "ff.net.2"]
    assert adapted == {f"blocks.{index}.{part}" for index in (0, 1) for part in parts}
    assert torch.equal(dit(x, t), before)


def test_sizes_survive_json_and_blocks_are_counted(dit):
    config = dit.config
    assert decoder_config(json.loads(json.dumps(vars(config)))) == config
    assert block_counts(config) == (0, 2)
    with torch.device("meta"):
        assert len(make_decoder(with_blocks(config, (0, 3))).blocks) == 3


# --- the formulation --------------------------------------------------------------------------------------------------


def test_preconditioning_and_levels_are_the_releases_schedulers(monkeypatch, dit):
    if importlib.util.find_spec("torchsde") is None:  # of the noise that its sampler adds, which is not asked for here
        monkeypatch.setitem(sys.modules, "torchsde", types.ModuleType("torchsde"))
    from diffusers.schedulers.scheduling_cosine_dpmsolver_multistep import CosineDPMSolverMultistepScheduler

    scheduler, ours = CosineDPMSolverMultistepScheduler(), VPrediction()
    scheduler.set_timesteps(7)
    torch.testing.assert_close(ours.schedule(7).float(), scheduler.sigmas, rtol=1e-5, atol=0)
    x, _, _ = inputs()
    for sigma in scheduler.sigmas[:-1]:
        told = []

        def network(scaled, level, told=told):
            told[:] = scaled, level
            return scaled.sin()

        denoised = ours.denoise(network, x, sigma.expand(BATCH))
        torch.testing.assert_close(told[0], scheduler.precondition_inputs(x, sigma))
        torch.testing.assert_close(told[1], scheduler.precondition_noise(sigma).expand(BATCH))
        torch.testing.assert_close(denoised, scheduler.precondition_outputs(x, told[0].sin(), sigma))
    assert dit.diffusion == {"name": "v_prediction", "options": {}}


# --- the autoencoder --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [1, 31, 32, 1000])
def test_the_autoencoder_is_diffusers_on_both_channels(folder, samples):
    ae, model = load_autoencoder("oobleck", folder), release.autoencoder()
    audio = torch.randn(2, 1, samples)
    with torch.no_grad():
        x0, decoded = ae.encode(audio), ae.decode(ae.encode(audio))
        expected = model.encode(pad(audio, (0, -samples % 32)).repeat(1, 2, 1)).latent_dist.mode()
        assert torch.equal(x0, expected)
        assert torch.equal(decoded, model.decode(expected).sample.mean(1, keepdim=True))
    assert x0.shape == (2, release.CHANNELS, ae.frames(samples))
    assert decoded.shape == (2, 1, ae.frames(samples) * ae.hop)
    assert (ae.channels, ae.sample_rate, ae.hop, ae.surplus_frames) == (1, 8000, 32, 0)
    with pytest.raises(ValueError, match="at least one frame"):
        ae.decode(x0[..., :0])


def test_an_autoencoder_is_known_by_its_weights(folder, tmp_path):
    ae = load_oobleck(folder)
    assert ae.identity() == load_oobleck(folder).identity()
    release.shaken(model := release.autoencoder())
    release.write_release(tmp_path)
    model.save_pretrained(tmp_path / "vae")
    assert load_oobleck(tmp_path).identity() != ae.identity()
    outlined = outline_autoencoder("oobleck", folder)
    assert {name: value.shape for name, value in outlined.state_dict().items()} == {
        name: value.shape for name, value in ae.state_dict().items()
    }
    assert latent_timing("oobleck", folder) == (8000, 32)


# --- text -------------------------------------------------------------------------------------------------------------


def test_a_caption_is_what_the_pipeline_makes_of_it(folder):
    encoder, caption = load_stable_audio_text(folder), "a dog"
    padded = release.tokenizer()(caption, padding="max_length", max_length=release.TOKENS, return_tensors="pt")
    with torch.no_grad():
        hidden = release.text_encoder()(padded.input_ids, attention_mask=padded.attention_mask)[0]
        expected = release.projection()(text_hidden_states=hidden).text_hidden_states
    real = int(padded.attention_mask.sum())
    found = encoder.encode(caption)
    assert found.shape == (real, release.WIDTH)
    torch.testing.assert_close(found, expected[0, :real], rtol=1e-4, atol=1e-5)
    assert len(encoder.encode("z" * 50)) == release.TOKENS
    assert encoder.identity() == load_stable_audio_text(folder).identity()


def test_any_encoder_of_transformers_gives_the_states_of_a_layer(folder, tmp_path):
    torch.manual_seed(5)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = RobertaModel(RobertaConfig(vocab_size=32, **sizes), add_pooling_layer=False).eval()
    model.save_pretrained(tmp_path)
    release.tokenizer().save_pretrained(tmp_path)
    ids = release.tokenizer()("a dog", return_tensors="pt").input_ids
    encoder = load_text_encoder(tmp_path, tokens=77, layer=-2)
    with torch.no_grad():
        assert torch.equal(encoder.encode("a dog"), model(ids, output_hidden_states=True).hidden_states[-2][0])
    assert load_text_encoder(tmp_path, tokens=4, layer=-2).encode("abcdefgh").shape == (4, 16)
    assert load_text_encoder(tmp_path, tokens=77, layer=-1).identity() != encoder.identity()
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("encoder.layer.1.output.dense.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"lacks weights of its text encoder: encoder\.layer\.1\.output\.dense\.weight"
    ):
        load_text_encoder(tmp_path, tokens=77, layer=-2)


# --- the layout -------------------------------------------------------------------------------------------------------


def test_sharded_weights_are_the_same(folder, tmp_path, dit):
    release.write_release(tmp_path, shards=True)
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 1
    sharded = load_dit(tmp_path)
    assert hash_state({}, sharded.state_dict()) == hash_state({}, dit.state_dict())
    assert load_oobleck(tmp_path).identity() == load_oobleck(folder).identity()
    lost = next((tmp_path / "transformer").glob("*00002*.safetensors"))
    lost.unlink()
    with pytest.raises(ValueError, match=rf"transformer lacks {lost.name}"):
        load_dit(tmp_path)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return release.write_release(tmp_path / "release")


def edit(path: Path, **settings: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def test_a_pickle_is_refused_and_the_way_out_is_told(copy):
    weights = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(ValueError, match=r"model\.bin is a pickle.*safe_serialization=True"):
        load_dit(copy)
    weights = copy / "text_encoder" / "model.safetensors"
    weights.rename(weights.with_name("pytorch_model.bin"))
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is a pickle"):
        load_stable_audio_text(copy)


@pytest.mark.parametrize(
    ("file", "settings", "message"),
    [
        (
            "transformer/config.json",
            {"num_layers": 3},
            r"do not fit the config; missing: transformer_blocks",
        ),
        ("transformer/config.json", {"qk_norm": "rms"}, "qk_norm is unknown"),
        ("transformer/config.json", {"_class_name": "DiTTransformer2DModel"}, "holds a DiTTransformer2DModel, not a"),
        ("transformer/config.json", {"out_channels": 9}, "out_channels is in_channels"),
        ("scheduler/scheduler_config.json", {"prediction_type": "epsilon"}, "prediction_type is v_prediction"),
        ("scheduler/scheduler_config.json", {"_class_name": "DDIMScheduler"}, "_class_name is CosineDPM"),
        ("vae/config.json", {"downsampling_ratios": [5, 8]}, "all downsampling_ratios are even"),
        ("vae/config.json", {"encoder_hidden_size": 4}, "twice decoder_input_channels"),
    ],
)
def test_what_means_something_else_is_refused(copy, file, settings, message):
    edit(copy / file, **settings)
    with pytest.raises(ValueError, match=message):
        load_dit(copy)


def test_levels_that_the_scheduler_changes_are_part_of_the_formulation(copy):
    edit(copy / "scheduler" / "scheduler_config.json", sigma_min=0.1)
    assert load_dit(copy).diffusion == {"name": "v_prediction", "options": {"sigma_min": 0.1}}


def test_a_hub_name_stands_for_its_copy_in_the_cache(copy, tmp_path, monkeypatch, dit):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(ValueError, match=r"hf download stabilityai/stable-audio-open-1\.0"):
        load_dit("stabilityai/stable-audio-open-1.0")
    with pytest.raises(ValueError, match="hf download"):
        load_autoencoder("oobleck", "stabilityai/stable-audio-open-1.0")
    cached = tmp_path / "hub" / "models--stabilityai--stable-audio-open-1.0"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    (cached / "snapshots").mkdir()
    copy.rename(cached / "snapshots" / ("0" * 40))
    assert read_dit_config("stabilityai/stable-audio-open-1.0") == dit.config
    assert isinstance(load_autoencoder("oobleck", "stabilityai/stable-audio-open-1.0"), OobleckAE)


def test_without_the_package_one_line_says_what_to_install(folder, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *more: None if name == "diffusers" else found(name, *more)
    )
    for load in (load_stable_audio, load_oobleck):
        with pytest.raises(ValueError, match=r"pip install 'spresso\[stable_audio\]'"):
            load(folder)
