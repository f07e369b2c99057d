"""Decoding a stream while it comes, beside decoding its file."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest
import torch

from models import bitstream
from models.autoencoder import SpectralAE
from models.bitstream import Stream
from models.codec import SPresso
from models.live_decoder import CutShort
from models.magnitude_autoencoder import MagnitudeAE
from models.prior import Prior
from models.sizes import Sampling
from tests.models.test_codec import HOP, make_codec, noise
from tests.models.test_distilled import add as distil
from tests.models.test_distilled import in_steps

TOLERANCE = 2e-5
"""Sums are grouped otherwise; the audio has values of up to about 5."""


@pytest.fixture(scope="module")
def codec() -> SPresso:
    return make_live_codec()


def make_live_codec() -> SPresso:
    """A codec with a prior that expects small codes, as `likely` makes them."""
    codec = make_codec()
    codec.prior = Prior(3, 16)
    codec.prior.fit(torch.from_numpy(likely(4000, 1)[0]))
    return codec


def likely(frames: int, rows: int) -> np.ndarray:
    return np.random.default_rng(frames).binomial(15, 0.05, (rows, frames, 3))


def make_stream(codec: SPresso, seconds: float, channels: int = 1, *, live: bool = True) -> Stream:
    """A stream of codes that the prior expects."""
    stream = codec.encode(noise(0.3, channels), channels="separate" if channels > 2 else "auto")
    samples = round(seconds * 48000)
    header = dataclasses.replace(stream.header, samples=samples, interleaved=live and channels > 1)
    return Stream(header, likely(codec.z_frames(samples), header.rows))


def pieces(data: bytes, how: str) -> list[bytes]:
    if how == "at once":
        return [data]
    if how == "by bytes":
        return [data[place : place + 1] for place in range(len(data))]
    generator, cut = random.Random(0), [0]
    while cut[-1] < len(data):
        cut.append(cut[-1] + generator.randint(0, 12))
    return [data[first:last] for first, last in zip(cut, [*cut[1:], len(data)], strict=True)]


def decode_live(codec: SPresso, parts: list[bytes], **options) -> torch.Tensor:
    decoder = codec.decoder(**options)
    audio = [decoder.push(part) for part in parts] + [decoder.flush()]
    return torch.cat([part for part in audio if part.numel()], dim=-1)


@pytest.mark.parametrize("how", ["by bytes", "in pieces", "at once"])
@pytest.mark.parametrize("coded", [False, True])
@pytest.mark.parametrize(("channels", "live"), [(1, False), (2, True), (2, False), (3, True)])
@pytest.mark.parametrize("seconds", [0.001, 0.6, 0.95, 7.3])
def test_the_audio_is_that_of_the_file(codec, seconds, channels, live, coded, how):
    stream = make_stream(codec, seconds, channels, live=live)
    data = bitstream.write(stream, coder=codec.coder() if coded else None)
    assert bool(bitstream.read_header(data)[0].prior) == coded or seconds < 0.5
    whole = codec.decode(stream, seed=3)
    live_audio = decode_live(codec, pieces(data, how), seed=3)
    torch.testing.assert_close(live_audio, whole, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("sampler", ["heun", "dpmpp"])
def test_the_sampling_is_that_of_the_file(codec, sampler):
    stream, sampling = make_stream(codec, 5.0), Sampling(steps=3, sampler=sampler, guidance=1.5, temperature=0.8)
    live = decode_live(codec, pieces(bitstream.write(stream), "in pieces"), sampling=sampling)
    torch.testing.assert_close(live, codec.decode(stream, sampling=sampling), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_distilled_codec_decodes_as_it_decodes_the_file(steps):
    codec = distil(make_live_codec())
    stream = make_stream(codec, 5.0)
    live = decode_live(codec, pieces(bitstream.write(stream), "in pieces"), sampling=in_steps(steps))
    torch.testing.assert_close(live, codec.decode(stream, sampling=in_steps(steps)), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("autoencoder", [SpectralAE, MagnitudeAE])
def test_phases_are_those_of_the_file(autoencoder):
    codec = make_live_codec()
    codec.autoencoder = autoencoder()
    stream = make_stream(codec, 9.0)
    live = decode_live(codec, pieces(bitstream.write(stream), "in pieces"))
    whole = codec.decode(stream)
    assert float((live - whole).square().mean().sqrt() / whole.square().mean().sqrt()) < 1e-4


def test_an_autoencoder_that_has_to_see_the_whole_gets_it():
    codec = make_live_codec()
    codec.autoencoder.context = None
    stream, data = make_stream(codec, 5.0), bitstream.write(make_stream(codec, 5.0))
    whole = codec.decode(stream)
    decoder = codec.decoder()
    assert decoder.delay == float("inf")
    assert decoder.push(data[:-9]).shape == (1, 0)
    torch.testing.assert_close(torch.cat([decoder.push(data[-9:]), decoder.flush()], -1), whole, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_the_delay_is_kept(codec, steps):
    stream = make_stream(codec, 20.0, 2)
    decoder, given = codec.decoder(sampling=Sampling(steps=steps)), 0
    data = bitstream.write(stream)
    frame_bytes = stream.header.packed_bits(1) / 8
    begin = len(data) - 4 - frame_bytes * stream.codes.shape[1]
    late = []
    for place in range(len(data)):
        given += decoder.push(data[place : place + 1]).shape[-1]
        came = int(max(0, place + 1 - begin) / frame_bytes) * 9 * HOP
        late.append((min(came, 960_000) - given) / 48000)
    assert decoder.delay - 1.4 < max(late) <= decoder.delay  # a window lasts 0.63 s
    assert given == 960_000


def test_what_another_model_made_is_refused_at_the_header(codec):
    data = bytearray(bitstream.write(make_stream(codec, 1.0)))
    data[4] ^= 1
    decoder = codec.decoder()
    assert decoder.push(bytes(data[:10])).shape == (0, 0)
    with pytest.raises(ValueError, match="was made by model 00234567, but this codec is model 01234567"):
        decoder.push(bytes(data[10:15]))


@pytest.mark.parametrize(("seconds", "coded"), [(0.9, False), (12.0, False), (12.0, True)])
def test_what_had_come_of_a_stream_that_is_cut_short_is_decoded(codec, seconds, coded):
    stream = make_stream(codec, seconds, 2)
    data = bitstream.write(stream, coder=codec.coder() if coded else None)
    decoder = codec.decoder()
    audio = [part for part in [decoder.push(data[: len(data) * 3 // 4])] if part.numel()]
    with pytest.raises(CutShort, match="cut short or damaged") as raised:
        decoder.flush()
    live, whole = torch.cat([*audio, raised.value.samples], dim=-1), codec.decode(stream)
    assert 0.2 * seconds < live.shape[1] / 48000 < 0.8 * seconds
    assert live.shape[1] % (9 * HOP) == 0
    same = max(0, live.shape[1] - round(decoder.delay * 48000))
    torch.testing.assert_close(live[:, :same], whole[:, :same], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("length", [0, 3, 12])
def test_a_stream_without_a_header_is_refused(codec, length):
    decoder = codec.decoder()
    decoder.push(bitstream.write(make_stream(codec, 1.0))[:length])
    with pytest.raises(ValueError, match=f"cut short: {length} bytes do not even hold its header"):
        decoder.flush()


@pytest.mark.parametrize("coded", [False, True])
def test_damage_is_told_at_the_end(codec, coded):
    data = bytearray(bitstream.write(make_stream(codec, 3.0), coder=codec.coder() if coded else None))
    data[-6] ^= 1
    decoder = codec.decoder()
    decoder.push(bytes(data))
    with pytest.raises(CutShort, match="checksum"):
        decoder.flush()


def test_bytes_after_the_end_are_refused_at_once(codec):
    decoder = codec.decoder()
    decoder.push(bitstream.write(make_stream(codec, 1.0)))
    with pytest.raises(ValueError, match="has bytes after its end"):
        decoder.push(b"x")


def test_few_bytes_that_promise_much_wait_for_more():
    """Codes that cost nothing can't be asked for without end: 16 times the bytes that came have to justify them."""
    codec = make_live_codec()
    assert codec.prior is not None
    codec.prior.bias.data = torch.zeros(3, 16) - 30 * (torch.arange(16) > 0)
    header = dataclasses.replace(make_stream(codec, 1.0).header, samples=60 * 48000)
    body = bitstream._encode_header(header, 2, codec.coder().hash[:2]) + bytes(20)
    assert 0 < codec.decoder().push(body).shape[1] <= 20 * 16 * 8 / 12 * 9 * HOP
