"""An export is believed only if its weights are those that its hashes were made of."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from random import Random

import pytest
import torch

from models.codec import SPresso
from models.prior import Prior
from models.weights import load_weights, save_weights
from tests.damage import watched
from tests.models.test_codec import DIT, DiT, make_codec
from tests.mutant_counts import MutantCounts

PARTS = ("latent_encoder", "upsampler", "adapter_model", "quantizer", "prior")


def write(folder: Path, *, shift: float = 0.0) -> Path:
    """Export a codec with a prior; `shift` is added to the weights of f, as another stage would change them."""
    torch.manual_seed(1)
    codec = make_codec()
    codec.prior = Prior(books=3, size=16)
    with torch.no_grad():
        for parameter in codec.f.parameters():
            parameter.add_(shift)
    base = folder.parent / "dit.safetensors"
    torch.manual_seed(0)
    codec.quantizer.fit(torch.randn(700, 8), seed=0)
    save_weights(base, base_of(codec), vars(DIT))
    codec.save_pretrained(folder, base=base, card="")
    return folder


def base_of(codec: SPresso) -> dict[str, torch.Tensor]:
    """Return D's weights without the LoRA, under their names before it was injected."""
    state = {name.replace(".base_layer.", "."): value for name, value in codec.dit.state_dict().items()}
    return {name: value for name, value in state.items() if name in DiT(DIT).state_dict()}


@pytest.fixture
def exported(tmp_path) -> Path:
    return write(tmp_path / "export")


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    start = 8 + struct.unpack("<Q", data[:8])[0]
    data[start + place % (len(data) - start)] ^= 0x40
    path.write_bytes(data)


def refusal(folder: Path) -> str:
    """Return the one line with which an export is refused."""
    with pytest.raises(ValueError, match=str(folder)) as error:
        SPresso.from_pretrained(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


PIECE = 4096


def damage(folder: Path, other: Path, chance: Random) -> tuple[Path, str]:
    """Damage one file of an export as disks and copies do; returns the file and the way. `other` is another export."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and path.stat().st_size)
    path = folder / chance.choice(names)
    data = bytearray(path.read_bytes())
    way = chance.choice(("flipped", "flipped", "cut", "zeroed", "exchanged", "of another export", "gone"))
    if way == "flipped":
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    elif way == "cut":
        del data[chance.randrange(len(data)) :]
    elif way == "zeroed":
        start = PIECE * chance.randrange(-(-len(data) // PIECE))
        data[start : start + PIECE] = bytes(len(data[start : start + PIECE]))
    elif way == "exchanged":
        data[:] = (folder / chance.choice(names)).read_bytes()
    elif way == "of another export":
        data[:] = (other / path.name).read_bytes()
    path.unlink()
    if way != "gone":
        path.write_bytes(data)
    return path, way


def outcome(folder: Path) -> tuple[dict[str, torch.Tensor], object]:
    """Load an export: its weights and the codes that it gives, and its settings."""
    codec = SPresso.from_pretrained(folder)
    z = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(7))
    with torch.inference_mode():
        codes = codec.quantizer.encode(z)
    settings = (codec.config, codec.dit.config, codec.model_hash, codec.autoencoder.identity(), scales(codec))
    return {**state_of(codec), "codes": codes}, settings


def scales(codec: SPresso) -> list[object]:
    """Return how strongly each layer's LoRA is added."""
    return [module.scaling for module in codec.dit.modules() if hasattr(module, "scaling")]


def load_damaged(folder: Path, seeds: range, counts: MutantCounts) -> None:
    folder.parent.joinpath("later").mkdir()
    other = write(folder.parent / "later/export", shift=0.1)
    whole = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    expected, settings = outcome(folder)
    for seed in seeds:
        path, way = damage(folder, other, Random(f"export {seed}"))
        counts.begin("exports")
        said = ""
        try:
            with watched():
                found, theirs = outcome(folder)
        except (ValueError, FileNotFoundError) as error:
            said = str(error)
            assert str(folder) in said, (seed, said)
            assert "\n" not in said, (seed, said)
        else:
            assert theirs == settings, f"{seed}: {path.name} is {way}, and the settings are others"
            assert found.keys() == expected.keys(), seed
            assert all(torch.equal(found[name], expected[name]) for name in found), f"{seed}: {path.name} is {way}"
        counts.end("exports", refused=bool(said))
        path.write_bytes(whole[path])


def test_damaged_exports(exported, mutant_counts):
    load_damaged(exported, range(80), mutant_counts)
    assert mutant_counts.kinds["exports"]["refused"] > 40


@pytest.mark.slow
def test_thousands_of_damaged_exports(exported, mutant_counts):
    load_damaged(exported, range(80, 2080), mutant_counts)


def test_an_undamaged_export_is_believed(exported):
    codec = SPresso.from_pretrained(exported)
    assert codec.model_hash == json.loads((exported / "codec.json").read_text())["model"]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("place", [3, 501])
def test_a_flipped_bit_is_noticed(exported, part, place):
    flip(exported / f"{part}.safetensors", place)
    assert "is damaged, or holds files of another export" in refusal(exported)


def mutant(content: bytes, chance: Random) -> bytes:
    """Return a safetensors file with bytes changed, most of them in its header, or with parts cut off or put in."""
    data, header = bytearray(content), 8 + struct.unpack("<Q", content[:8])[0]
    for _ in range(chance.choice((1, 1, 1, 3))):
        place = chance.randrange(chance.choice((8, header, len(content)))) % len(data)
        way = chance.randrange(8)
        if way < 6:
            data[place] = chance.randrange(256)
        elif way == 6:
            del data[max(1, place) :]
        else:
            data[place:place] = chance.choice((b"0", b'"', b"[" * 1000, bytes(8), content[:place]))
    return bytes(data)


def load_mutants(folder: Path, seeds: range, counts: MutantCounts) -> None:
    whole = {part: (folder / f"{part}.safetensors").read_bytes() for part in PARTS}
    expected = state_of(SPresso.from_pretrained(folder))
    for seed in seeds:
        chance = Random(seed)
        part = chance.choice(PARTS)
        path = folder / f"{part}.safetensors"
        path.write_bytes(mutant(whole[part], chance))
        counts.begin("files of weights in exports")
        state, told = {}, ""
        try:
            with watched():
                state = state_of(SPresso.from_pretrained(folder))
        except ValueError as error:
            told = str(error)
        if told:
            assert str(folder) in told, (seed, told)
            assert "\n" not in told, (seed, told)
        else:
            assert state.keys() == expected.keys(), seed
            assert all(torch.equal(state[name], expected[name]) for name in state), f"{seed}: loaded, but wrong"
        counts.end("files of weights in exports", refused=bool(told))
        path.write_bytes(whole[part])


def state_of(codec: SPresso) -> dict[str, torch.Tensor]:
    """Return all weights of a codec, by its part and name."""
    parts = {"f": codec.f, "g": codec.g, "dit": codec.dit, "quantizer": codec.quantizer, "prior": codec.prior}
    return {
        f"{part}.{name}": value
        for part, module in parts.items()
        if module is not None
        for name, value in module.state_dict().items()
    }


def test_mutated_files_of_weights(exported, mutant_counts):
    load_mutants(exported, range(100), mutant_counts)


@pytest.mark.slow
def test_thousands_of_mutated_files_of_weights(exported, mutant_counts):
    load_mutants(exported, range(100, 3100), mutant_counts)
    assert mutant_counts.kinds["files of weights in exports"]["refused"] > 2000


def test_a_file_of_another_stages_export_is_noticed(exported, tmp_path):
    (tmp_path / "later").mkdir()
    other = write(tmp_path / "later/export", shift=0.1)
    shutil.copy(other / "upsampler.safetensors", exported)
    assert "holds files of another export (the model has the hash" in refusal(exported)


@pytest.mark.parametrize("part", ["prior", "quantizer"])
def test_a_part_behind_a_link_that_leads_nowhere_is_missing(exported, part):
    """In an older export too, whose `codec.json` does not say that there is a prior."""
    description = json.loads((exported / "codec.json").read_text())
    del description["parts"]
    (exported / "codec.json").write_text(json.dumps(description))
    path = exported / f"{part}.safetensors"
    path.unlink()
    path.symlink_to("away")
    with pytest.raises(FileNotFoundError, match=rf"{part}\.safetensors"):
        SPresso.from_pretrained(exported)


def test_other_settings_of_the_quantizer_are_noticed(exported):
    path = exported / "quantizer.safetensors"
    config, state = load_weights(path)
    save_weights(path, state, config | {"beam": 1})
    assert "the quantizer has the hash" in refusal(exported)


def test_a_prior_that_is_gone_is_noticed(exported):
    (exported / "prior.safetensors").unlink()
    assert "the prior has the hash None" in refusal(exported)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("left", [0, 5, 90, -1])
def test_a_file_that_is_cut_short_gives_one_line(exported, part, left):
    path = exported / f"{part}.safetensors"
    path.write_bytes(path.read_bytes()[:left])
    assert f"{part}.safetensors is not a complete safetensors file" in refusal(exported)


def test_a_tensor_of_another_shape_gives_one_line(exported):
    path = exported / "upsampler.safetensors"
    config, state = load_weights(path)
    name = next(iter(state))
    save_weights(path, state | {name: torch.zeros(1)}, config)
    assert f"of another shape: {name}" in refusal(exported)


@pytest.mark.parametrize("key", ["config", "base", "model"])
def test_a_description_that_lacks_a_value_gives_one_line(exported, key):
    path = exported / "codec.json"
    path.write_text(json.dumps({name: value for name, value in json.loads(path.read_text()).items() if name != key}))
    assert "codec.json is damaged" in refusal(exported)


def test_an_older_export_without_hashes_of_parts_still_loads(exported):
    path = exported / "codec.json"
    description = json.loads(path.read_text())
    del description["parts"]
    path.write_text(json.dumps(description))
    assert SPresso.from_pretrained(exported).prior is not None
    flip(exported / "upsampler.safetensors", 100)
    assert "the model has the hash" in refusal(exported)


def test_a_codec_is_the_same_model_wherever_its_base_lies(exported, tmp_path):
    before = SPresso.from_pretrained(exported).model_hash
    (exported / "dit.safetensors").rename(tmp_path / "elsewhere.safetensors")
    assert SPresso.from_pretrained(exported, base=tmp_path / "elsewhere.safetensors").model_hash == before
