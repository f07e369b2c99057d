from __future__ import annotations

import copy
import errno
import json
import pickle
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

import models.weights
from models.autoencoder import SpectralAE, VocosAE
from models.backbones.pretrained import (
    autoencoder_from_woosh,
    dit_from_woosh,
    hash_state,
    load_autoencoder,
    load_dit,
    load_weights,
    load_woosh_folder,
    save_weights,
)
from models.dit import DiT
from models.sizes import DiTConfig

GOLDEN = Path(__file__).parents[2] / "golden"


def golden(name: str) -> tuple[dict, dict, dict]:
    """Config, state and recorded inputs and outputs (`in/x`, `out/x`, …) of a golden file."""
    with safe_open(GOLDEN / f"{name}.safetensors", framework="pt") as file:
        config = json.loads(file.metadata()["config"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    state = {key.removeprefix("state/"): value for key, value in tensors.items() if key.startswith("state/")}
    return config, state, {key: value for key, value in tensors.items() if not key.startswith("state/")}


def assert_within(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["woosh_flow_short", "woosh_flow_full_length"])
def test_dit_reproduces_the_release(name):
    config, state, recorded = golden(name)
    dit = dit_from_woosh(config, state)
    text = {"text": recorded["in/text"], "text_mask": recorded["in/text_mask"]}
    assert_within(dit(recorded["in/x"], recorded["in/t"], **text), recorded["out/x"])
    assert_within(dit.logvar(recorded["in/t"]), recorded["out/logvar"])


def test_autoencoder_reproduces_the_release():
    config, state, recorded = golden("woosh_ae")
    ae = autoencoder_from_woosh(config, state)
    assert_within(ae.encode(recorded["in/audio"]), recorded["out/latents"])
    assert_within(ae.decode(recorded["out/latents"]), recorded["out/audio"])


def test_loaded_models_do_not_share_memory_with_the_state():
    config, state, _ = golden("woosh_flow_short")
    dit = dit_from_woosh(config, state)
    with torch.no_grad():
        dit.input.weight.zero_()
    assert state["preprocessing.project_in.weight"].abs().max() > 0


@pytest.mark.parametrize(
    ("name", "build", "tensor"),
    [
        ("woosh_flow_short", dit_from_woosh, "layers.1.ffns.description.w2.weight"),
        ("woosh_flow_short", dit_from_woosh, "layers.3.norm_q.weight"),
        ("woosh_flow_short", dit_from_woosh, "preprocessing.description_pad"),
        ("woosh_ae", autoencoder_from_woosh, "autoencoder.decoder.backbone.convnext.1.gamma"),
        ("woosh_ae", autoencoder_from_woosh, "z_mean"),
    ],
)
def test_missing_unknown_and_misshaped_tensors_are_named(name, build, tensor):
    config, state, _ = golden(name)
    damaged = dict(state)
    value = damaged.pop(tensor)
    with pytest.raises(ValueError, match=f"missing: {tensor}"):
        build(config, damaged)
    with pytest.raises(ValueError, match=f"unknown: {tensor}_ema"):
        build(config, state | {f"{tensor}_ema": value})
    with pytest.raises(ValueError, match="of another shape: .*" + tensor):
        build(config, state | {tensor: torch.zeros(3, 2)})


def test_many_missing_tensors_make_one_short_line():
    config, _, _ = golden("woosh_flow_short")
    with pytest.raises(ValueError, match=r"missing: .* … \(\d+ in all\)$") as raised:
        dit_from_woosh(config, {})
    assert len(str(raised.value)) < 500


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mlp_act": "swiglu"}, "mlp_act is 'swiglu', only 'gelu' is supported"),
        ({"adaln_last_layer": False, "num_sinks": 2}, "adaln_last_layer is False.*num_sinks is 2"),
        ({"n_memory_tokens_description": 3}, "n_memory_tokens_description is 3"),
        ({"qkv_head_dim": 32}, "head widths"),
        ({"patch_size": 2}, "max_seq_len is not a multiple"),
        ({"n_experts": 4}, "n_experts is unknown"),
        ({"n_heads": None}, "n_heads is missing"),
    ],
)
def test_unsupported_dit_configs_are_refused(changes, message):
    config, state, _ = golden("woosh_flow_short")
    settings = {name: value for name, value in (config["dit"] | changes).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        dit_from_woosh(config | {"dit": settings}, state)


def test_predicting_x_instead_of_the_velocity_is_refused():
    config, state, _ = golden("woosh_flow_short")
    with pytest.raises(ValueError, match="pred_type is 'x_pred'"):
        dit_from_woosh(config | {"pred_type": "x_pred"}, state)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"spec_embed": "mel"}, "spec_embed is 'mel', only 'stft-complex'"),
        ({"normalize": False}, "normalize is False"),
        ({"channels": 2}, "channels is 2"),
        ({"istft_head": {"padding": "same"}}, "istft_head: .*conv_pad is missing.*padding is 'same'"),
        ({"istft_head": None}, "istft_head: .*softclip is missing"),
        ({"encoder_rates": [2, 4]}, "encoder_rates is unknown"),
    ],
)
def test_unsupported_autoencoder_configs_are_refused(changes, message):
    config, state, _ = golden("woosh_ae")
    with pytest.raises(ValueError, match=message):
        autoencoder_from_woosh(config | changes, state)


def test_autoencoder_weights_without_statistics_or_with_another_window_are_refused():
    config, state, _ = golden("woosh_ae")
    with pytest.raises(ValueError, match="z_std is not positive"):
        autoencoder_from_woosh(config, state | {"z_std": torch.zeros(16)})
    name = "autoencoder.decoder.head.istft.window"
    with pytest.raises(ValueError, match="not a Hann window"):
        autoencoder_from_woosh(config, state | {name: torch.hamming_window(96)})


# ----------------------------------------------------------------------------- the release's folders


def flow_folder(folder: Path) -> Path:
    """A folder as the release has it: the model inside its latent diffusion model, the models around it elsewhere."""
    config, state, _ = golden("woosh_flow_short")
    around = {
        "exclude_from_checkpoint": False,
        "trainable": True,
        "model_type": "LatentDiffusionModel",
        "conditioners": {"text": {"exclude_from_checkpoint": True, "path": "checkpoints/TextConditionerA"}},
        "autoencoder": {"exclude_from_checkpoint": True, "path": "checkpoints/Woosh-AE"},
    }
    OmegaConf.save(OmegaConf.create(around | config), folder / "config.yaml")
    save_file({f"dit.{name}": value for name, value in state.items()}, folder / "weights.safetensors")
    return folder


def ae_folder(folder: Path) -> Path:
    config, state, _ = golden("woosh_ae")
    config = copy.deepcopy(config) | {
        "exclude_from_checkpoint": True,
        "trainable": True,
        "_target_": "woosh.module.model.VocosAutoEncoder",
    }
    config["istft_head"] |= {"_target_": "woosh.module.model.vocos.ISTFTCircleHead", "_partial_": True}
    config["ztransform"] |= {"_target_": "woosh.module.model.vocos.ZeroDropoutTransform", "_partial_": True}
    OmegaConf.save(OmegaConf.create(config), folder / "config.yaml")
    save_file(state, folder / "weights.safetensors")
    return folder


def test_released_dit_folder(tmp_path):
    config, state, recorded = golden("woosh_flow_short")
    expected = dit_from_woosh(config, state)
    for loaded in (load_woosh_folder(flow_folder(tmp_path)), load_dit(tmp_path)):
        assert isinstance(loaded, DiT)
        assert torch.equal(loaded(recorded["in/x"], recorded["in/t"]), expected(recorded["in/x"], recorded["in/t"]))


def test_released_autoencoder_folder(tmp_path):
    _, _, recorded = golden("woosh_ae")
    for loaded in (load_woosh_folder(ae_folder(tmp_path)), load_autoencoder("woosh", tmp_path)):
        assert isinstance(loaded, VocosAE)
        assert_within(loaded.encode(recorded["in/audio"]), recorded["out/latents"])


def test_released_weights_may_lack_the_empty_tensor_and_hold_the_models_around(tmp_path):
    weights = flow_folder(tmp_path) / "weights.safetensors"
    _, state, _ = golden("woosh_flow_short")
    state.pop("preprocessing.memory_tokens_description")
    around = {"autoencoder.z_mean": torch.zeros(16), "conditioners.text.weight": torch.zeros(2)}
    save_file({f"dit.{name}": value for name, value in state.items()} | around, weights)
    assert isinstance(load_woosh_folder(tmp_path), DiT)


def test_the_other_model_of_the_release_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds a DiT, not a VocosAE"):
        load_autoencoder("woosh", flow_folder(tmp_path))
    with pytest.raises(ValueError, match="holds a VocosAE, not a DiT"):
        load_dit(ae_folder(tmp_path))
    (tmp_path / "config.yaml").write_text("pretrained_model_type: videokontext\n")
    with pytest.raises(ValueError, match="another model than Woosh-Flow, Woosh-DFlow or Woosh-AE"):
        load_woosh_folder(tmp_path)


class Bomb:
    """Unpickling it leaves a trace."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return (Path.touch, (self.trace,))


def test_pickles_are_never_opened_and_the_way_out_is_told(tmp_path):
    (flow_folder(tmp_path) / "weights.safetensors").unlink()
    (tmp_path / "weights.pt").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    with pytest.raises(ValueError, match=r"weights\.pt is a pickle.*convert it.*weights_only=True"):
        load_woosh_folder(tmp_path)
    (tmp_path / "weights.pt").rename(tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=r"weights\.safetensors is not a complete safetensors file"):
        load_woosh_folder(tmp_path)
    assert not (tmp_path / "exploded").exists()


def test_the_way_out_is_a_command_whatever_the_pickle_s_name(tmp_path):
    flow_folder(tmp_path)
    (tmp_path / "weights.safetensors").unlink()
    torch.save({"a": torch.ones(2)}, tmp_path / "it's $(touch x) \"`touch y`.pt")
    with pytest.raises(ValueError, match="is a pickle") as error:
        load_woosh_folder(tmp_path)
    command = str(error.value).partition("  python -c ")[2]
    subprocess.run(["bash", "-c", f"{shlex.quote(sys.executable)} -c {command}"], cwd=tmp_path, check=True)
    assert load_file(tmp_path / "weights.safetensors")["a"].tolist() == [1, 1]
    assert not {path.name for path in tmp_path.iterdir()} & {"x", "y"}


def test_folders_that_lack_a_file_or_hold_a_broken_config_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"config\.yaml does not exist"):
        load_woosh_folder(tmp_path)
    (flow_folder(tmp_path) / "weights.safetensors").unlink()
    with pytest.raises(ValueError, match=r"weights\.safetensors does not exist: download"):
        load_woosh_folder(tmp_path)
    for broken in ("a: [1", "- 1\n- 2\n"):
        (tmp_path / "config.yaml").write_text(broken)
        with pytest.raises(ValueError, match=r"config\.yaml"):
            load_woosh_folder(tmp_path)


@pytest.mark.parametrize("key", ["pred_type", "dit.n_layers", "model_type"])
def test_a_release_learns_nothing_of_the_environment(tmp_path, monkeypatch, key):
    monkeypatch.setenv("OF_MINE", "6")
    config = OmegaConf.load(flow_folder(tmp_path) / "config.yaml")
    OmegaConf.update(config, key, "${oc.env:OF_MINE}")
    OmegaConf.save(config, tmp_path / "config.yaml")
    with pytest.raises(ValueError, match=r"is damaged|only") as error:
        load_woosh_folder(tmp_path)
    assert "6" not in str(error.value).replace(str(tmp_path), "")


def test_misfits_in_a_folder_name_the_folder(tmp_path):
    config = OmegaConf.load(flow_folder(tmp_path) / "config.yaml")
    config.dit.n_layers = 5
    OmegaConf.save(config, tmp_path / "config.yaml")
    with pytest.raises(ValueError, match=rf"{tmp_path}: .*missing: layers\.4\."):
        load_woosh_folder(tmp_path)


# ----------------------------------------------------------------------------- our own files

STATE = {
    "b": torch.arange(6.0).view(2, 3),
    "a": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "scalar": torch.tensor(3),
    "empty": torch.zeros(0, 4),
}
CONFIG = {"name": "é", "sizes": [1, 2], "inner": {"rate": 0.5, "none": None}}


def test_weights_round_trip(tmp_path):
    path = tmp_path / "model.safetensors"
    save_weights(path, STATE, CONFIG)
    config, state = load_weights(path)
    assert config == CONFIG
    torch.testing.assert_close(state, STATE, rtol=0, atol=0)
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


def test_views_transposed_and_tied_tensors_are_saved(tmp_path):
    flat = torch.arange(6.0)
    state = {"whole": flat, "part": flat[1:3], "tied": flat, "turned": flat.view(2, 3).T}
    save_weights(tmp_path / "model.safetensors", state, {})
    torch.testing.assert_close(load_weights(tmp_path / "model.safetensors")[1], state, rtol=0, atol=0)


def test_failed_writes_leave_the_old_file_and_no_rubbish(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    save_weights(path, STATE, CONFIG)

    def disk_full(tensors, filename, metadata):
        Path(filename).write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(models.weights, "save_file", disk_full)
    with pytest.raises(OSError, match=r"could not be written .*No space left.*model\.safetensors") as error:
        save_weights(path, STATE, {"new": True})
    assert error.value.errno == errno.ENOSPC
    assert load_weights(path)[0] == CONFIG
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


def test_missing_folder_is_an_os_error(tmp_path):
    with pytest.raises(OSError, match="nowhere"):
        save_weights(tmp_path / "nowhere" / "model.safetensors", STATE, CONFIG)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_weights(tmp_path / "nowhere" / "model.safetensors")


@pytest.mark.parametrize("keep", [0, 4, 40, -1])
def test_truncated_files_are_named(tmp_path, keep):
    path = tmp_path / "model.safetensors"
    save_weights(path, STATE, CONFIG)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a complete safetensors file"):
        load_weights(path)


def test_foreign_files_are_named(tmp_path):
    path = tmp_path / "foreign.safetensors"
    path.write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(ValueError, match=r"foreign\.safetensors"):
        load_weights(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"foreign\.safetensors has no config"):
        load_weights(path)
    save_file({"a": torch.zeros(1)}, path, metadata={"config": "{"})
    with pytest.raises(ValueError, match=r"foreign\.safetensors: the config .* is not JSON"):
        load_weights(path)
    with pytest.raises(ValueError, match="is a folder"):
        load_weights(tmp_path)


def test_hash_depends_on_everything_but_the_order():
    reference = hash_state(CONFIG, STATE)
    assert len(reference) == 64
    assert hash_state(dict(reversed(CONFIG.items())), dict(reversed(STATE.items()))) == reference
    assert hash_state(CONFIG, STATE | {"b": STATE["b"].T.contiguous().T}) == reference
    nearly = STATE["b"].clone()
    nearly[0, 0] = torch.nextafter(nearly[0, 0], torch.tensor(1.0))
    others = [
        hash_state(CONFIG | {"sizes": [2, 1]}, STATE),
        hash_state(CONFIG, STATE | {"b": nearly}),
        hash_state(CONFIG, STATE | {"b": STATE["b"].view(3, 2)}),
        hash_state(CONFIG, STATE | {"b": STATE["b"].view(torch.int32)}),
        hash_state(CONFIG, {("c" if name == "b" else name): value for name, value in STATE.items()}),
        hash_state(CONFIG, {name: value for name, value in STATE.items() if name != "empty"}),
    ]
    assert len({reference, *others}) == 7


def test_hash_is_pinned():
    """Bitstreams and checkpoints name models by it."""
    expected = "fdd51366e17bdeb13731d0ab1fb256b8ad49461338ad11dd759300916639f37e"
    assert hash_state({"a": 1}, {"w": torch.ones(2)}) == expected


def test_dit_export_round_trip(tmp_path):
    dit = DiT(DiTConfig(channels=4, width=16, depth=2, heads=2, hidden_width=32, yarn_trained_tokens=7))
    torch.nn.init.normal_(dit.output.weight)
    save_weights(tmp_path / "dit.safetensors", dit.state_dict(), vars(dit.config))
    x, t = torch.randn(1, 4, 9), torch.rand(1)
    for path in (tmp_path, tmp_path / "dit.safetensors"):
        loaded = load_dit(path)
        assert loaded.config == dit.config
        assert torch.equal(loaded(x, t), dit(x, t))
        assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_dit_exports_that_do_not_fit_are_named(tmp_path):
    path = tmp_path / "dit.safetensors"
    dit = DiT(DiTConfig(channels=4, width=16, depth=1, heads=2, hidden_width=32))
    save_weights(path, dit.state_dict(), vars(dit.config) | {"depth": 2})
    with pytest.raises(ValueError, match=r"dit\.safetensors.*missing: blocks\.1\."):
        load_dit(path)
    save_weights(path, dit.state_dict(), {"kind": "quantizer"})
    with pytest.raises(ValueError, match=r"dit\.safetensors is damaged \(it has an unknown field `kind`\)"):
        load_dit(path)


def test_autoencoder_kinds():
    assert isinstance(load_autoencoder(), SpectralAE)
    assert [load_autoencoder(kind).channels for kind in ("magnitude", "magnitude_stereo")] == [1, 2]
    with pytest.raises(ValueError, match="take one of spectral, magnitude, magnitude_stereo, woosh, oobleck, same"):
        load_autoencoder("encodec")
    with pytest.raises(ValueError, match="needs the folder"):
        load_autoencoder("woosh")
