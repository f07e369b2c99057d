"""Weights come from files tensor by tensor: what does not fit is refused unread, and there is never a second copy."""

from __future__ import annotations

import dataclasses
import errno
import json
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from models.backbones.pretrained import load_dit
from models.dit import DiT
from models.sizes import DiTConfig
from models.weights import Stored, load_weights, open_weights, save_weights
from tests.models.backbones.test_pretrained import flow_folder

SMALL = DiTConfig(channels=4, width=16, depth=1, heads=2, hidden_width=32)
LARGE = DiTConfig(width=1024, depth=5, heads=16, hidden_width=4096)
ROOT = Path(__file__).parents[2]

MEASURE = """
import sys
from models.backbones.pretrained import load_dit

def resident(kind):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(kind))

small, large = sys.argv[1:]
load_dit(small)  # what is imported at first use is not the weights'
before = resident("VmRSS")
dit = load_dit(large)
print(resident("VmHWM") - before)
"""


def exported(path: Path, config: DiTConfig = SMALL, dtype: torch.dtype = torch.float32) -> Path:
    """A DiT's export, all of whose numbers are 0.5."""
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in DiT(config).state_dict().items()}
    state = {name: torch.full(shape, 0.5, dtype=dtype) for name, shape in shapes.items()}
    save_file(state, path, {"config": json.dumps(dataclasses.asdict(config))})
    return path


def released(folder: Path) -> Path:
    """The weights in the folder of a Woosh-Flow release."""
    return flow_folder(folder) / "weights.safetensors"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the kernel does not tell the peak")
def test_a_load_holds_one_copy(tmp_path):
    """Of all memory that the process has mapped at its peak, the file's pages included."""
    small, large = exported(tmp_path / "small.safetensors"), exported(tmp_path / "large.safetensors", LARGE)
    size = large.stat().st_size
    assert size > 300e6
    try:
        command = [sys.executable, "-c", MEASURE, str(small), str(large)]
        grown = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=120).stdout
    finally:
        large.unlink()  # pytest keeps the folder
    assert size <= int(grown) < 1.25 * size


DAMAGES: dict[str, Callable[[dict[str, torch.Tensor], str], object]] = {
    "missing": lambda state, name: state.pop(name),
    "unknown": lambda state, name: state.update({f"{name}_ema": state[name]}),
    "of another shape": lambda state, name: state.update({name: torch.zeros(3, 2)}),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", ["export", "release"])
def test_what_does_not_fit_is_refused_before_anything_is_read(tmp_path, monkeypatch, kind, damage):
    path = exported(tmp_path / "dit.safetensors") if kind == "export" else released(tmp_path)
    header = {"config": json.dumps(dataclasses.asdict(SMALL))} if kind == "export" else None
    state = load_file(path)
    DAMAGES[damage](state, next(name for name in state if name.endswith("norm_q.weight")))
    save_file({name: value.clone() for name, value in state.items()}, path, header)
    monkeypatch.setattr(Stored, "read", lambda stored: pytest.fail(f"{stored.name} was read"))
    with pytest.raises(ValueError, match=rf"{damage}: .*norm_q\.weight"):
        load_dit(tmp_path)


def test_weights_are_read_into_memory_of_their_own(tmp_path):
    path = tmp_path / "model.safetensors"
    save_weights(path, {"a": torch.arange(6.0).view(2, 3)}, {})
    _, stored = open_weights(path)
    assert stored["a"].shape == (2, 3)
    stored["a"].read().zero_()
    assert torch.equal(stored["a"].read(), torch.arange(6.0).view(2, 3))


def test_a_file_that_is_cut_off_while_it_is_read_is_named(tmp_path):
    path = tmp_path / "model.safetensors"
    save_weights(path, {"a": torch.zeros(100)}, {})
    _, stored = open_weights(path)
    with path.open("r+b") as file:
        file.truncate(200)
    with pytest.raises(ValueError, match=r"model\.safetensors is not a complete safetensors file .*a from file"):
        stored["a"].read()


def test_a_narrower_file_fills_a_model_in_float32(tmp_path):
    dit = load_dit(exported(tmp_path / "dit.safetensors", dtype=torch.bfloat16))
    for parameter in dit.parameters():
        assert parameter.dtype == torch.float32
        assert parameter.is_contiguous()
        assert parameter.requires_grad
        assert (parameter == 0.5).all()


def test_a_disk_that_fails_is_no_damaged_file(tmp_path):
    class Failing:
        def get_tensor(self, name: str) -> None:
            raise SafetensorError(f"Could not read tensor {name}: Input/output error (os error 5)")

    stored = Stored(tmp_path / "g.safetensors", "w", torch.Size((3,)), Failing())
    with pytest.raises(OSError, match="Input/output error") as error:
        stored.read()
    assert error.value.errno == errno.EIO
    assert error.value.filename == str(tmp_path / "g.safetensors")


def _with_header(path: Path, header: object, data: bytes = b"\0" * 64) -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F4", "shape": [128], "data_offsets": [0, 64]},
        {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 64]},
        {"dtype": "F32", "shape": [0, 2**64 - 1], "data_offsets": [0, 0]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 64]},
        {"dtype": "F32", "shape": [16], "data_offsets": [0, 10**18]},
    ],
)
def test_an_absurd_header_is_a_damaged_file(tmp_path, entry):
    path = _with_header(tmp_path / "absurd.safetensors", {"__metadata__": {"config": "{}"}, "a": entry})
    with pytest.raises(ValueError, match=r"absurd\.safetensors is not a complete safetensors file"):
        load_weights(path)


@pytest.mark.parametrize("config", ["[1]", "null", "9" * 5000, "[" * 100_000, "{"])
def test_a_config_that_is_no_object_is_named(tmp_path, config):
    path = _with_header(tmp_path / "odd.safetensors", {"__metadata__": {"config": config}}, b"")
    with pytest.raises(ValueError, match=r"odd\.safetensors: the config in its header is damaged"):
        load_weights(path)
