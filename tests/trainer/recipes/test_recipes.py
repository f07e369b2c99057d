from pathlib import Path

import pytest
from omegaconf import OmegaConf

from trainer.recipes import reading, values
from trainer.stages import STAGES


def test_recipes_are_found_by_name_and_by_path(tmp_path):
    assert reading.load_recipe("demo", []).name == "demo"
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\nfinetune: {lr: 1e-5}\n")
    config = reading.load_recipe(str(path), ["finetune.samples=7", "data.synth_hours=1"])
    assert (config.name, config.run_dir, config.finetune.lr, config.finetune.samples) == ("mine", "runs/mine", 1e-5, 7)


def test_every_recipe_of_the_house_is_valid(monkeypatch):
    # pretrained weights are the user's to fetch, latents are still to be made
    monkeypatch.setattr(Path, "is_dir", lambda path: path.name != "latents")
    recipes = sorted(reading.RECIPES.glob("*.yaml"))
    assert recipes
    for path in recipes:
        reading.load_recipe(str(path), [])


def test_unknown_recipe_names_the_known_ones():
    with pytest.raises(ValueError, match=r"no recipe .demmo.*demo"):
        reading.load_recipe("demmo", [])


@pytest.mark.parametrize(
    ("override", "nearest"),
    [("autoencode.lrr=1", "autoencode.lr"), ("sede=1", "seed"), ("latent_encoder.poling=9", "latent_encoder.pooling")],
)
def test_unknown_key_names_the_nearest(override, nearest):
    with pytest.raises(ValueError, match=f"unknown key {override.split('=')[0]}.*{nearest}$"):
        reading.load_recipe("demo", [override])


def test_value_of_another_type_names_its_key():
    with pytest.raises(ValueError, match=r"finetune\.samples"):
        reading.load_recipe("demo", ["finetune.samples=many"])


def test_override_without_a_value():
    with pytest.raises(ValueError, match="key=value"):
        reading.load_recipe("demo", ["finetune"])


FP8_BASE = "parallel.base_precision=fp8"


def test_a_base_in_fp8_goes_with_bf16_and_every_other_strategy():
    for strategy in ("ddp", "zero1", "zero2", "fsdp2"):
        reading.load_recipe("demo", [FP8_BASE, "parallel.precision=bf16", f"parallel.strategy={strategy}"])


GRAPH = "parallel.graph=true"


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("others", [[], ["parallel.compile=true"], [FP8_BASE], ["lora.variant=dora"]])
def test_graphs_go_with_what_can_be_recorded(precision, others):
    chosen = "bf16" if FP8_BASE in others else precision
    config = reading.load_recipe("demo", [GRAPH, f"parallel.precision={chosen}", *others])
    assert config.parallel.graph


def test_all_problems_are_found_at_once():
    overrides = [
        "autoencode.crop_frames=100",  # 9 does not divide it
        "quantizer.size=200",
        "quantizer.rates=[99]",
        "data.audio=/nowhere",
        "parallel.processes=3",
        "diffusion.options={logit_men: 1}",
    ]
    with pytest.raises(ValueError, match="crop_frames") as error:
        reading.load_recipe("demo", overrides)
    text = str(error.value)
    for mend in ("set 99 or 108", "128 or 256", "rates holds 99", "/nowhere", "multiple of 3", "logit_men"):
        assert mend in text


@pytest.mark.parametrize(
    ("overrides", "mend"),
    [
        (["sampling.sampler=magic", "latent_encoder.pooling=0"], "dpmpp\nlatent_encoder.pooling=0 must be at least 1"),
        (["latent_encoder.heads=0"], "latent_encoder.heads=0 must be at least 1"),
        (["diffusion.options={log_mean: 1"], "'diffusion.options={log_mean: 1' is not valid YAML"),
        (["log.clips=0"], "log.clips=0 must be at least 1"),
        (["data.clip_seconds=.inf"], "data.clip_seconds=inf must be a finite number"),
        (["autoencode.betas=[0.9, .nan]"], r"autoencode.betas\[1\]=nan must be a finite number"),
        (["pretrain.samples=.inf"], "^pretrain.samples=inf is no whole number$"),
        (["autoencode.lr=fast"], "^autoencode.lr=fast is no number$"),
        (["pretrain.betas=[0.9]"], "two numbers"),
        (["evaluate.clips=1"], "at least 2"),
        (["latent_encoder.magnitudes=true"], "kind=magnitude has none: set latent_encoder.magnitudes=false"),
        (["evaluate.page_clips=0"], "page_clips=0 must be at least 1"),
        (["quantizer.vectors=100"], "at least 10240"),
        (["data.clip_seconds=1"], "autoencode.crop_frames=126 is longer .* 100 frames: set 99"),
        (["data.window=10"], "at least 4096"),
        (["data.mix={/nowhere: 0}"], "data.mix: /nowhere=0 must be at least 1"),
        (["data.mix={/nowhere: 1}"], "/nowhere is not a set and has no train/"),
        (["parallel.base_precision=fp4"], "base_precision=fp4 is none of same, fp8"),
        ([FP8_BASE], "needs parallel.precision=bf16, .* not fp32: set parallel.precision=bf16"),
        ([FP8_BASE, "parallel.precision=fp16"], "not fp16: set parallel.precision=bf16"),
        ([FP8_BASE, "parallel.strategy=zero3"], "strategy=zero3 cuts it: set parallel.strategy=fsdp2"),
        (
            [FP8_BASE, "parallel.strategy=fsdp2", "parallel.shard_base=true"],
            "shard_base=true cuts it: set parallel.shard_base=false",
        ),
        ([GRAPH, "parallel.strategy=fsdp2"], "graph=true needs .*, not fsdp2: set parallel.strategy=ddp, or remove"),
        ([GRAPH, "parallel.strategy=zero1"], "graph=true needs .*, not zero1: set parallel.strategy=ddp, or remove"),
        ([GRAPH, "parallel.checkpoint_activations=true"], "graph=true does not work .*: remove one of them"),
        ([GRAPH, "parallel.device=cpu"], "graph=true needs a GPU: set parallel.device=cuda, or remove parallel.graph"),
        ([FP8_BASE, "lora.variant=dora"], "not work with lora.variant=dora, .*: set another lora.variant"),
    ],
)
def test_what_would_fail_late_is_refused_at_once(overrides, mend):
    with pytest.raises(ValueError, match=mend):
        reading.load_recipe("demo", overrides)


def test_a_limit_may_be_left_out():
    assert reading.load_recipe("demo", ["pretrain.clip_norm=.inf"]).pretrain.clip_norm == float("inf")


@pytest.mark.parametrize(
    ("content", "problem"),
    [("- demo", "is not a mapping"), ("name: [", "is not valid YAML"), ("[" * 100_000, "nested more than 32 deep")],
)
def test_a_recipe_that_is_none_is_named(tmp_path, content, problem):
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=rf"{path} is damaged \(it .*{problem}"):
        reading.load_recipe(str(path), [])


def test_resolved_config_starts_the_same_run(tmp_path):
    config = reading.load_recipe("demo", ["seed=3", "run_dir=/tmp/elsewhere"])
    path = tmp_path / "config.yaml"
    path.write_text(values.to_yaml(config))
    assert reading.load_recipe(str(path), []) == config
    assert OmegaConf.load(path).data.latents == "/tmp/elsewhere/latents"


def test_stages_follow_from_what_is_given(tmp_path):
    asked = ["prior.samples=8", "prior.crop_frames=126", "distill.samples=8"]
    assert reading.load_recipe("demo", asked).stages == list(STAGES)
    assert reading.load_recipe("demo", []).stages == [name for name in STAGES if name not in ("prior", "distill")]
    given = reading.load_recipe("demo", [f"data.audio={tmp_path}", f"pretrained.folder={tmp_path}"])
    assert given.stages == ["prepare", "autoencode", "quantize", "finetune", "evaluate", "page"]


def test_fingerprint_changes_with_any_value():
    first, second = (values.flatten(reading.load_recipe("demo", [f"seed={seed}"])) for seed in (0, 1))
    assert values.hash_values(first) != values.hash_values(second)
    assert values.hash_values(first) == values.hash_values(dict(reversed(first.items())))


@pytest.fixture
def released(monkeypatch):
    """As if folders of pretrained weights were there."""
    monkeypatch.setattr(Path, "is_dir", lambda path: path.name != "latents")


def test_a_model_is_a_choice_of_any_recipe(released):
    config = reading.load_recipe(
        "tiny", ["model=stable_audio_open", "data.clip_seconds=5", "pretrained.folder=/models/sao"]
    )
    assert (config.autoencoder.kind, config.diffusion.name, config.latent_encoder.pooling) == (
        "oobleck",
        "v_prediction",
        2,
    )
    assert {config.autoencoder.folder, config.text.folder, config.pretrained.folder} == {"/models/sao"}
    assert config.autoencode.samples == 128  # the recipe's, of which the model says nothing
    assert "pretrain" not in config.stages
    config = reading.load_recipe("spresso_11hz", ["latent_encoder.pooling=3"])
    assert (config.autoencoder.folder, config.latent_encoder.pooling) == ("checkpoints/Woosh-AE", 3)
    other = reading.load_recipe("spresso_11hz", ["model=stable_audio_open"])
    assert (other.autoencoder.kind, other.latent_encoder.pooling, other.latent_encoder.width) == ("oobleck", 2, 768)


@pytest.mark.parametrize(("recipe", "pooling", "vectors"), [("11hz", 1, 10.77), ("5hz", 2, 5.38), ("1hz", 10, 1.08)])
def test_stable_audio_3_has_a_recipe_for_each_rate(released, recipe, pooling, vectors):
    config = reading.load_recipe(f"stable_audio_3_{recipe}", ["pretrained.folder=/models/sa3"])
    assert (config.autoencoder.kind, config.text.kind, config.lora.variant) == ("same", "stable_audio_3", "dora")
    assert {config.autoencoder.folder, config.text.folder, config.pretrained.folder} == {"/models/sa3"}
    assert config.latent_encoder.pooling == pooling
    assert 44100 / 4096 / pooling == pytest.approx(vectors, abs=0.01)
    assert "pretrain" not in config.stages


def test_d_takes_as_many_channels_as_the_autoencoder_has():
    assert reading.load_recipe("demo", ["model=stereo"]).dit.channels == 256
    with pytest.raises(ValueError, match=r"dit\.channels=128 must be .*=magnitude_stereo: set dit\.channels=256"):
        reading.load_recipe("demo", ["autoencoder.kind=magnitude_stereo"])


def test_a_model_replaces_the_formulation_and_a_recipe_the_models_settings(released, tmp_path):
    assert reading.load_recipe("demo", ["model=woosh", "data.clip_seconds=5"]).diffusion.options == {}
    path = tmp_path / "mine.yaml"
    path.write_text("model: woosh\nlatent_encoder: {pooling: 3}\nautoencoder: {folder: mine}\n")
    config = reading.load_recipe(str(path), [])
    assert (config.latent_encoder.pooling, config.autoencoder.folder, config.autoencoder.kind) == (3, "mine", "woosh")
    with pytest.raises(ValueError, match=r"there is no model=magic: .* stable_audio_open, stereo, woosh"):
        reading.load_recipe("demo", ["model=magic"])


def test_crops_fit_the_latent_rate_of_the_model(released):
    with pytest.raises(ValueError, match=r"autoencode\.crop_frames=200 is longer .* 107 frames: set 106"):
        reading.load_recipe("stable_audio_open", ["autoencode.crop_frames=200"])


def test_weights_that_are_nowhere_are_told_with_the_command_that_fetches_them(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=r"pretrained\.folder=.*hf download stabilityai/stable-audio-open-1\.0"):
        reading.load_recipe("stable_audio_open", [])
