"""The codec as its users have it: audio to bits and back, saved and loaded."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel

from models import bitstream
from models.autoencoder import SpectralAE
from models.backbones.pretrained import load_dit
from models.codec import SPresso
from models.dit import DiT
from models.encoding import encode_sound
from models.loudness import level
from models.prior import Prior
from models.quantizers.residual import ResidualQuantizer
from models.sizes import CodecConfig, DiTConfig, LatentEncoderConfig, Sampling
from models.weights import load_weights, save_weights
from models.windows import JointWindows

SHAPES = LatentEncoderConfig(
    z_channels=8, pooling=9, patch_size=3, width=16, encoder_depth=1, upsampler_depth=1, heads=2
)
DIT = DiTConfig(width=16, depth=2, multistream_depth=0, heads=2, hidden_width=32, patch_size=3)
HOP = 480
ROOT = Path(__file__).parents[2]


def make_codec(dit: DiT | None = None) -> SPresso:
    """A small codec whose every part says something: no weight is left at its zero start."""
    torch.manual_seed(0)
    config = CodecConfig(
        autoencoder={"kind": "spectral", "folder": None},
        latent_encoder=SHAPES,
        dit=DIT,
        diffusion={"name": "flow_matching", "options": {}},
        lora={"rank": 2, "alpha": 2},
        window=63,
        rates=[3],
        sampling=Sampling(steps=2),
    )
    quantizer = ResidualQuantizer(8, books=3, size=16, beam=4)
    quantizer.fit(torch.randn(700, 8), seed=0)
    codec = SPresso(config, autoencoder=SpectralAE(), dit=dit or DiT(DIT), quantizer=quantizer)
    for parameter in [*codec.f.parameters(), *codec.adapter_parameters().values()]:
        torch.nn.init.normal_(parameter, std=0.2)
    for value in (codec.g.project_out.weight, codec.g.start.directions):
        torch.nn.init.normal_(value, std=0.05)
    codec.model_hash = "0123456789abcdef"
    return codec.eval()


@pytest.fixture(scope="module")
def codec() -> SPresso:
    return make_codec()


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    torch.manual_seed(1)
    dit = DiT(DIT)
    for parameter in dit.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    save_weights(tmp_path / "dit.safetensors", dit.state_dict(), dataclasses.asdict(DIT))
    codec = make_codec(load_dit(tmp_path / "dit.safetensors"))
    codec.save_pretrained(tmp_path / "export", base=tmp_path / "dit.safetensors", card="# {model}")
    return tmp_path / "export"


def noise(seconds: float, channels: int = 1) -> torch.Tensor:
    return torch.randn(channels, round(seconds * 48000), generator=torch.Generator().manual_seed(3)) * 0.1


@pytest.mark.parametrize("samples", [1, 479, 480, 481, 9 * HOP, 9 * HOP + 1, 63 * HOP, 200 * HOP + 7])
def test_any_length_comes_back_as_long(codec, samples):
    audio = noise(5)[:, :samples]
    stream = codec.encode(audio)
    assert stream.codes.shape == (1, -(-samples // (9 * HOP)), 3)
    decoded = codec.decode(stream)
    assert decoded.shape == (1, samples)
    assert torch.isfinite(decoded).all()


def test_payload_is_exactly_the_rate(codec):
    """z rate · M · log2 K bits a second, with whole z vectors."""
    seconds = 9 * HOP * 50 / 48000
    stream = codec.encode(noise(seconds))
    bits = stream.codes.size * 4
    assert bits == pytest.approx(seconds * codec.z_rate * 3 * 4)
    assert bits / seconds / 1000 == pytest.approx(codec.kbps(3))
    empty = codec.encode(noise(seconds)[:, :1])
    assert len(bitstream.write(stream)) - len(bitstream.write(empty)) == pytest.approx(bits / 8 - 2, abs=2)


@pytest.mark.parametrize(
    ("pooling", "books", "bits_a_second"), [(9, 10, 1333 + 1 / 3), (100, 25, 300), (100, 8, 96), (4, 10, 3000)]
)
def test_files_have_the_papers_rates_to_the_bit(pooling, books, bits_a_second):
    """K = 4096, in files of 36 s, which are whole z at all of these: what is no payload is the header, 20 bytes."""
    shapes = dataclasses.replace(SHAPES, pooling=pooling, patch_size=1)
    config = dataclasses.replace(make_codec().config, latent_encoder=shapes, window=pooling * 4)
    quantizer = ResidualQuantizer(8, books=books, size=4096, beam=1)
    torch.nn.init.normal_(quantizer.codebooks)
    codec = SPresso(
        config, autoencoder=SpectralAE(), dit=DiT(dataclasses.replace(DIT, patch_size=1)), quantizer=quantizer
    )
    codec.model_hash = "0123456789abcdef"
    data = bitstream.write(codec.eval().encode(noise(36)))
    assert (len(data) - 19) * 8 / 36 == pytest.approx(bits_a_second, rel=1e-9)
    assert codec.kbps(books) * 1000 == pytest.approx(bits_a_second)


@pytest.mark.parametrize("books", [1, 2])
def test_a_prefix_of_the_codes_decodes(codec, books):
    """Rates nest: the first books of a stream are a stream, and nearer to z the more they are."""
    z = torch.randn(200, 8)
    codes = codec.quantizer.encode(z)
    errors = [(codec.quantizer.decode(codes[:, :number]) - z).square().mean() for number in (books, books + 1)]
    assert errors[1] < errors[0]
    stream = codec.encode(noise(0.7))
    header = dataclasses.replace(stream.header, books=books)
    prefix = dataclasses.replace(stream, header=header, codes=stream.codes[..., :books])
    again = bitstream.read(bitstream.write(prefix), frames_of=codec.z_frames)
    assert torch.isfinite(codec.decode(again)).all()


def test_ten_minutes_take_a_few_hundred_megabytes():
    """Of which the sound itself is 115; apart, as memory that was once taken counts for ever."""
    command = [sys.executable, "-m", "tests.models.ten_minutes"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 450


def test_file_and_back_decodes_alike(codec):
    stream = codec.encode(noise(0.7), books=2)
    again = bitstream.read(bitstream.write(stream), frames_of=codec.z_frames)
    assert again.header.books == 2
    torch.testing.assert_close(codec.decode(again, seed=4), codec.decode(stream, seed=4))


def test_seeds_give_other_sounds_of_the_same_codes_and_one_seed_the_same(codec):
    stream = codec.encode(noise(0.5))
    first, again, other = (codec.decode(stream, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert (first - other).abs().max() > 1e-3


def test_temperature_scales_the_noise_that_a_decode_starts_from(codec):
    stream, start = codec.encode(noise(0.5)), codec.noise([1], 6)
    z_BZN = codec.quantizer.decode(torch.from_numpy(stream.codes)).transpose(1, 2)
    cooler = codec.z_to_audio(z_BZN, start, sampling=Sampling(steps=2, temperature=0.5))
    torch.testing.assert_close(cooler, codec.z_to_audio(z_BZN, 0.5 * start, sampling=Sampling(steps=2)))


def test_z_reaches_the_sound(codec):
    left, right = codec.encode(noise(0.5)), codec.encode(noise(1.0)[:, 24000:] * torch.linspace(0, 3, 24000))
    assert (codec.decode(left, seed=1) - codec.decode(right, seed=1)).abs().max() > 1e-3


def test_level_comes_back(codec):
    loud, quiet = codec.encode(noise(0.5)), codec.encode(noise(0.5) * 10 ** (-30 / 20))
    assert quiet.header.gains_db[0] - loud.header.gains_db[0] == 30
    torch.testing.assert_close(codec.decode(quiet), codec.decode(loud) * 10 ** (-30 / 20))


def test_what_is_silent_stays_unheard(codec):
    silence = codec.encode(torch.zeros(1, 1000))
    assert codec.decode(silence).abs().max() < 0.01
    right_only = torch.cat([torch.zeros(1, 24_000), noise(0.5)])
    left, right = codec.decode(codec.encode(right_only, channels="separate"))
    assert left.abs().max() < 0.01 * right.abs().max()


def test_a_stream_tells_of_the_sound_before_it_was_resampled(codec):
    """Its length and rate, from which that at the codec's rate follows."""
    stream = codec.encode(noise(1)[:, :22_051], sample_rate=44_100)
    assert (stream.header.samples, stream.header.rate) == (22_051, 44_100)
    assert codec.samples(22_051, 44_100) == 24_002
    assert codec.decode(stream).shape == (1, 24_002)
    assert bitstream.read(bitstream.write(stream), frames_of=codec.z_frames).header == stream.header


@pytest.mark.parametrize(("audio", "message"), [
    (np.zeros((1, 100), np.float32), r"is a ndarray: give a float tensor .*torch\.from_numpy"),
    (torch.zeros(1, 100, dtype=torch.int16), r"dtype torch\.int16: .* divide 16-bit numbers by 32768"),
    (torch.zeros(100), r"shape \(100,\): give a float tensor \(channels, samples\)"),
    (torch.zeros(1, 1, 100), r"shape \(1, 1, 100\)"),
    (torch.zeros(2, 0), "at least one sample"),
    (torch.zeros(24_000, 2), "24000 channels of 2 samples: .*transpose"),
    (torch.tensor([[0.1, float("nan")]]), "not finite"),
    (torch.tensor([[0.1, float("inf")]]), "not finite"),
    (torch.full((1, 100), 32_000.0), "values up to 32000: .* divide"),
])  # fmt: skip
def test_audio_that_is_none_is_refused(codec, audio, message):
    with pytest.raises(ValueError, match=message):
        codec.encode(audio)


@pytest.mark.parametrize("rate", [0, 44_100.0, -1, 10**9, "48000"])
def test_a_rate_that_is_none_is_refused(codec, rate):
    with pytest.raises(ValueError, match=r"sample_rate=.* must be a whole number of Hz"):
        codec.encode(noise(1), sample_rate=rate)


@pytest.mark.parametrize("frames_per_block", [40, 3000])
@pytest.mark.parametrize("size", [1_001, 65_536])
@pytest.mark.parametrize("books", [1, 3])
def test_a_sound_in_blocks_gets_the_codes_of_the_whole(codec, monkeypatch, frames_per_block, size, books):
    """x0 of the whole sound, z of all of x0, and codes of all z, as the stages compute them."""
    monkeypatch.setattr("models.autoencoder.FRAMES_PER_BLOCK", frames_per_block)
    monkeypatch.setattr("models.encoding._VECTORS", 10)
    monkeypatch.setattr(type(codec.quantizer), "vectors_at_once", lambda self, books: 7)
    audio = noise(4.3, channels=2)
    blocks = audio.numpy().astype(np.float32)
    stream = encode_sound(
        codec, lambda: np.array_split(blocks, blocks.shape[1] // size + 1, axis=1), sample_rate=48_000, books=books
    )
    for row, part in enumerate((audio[:1] + audio[1:], audio[:1] - audio[1:])):
        levelled = level(part / 2)[0][None]
        with torch.inference_mode():
            x0 = codec.autoencoder.encode_blocks(lambda first, last: levelled[..., first:last], audio.shape[1])  # noqa: B023
            z = codec.x0_to_z(x0, codec.z_frames(audio.shape[1]))
            codes = codec.quantizer.encode(z[0].T, books=books)
        np.testing.assert_array_equal(stream.codes[row], codes.numpy())


def test_encoding_tells_how_far_it_is(codec, monkeypatch):
    monkeypatch.setattr("models.autoencoder.FRAMES_PER_BLOCK", 40)
    told: list[float] = []
    sound = noise(3).numpy()
    encode_sound(codec, lambda: [sound], sample_rate=48_000, progress=told.append)
    assert len(told) > 5
    assert told == sorted(told)
    assert told[-1] == 1


def test_a_sound_without_samples_is_refused(codec):
    for blocks in ([], [np.zeros((2, 0), np.float32)]):
        with pytest.raises(ValueError, match="the sound has no samples"):
            encode_sound(codec, lambda: blocks, sample_rate=48_000)  # noqa: B023


def test_blocks_are_the_whole(codec, monkeypatch):
    stream = codec.encode(noise(3, channels=2))
    whole = codec.decode(stream, seed=5)
    monkeypatch.setattr("models.autoencoder.FRAMES_PER_BLOCK", 50)
    blocks = list(codec.decode_blocks(stream, seed=5))
    assert len(blocks) == 7
    torch.testing.assert_close(torch.cat(blocks, dim=-1), whole)


@pytest.mark.parametrize("seconds", [0.8, 3.0])
def test_long_sounds_are_decoded_jointly_and_short_ones_at_once(codec, seconds, monkeypatch):
    lengths = set()
    forward = codec.dit.forward
    monkeypatch.setattr(
        codec.dit, "forward", lambda x, *rest, **more: lengths.add(x.shape[-1]) or forward(x, *rest, **more)
    )
    steps, grids, starts = [], [], JointWindows.starts
    monkeypatch.setattr(JointWindows, "starts", lambda self, frames: grids.append(self.step) or starts(self, frames))
    codec.decode(codec.encode(noise(seconds)), progress=lambda done, total: steps.append((done, total)))
    assert lengths == ({63} if seconds > 1 else {81})
    assert steps == [(1, 2), (2, 2)]
    assert grids == ([0, 1] if seconds > 1 else [])


def test_codes_that_the_quantizer_does_not_have_are_refused(codec):
    stream = codec.encode(noise(0.3))
    for changes in ({"size": 32}, {"books": 4}, {"samples": 0}):
        other = dataclasses.replace(stream, header=dataclasses.replace(stream.header, **changes))
        with pytest.raises(ValueError, match="damaged"):
            codec.decode(other)


def test_long_files_are_encoded_by_windows_that_know_their_neighbours(codec):
    """A window is 7 z; of all but the first the z at its beginning is the window's before."""
    x0 = codec.autoencoder.encode(noise(3)[None])[..., :270]
    z = codec.x0_to_z(x0, 30)
    torch.testing.assert_close(z[..., :6], codec.g(x0[..., :63])[..., :6])
    torch.testing.assert_close(z[..., 6:11], codec.g(x0[..., 45:108])[..., 1:6])
    torch.testing.assert_close(z[..., -6:], codec.g(x0[..., -63:])[..., -6:])


def test_mid_and_side_start_from_other_noise(codec):
    """With the same, what is made up would lean to the left: here, with the same codes, all of it."""
    stream = codec.encode(noise(0.5, channels=2))
    alike = dataclasses.replace(stream.header, gains_db=(0.0, 0.0))
    left, right = codec.decode(dataclasses.replace(stream, header=alike, codes=stream.codes[:1].repeat(2, axis=0)))
    assert right.abs().mean() > 0.1 * left.abs().mean()


def test_another_models_stream_is_refused(codec):
    stream = codec.encode(noise(0.3))
    other = make_codec()
    other.model_hash = "ffffffff00000000"
    with pytest.raises(ValueError, match="made by model 01234567"):
        other.decode(stream)


def test_saved_and_loaded_is_the_same_codec(exported):
    codec, again = SPresso.from_pretrained(exported), SPresso.from_pretrained(exported)
    assert codec.model_hash == again.model_hash == json.loads((exported / "codec.json").read_text())["model"]
    stream = codec.encode(noise(0.5))
    torch.testing.assert_close(codec.decode(stream), again.decode(stream))
    assert not any(path.suffix in (".bin", ".pt", ".pkl") for path in exported.iterdir())


def test_hash_tells_models_apart(exported, tmp_path):
    codec = SPresso.from_pretrained(exported)
    next(codec.f.parameters()).data += 0.1
    other = codec.save_pretrained(tmp_path / "other", base=tmp_path / "dit.safetensors", card="")
    assert other != SPresso.from_pretrained(exported).model_hash


def test_a_prior_goes_with_the_codec_and_makes_no_other_model(exported, tmp_path):
    codec = SPresso.from_pretrained(exported)
    assert codec.coder() is None
    codec.prior = Prior(books=3, size=16)
    torch.nn.init.normal_(codec.prior.bias, std=3)
    model = codec.save_pretrained(tmp_path / "with", base=tmp_path / "dit.safetensors", card="")
    again = SPresso.from_pretrained(tmp_path / "with")
    assert model == again.model_hash == SPresso.from_pretrained(exported).model_hash
    assert again.coder().hash == codec.coder().hash


def test_adapter_is_what_peft_loads(exported, tmp_path):
    ours = SPresso.from_pretrained(exported).dit
    theirs = PeftModel.from_pretrained(load_dit(tmp_path / "dit.safetensors"), str(exported)).eval()
    x, t = torch.randn(2, 128, 27), torch.tensor([0.2, 0.9])
    torch.testing.assert_close(theirs(x, t), ours(x, t))
    assert (load_dit(tmp_path / "dit.safetensors")(x, t) - ours(x, t)).abs().max() > 1e-3


def test_another_base_model_is_refused(exported):
    config, state = load_weights(exported / "dit.safetensors")
    (exported / "dit.safetensors").unlink()
    save_weights(exported / "dit.safetensors", {name: value + 0.1 for name, value in state.items()}, config)
    with pytest.raises(ValueError, match=r"base model.*is not the one"):
        SPresso.from_pretrained(exported)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "codec.json").unlink(), "holds no codec"),
        (lambda folder: (folder / "codec.json").write_text('{"format'), "damaged"),
        (lambda folder: (folder / "upsampler.safetensors").write_bytes(b"12345678"), r"upsampler\.safetensors"),
        (lambda folder: (folder / "codec.json").write_text('{"format": 99}'), "format 99"),
    ],
)
def test_damaged_exports_say_what_is_wrong(exported, damage, message):
    damage(exported)
    with pytest.raises(ValueError, match=message):
        SPresso.from_pretrained(exported)


def edit(path: Path, **changes: object) -> None:
    """Change values in the config of a codec.json, named by their dotted keys with `_of_` for the dots."""
    description = json.loads(path.read_text())
    for key, value in changes.items():
        *parts, last = reversed(key.split("_of_"))
        place = description["config"]
        for part in parts:
            place = place[part]
        place[last] = value
    path.write_text(json.dumps(description))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": 18.5}, r"`window`: expected a whole number, got a number"),
        ({"window": 1}, r"window is 1, not a multiple of the pooling"),
        ({"rank_of_lora": 10**9}, r"`config\.lora\.rank` is not that of adapter_model\.safetensors"),
        ({"width_of_latent_encoder": 2**20}, r"`config\.latent_encoder` is not the config of latent_encoder"),
        ({"encoder_depth_of_latent_encoder": 10**12}, r"encoder_depth is 1000000000000: give at most 4096"),
        ({"steps_of_sampling": 0}, r"sampling\.steps is 0"),
        ({"guidance_of_sampling": float("inf")}, r"Infinity is not a finite number"),
        ({"folders_of_autoencoder": None}, r"autoencoder has an unknown field `folders`"),
        ({"widht_of_dit": 8}, r"it has an unknown field `widht`"),
    ],
)
def test_a_config_that_no_codec_has_is_refused_before_it_is_built(exported, changes, message):
    edit(exported / "codec.json", **changes)
    with pytest.raises(ValueError, match=rf"codec\.json is damaged \(.*{message}.*export it again"):
        SPresso.from_pretrained(exported)


def test_a_part_that_asks_for_more_than_its_file_holds_is_refused(exported):
    for name, changes in (("quantizer", {"books": 10**7}), ("quantizer", {"size": 2**40}), ("dit", {"depth": 4096})):
        path = exported / f"{name}.safetensors"
        whole = path.read_bytes()
        config, state = load_weights(path)
        path.unlink()  # it may be a hard link
        save_weights(path, state, config | changes)
        with pytest.raises(ValueError, match=rf"{name}\.safetensors"):
            SPresso.from_pretrained(exported)
        path.write_bytes(whole)
    SPresso.from_pretrained(exported)


def test_a_codec_without_quantizer_says_which_stages_are_missing(codec):
    bare = make_codec()
    bare.quantizer = None
    with pytest.raises(ValueError, match="quantize"):
        bare.encode(noise(0.1))
