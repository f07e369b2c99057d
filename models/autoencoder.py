"""AudioAE, the frozen autoencoder: audio ↔ latents `x0` with one frame per `hop` samples.

`SpectralAE` computes its latents by a formula and needs no weights. `VocosAE` is the learned complex-STFT autoencoder
of the public Woosh release (arXiv 2604.01929), whose weights `models.backbones.pretrained` loads.

Shape suffixes: B batch, S samples, T latent frames, C latent channels, D features, F frequency bins.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.autoencoder_sizes import VocosConfig
from models.weights import hash_state

FRAMES_PER_BLOCK = 3000
"""Frames that are encoded or decoded at once. Longer sounds are cut into blocks, which join without a seam."""


class AudioAE(nn.Module):
    """Base class of all autoencoders: it checks shapes, pads, works in blocks and computes the identity.

    Latents are standardised: each channel has a mean of about 0 and a standard deviation of about 1.
    """

    name: str
    sample_rate: int
    channels: int
    latent_channels: int
    hop: int
    surplus_frames = 1
    """Latent frames in excess of one per hop: 1 if a frame is centred on each hop boundary, including the first and
    last ones; 0 if each frame covers one hop."""
    signed_channels = 0
    """Channels, counted from the first, that are coefficients of a spectrum: their signs are noise to a codec."""
    most_frames: int | None = None
    """Frames that may be encoded or decoded at once, if memory allows fewer than `FRAMES_PER_BLOCK`."""
    context: int | None = None
    """Frames on either side that a latent frame, or the decoded samples around it, may depend on. If the context is
    unlimited, it is None, and long sounds are not cut into blocks."""

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        self.config = config

    def frames(self, samples: int) -> int:
        """Return the number of latent frames for `samples` samples."""
        return math.ceil(samples / self.hop) + self.surplus_frames

    def encode(self, audio: Tensor) -> Tensor:
        """Encode audio `(B, channels, samples)` in [-1, 1] to latents `(B, latent_channels, frames(samples))`, float32.

        The audio is padded with zeros to a whole number of hops. Raises ValueError if the shape does not fit.
        """
        if audio.ndim != 3 or audio.shape[1] != self.channels or audio.shape[2] == 0:
            raise ValueError(
                f"audio has shape {tuple(audio.shape)}: {self.name} takes (batch, {self.channels}, samples) with at "
                f"least one sample; mix other channel counts to {self.channels} first"
            )
        return self.encode_blocks(lambda first, last: audio[..., first:last], audio.shape[2])

    def encode_blocks(self, read: Callable[[int, int], Tensor], samples: int) -> Tensor:
        """Encode as `encode` does, but get the audio in blocks from `read(first, last)`, which returns the samples
        `first` to `last` as `(B, channels, …)`."""
        parts = [self.encode_range(read(first, last), kept) for first, last, kept in self.ranges(samples)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def ranges(self, samples: int) -> Iterator[tuple[int, int, slice]]:
        """Yield, for each block of a sound of `samples` samples, the arguments of `encode_range`: the first sample and
        the one after the last, and which of the frames are kept. The kept frames of all blocks are the sound's."""
        for first, last, begin, end in self._blocks(self.frames(samples)):
            until = min(samples, (end - self.surplus_frames) * self.hop)
            yield begin * self.hop, until, slice(first - begin, last - begin)

    def encode_range(self, audio: Tensor, kept: slice) -> Tensor:
        """Encode the samples `(B, channels, …)` of one of `ranges`; return the `kept` frames."""
        padded = F.pad(audio.float(), (0, -audio.shape[2] % self.hop))
        with _whole_float32(audio.device):
            return self._encode(padded)[..., kept]

    def decode(self, x0: Tensor) -> Tensor:
        """Decode latents `(B, latent_channels, frames)` to audio `(B, channels, (frames - surplus_frames) · hop)`.

        The audio is float32. Raises ValueError if the shape does not fit.
        """
        least = 1 + self.surplus_frames
        if x0.ndim != 3 or x0.shape[1] != self.latent_channels or x0.shape[2] < least:
            raise ValueError(
                f"latents have shape {tuple(x0.shape)}: {self.name} takes (batch, {self.latent_channels}, frames) with "
                f"at least {'two frames' if least == 2 else 'one frame'}"
            )
        parts = list(self.decode_blocks(x0))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def decode_blocks(self, x0: Tensor) -> Iterator[Tensor]:
        """Yield the audio that `decode` returns in consecutive blocks `(B, channels, …)`."""
        frames = x0.shape[2]
        for first, last, begin, end in self._blocks(frames):
            until = last if last < frames else frames - self.surplus_frames  # the sound ends at a surplus frame
            yield self.decode_range(x0[..., begin:end], begin, first, until)

    def decode_range(self, x0: Tensor, begin: int, first: int, until: int) -> Tensor:
        """Decode a part of the latents of a sound; return the audio `(B, channels, …)` of some of the sound's hops.

        Args:
            x0: the latents `(B, latent_channels, …)` from frame `begin` on, with `context` frames around those hops.
            begin: number of the part's first frame in the sound.
            first: number of the first hop of audio in the sound.
            until: number of the hop after the last.
        """
        with _whole_float32(x0.device):
            audio = self._decode_from(begin, x0.float())
        return audio[..., (first - begin) * self.hop : (until - begin) * self.hop]

    def _blocks(self, frames: int) -> Iterator[tuple[int, int, int, int]]:
        """Yield (first, last, begin, end) of each block: its range of frames without and with the context."""
        at_once = min(FRAMES_PER_BLOCK, self.most_frames or FRAMES_PER_BLOCK)
        if self.context is None or frames <= at_once + self.context:
            yield 0, frames, 0, frames
            return
        for first in range(0, frames, at_once):
            last = min(first + at_once, frames)
            yield first, last, max(0, first - self.context), min(last + self.context, frames)

    def at_gain(self, x0_BCT: Tensor, gain_db_B: Tensor) -> Tensor:
        """Return the latents of the same sounds at other gains in dB (B,): by way of the audio, unless it is a formula.

        The shape stays, also without a surplus frame's hop of audio after the last frame.
        """
        padded_BCT = torch.cat([x0_BCT, x0_BCT[..., -1:]], dim=-1).float()  # so that the last frame has a hop of audio
        audio_B1S = self.decode(padded_BCT) * 10 ** (gain_db_B.float() / 20)[:, None, None]
        return self.encode(audio_B1S)[..., : x0_BCT.shape[-1]].to(x0_BCT.dtype)

    def identity(self) -> str:
        """Return a short hash of name, config and weights; autoencoders with equal latents have equal hashes."""
        return hash_state({"name": self.name, **self.config}, self.state_dict())[:12]

    def _constant(self, name: str, value: Tensor) -> None:
        """Register a tensor that follows from the config: it moves with the module and is no part of its state."""
        self.register_buffer(name, value, persistent=False)

    def _encode(self, audio_B1S: Tensor) -> Tensor:
        raise NotImplementedError

    def _decode(self, x0_BCT: Tensor) -> Tensor:
        raise NotImplementedError

    def _decode_from(self, begin: int, x0_BCT: Tensor) -> Tensor:
        """Decode frames whose first one is frame `begin` of the sound; override it if the position matters."""
        return self._decode(x0_BCT)


class SpectralAE(AudioAE):
    """Computes latents from an MDCT with a sine window: 128 channels at 100 Hz for 48 kHz mono audio.

    Channels 0…95 are the MDCT coefficients up to 4.8 kHz, companded (sign(x)·|x|^p) so that quiet ones survive noise.
    Channels 96…127 are the log energies of 32 bands from 4.8 to 24 kHz, whose fine structure the decoder replaces by
    noise. The noise is a fixed function of frame and bin, so decoding is deterministic.
    """

    name = "spectral"
    sample_rate, channels, latent_channels, hop = 48000, 1, 128, 480
    coefficients, bands = 96, 32
    signed_channels = coefficients
    context = 1

    # Bins with less energy than white noise at -80 dBFS count as silent.
    silence = 1e-8
    # No bin of audio in [-1, 1] has more energy. The limit prevents an overflow if D predicts an extreme value.
    loudest = 1e3
    # The exponent p was chosen by three figures on 33 clips that the fit below does not include. With noise of 0.1 on
    # the latents, the log-mel error is 4.9 dB at p = 1 and 1.4 dB at p = 0.5 and 0.4, and the SI-SDR is 12.9 dB at
    # p = 0.4 and 11.1 dB at 0.25. The latents' excess kurtosis is about 60 at p = 1, 4 at 0.5 and 1.5 at 0.4.
    companding = 0.4
    # These constants are fitted to 190 five-second clips of recorded effects and speech, levelled to -23 dBFS RMS. The
    # spread of coefficient k is a·(k + b)^-c, with an error of at most 5 %. The bands' mean log energies lie on a line,
    # and all bands have the same spread. The line is fitted below 20 kHz because most of the recordings were made at
    # 44.1 kHz and are empty above 22 kHz, while other recordings are not.
    coefficient_spread = (0.644, 1.9, 0.28)
    band_mean = (-11.8, -0.142)
    band_spread = 4.4

    basis: Tensor
    band_of_bin: Tensor
    mean: Tensor
    spread: Tensor

    def __init__(self) -> None:
        settings = ("silence", "companding", "coefficient_spread", "band_mean", "band_spread")
        super().__init__({"version": 1, **{setting: getattr(self, setting) for setting in settings}})
        scale, exponent_offset, exponent = self.coefficient_spread
        spread = scale * (torch.arange(self.coefficients) + exponent_offset) ** -exponent
        offset, slope = self.band_mean
        mean = offset + slope * torch.arange(self.bands)
        self._constant("basis", _mdct_basis(self.hop))
        self._constant("band_of_bin", _log_bands(self.coefficients, self.hop, self.bands))
        self._constant("mean", torch.cat((torch.zeros(self.coefficients), mean)))
        self._constant("spread", torch.cat((spread, torch.full((self.bands,), self.band_spread))))

    def _encode(self, audio_B1S: Tensor) -> Tensor:
        frames_BTS = F.pad(audio_B1S[:, 0], (self.hop, self.hop)).unfold(-1, 2 * self.hop, self.hop)
        spectrum_BTF = frames_BTS @ self.basis
        low, high = spectrum_BTF.split((self.coefficients, self.hop - self.coefficients), -1)
        membership = F.one_hot(self.band_of_bin, self.bands).float()
        energy_BTE = high.square() @ (membership / membership.sum(0))
        features_BTC = torch.cat((_signed_power(low, self.companding), (energy_BTE + self.silence).log()), -1)
        return ((features_BTC - self.mean) / self.spread).transpose(1, 2).contiguous()

    def _decode_from(self, begin: int, x0_BCT: Tensor) -> Tensor:
        features_BTC = x0_BCT.transpose(1, 2) * self.spread + self.mean
        low, log_energy_BTE = features_BTC.split((self.coefficients, self.bands), -1)
        energy_BTE = log_energy_BTE.clamp(max=math.log(self.loudest)).exp() - self.silence
        high = energy_BTE.clamp(min=0).sqrt()[..., self.band_of_bin]
        high = high * _random_signs(begin, *high.shape[1:], device=high.device)
        spectrum_BTF = torch.cat((_signed_power(low, 1 / self.companding), high), -1)
        rising, falling = (spectrum_BTF @ self.basis.T).split(self.hop, -1)
        return (falling[:, :-1] + rising[:, 1:]).flatten(1)[:, None]


def _signed_power(x: Tensor, power: float) -> Tensor:
    return x.sign() * x.abs() ** power


def _mdct_basis(hop: int) -> Tensor:
    """Return the windowed, orthonormal MDCT basis (Princen, Johnson and Bradley, 1987): `(2·hop samples, hop bins)`."""
    sample = torch.arange(2 * hop, dtype=torch.float64)[:, None] + 0.5
    bin = torch.arange(hop, dtype=torch.float64) + 0.5
    window = torch.sin(math.pi / (2 * hop) * sample)
    return (window * math.sqrt(2 / hop) * torch.cos(math.pi / hop * (sample + hop / 2) * bin)).float()


def _log_bands(first_bin: int, bins: int, bands: int) -> Tensor:
    """Return the band of each bin from `first_bin` on; the bands' edges are in geometric progression."""
    edges = first_bin * (bins / first_bin) ** (torch.arange(1, bands, dtype=torch.float64) / bands)
    return torch.bucketize(torch.arange(first_bin, bins), edges.round().long(), right=True)


def _random_signs(begin: int, frames: int, bins: int, *, device: torch.device) -> Tensor:
    """Return ±1 for each frame and bin by hashing its position, so the signs are equal on all devices and all runs."""
    frame = torch.arange(begin, begin + frames, device=device)[:, None]
    bits = scrambled(frame * bins + torch.arange(bins, device=device))
    return ((bits >> 16) & 1).float() * 2 - 1


def scrambled(bits: Tensor) -> Tensor:
    """Hash whole numbers to whole numbers of 32 bits by the mixing steps of a hash with low bias."""
    for multiplier in (0x7FEB352D, 0x846CA68B):
        bits = ((bits ^ (bits >> 16)) * multiplier) & 0xFFFFFFFF
    return bits


@contextmanager
def _whole_float32(device: torch.device) -> Iterator[None]:
    """Turn autocast off, and TF32 in cuDNN's convolutions, which is on by default.

    TF32 keeps ten bits of a number, so latents made on a GPU would differ from a CPU's under the same identity.
    """
    cudnn = torch.backends.cudnn
    kept = {"enabled": cudnn.enabled, "benchmark": cudnn.benchmark, "deterministic": cudnn.deterministic}
    with torch.autocast(device.type, enabled=False), cudnn.flags(**kept, allow_tf32=False):
        yield


class VocosAE(AudioAE):
    """A mono autoencoder on the complex STFT with ConvNeXt blocks in encoder and decoder (arXiv 2306.00814)."""

    name = "vocos"
    channels = 1

    mean: Tensor
    spread: Tensor

    def __init__(self, config: VocosConfig):
        super().__init__(asdict(config))
        self.sample_rate, self.latent_channels, self.hop = config.sample_rate, config.latent_channels, config.hop
        self.n_fft = config.n_fft
        # reach of the convolutions of size 7 (3 frames each) and of size 3 (1 frame), and of a sample's STFT frames
        self.context = (
            3 * (1 + max(config.encoder_depth, config.decoder_depth)) + 1 + -(-config.n_fft // (2 * config.hop))
        )
        bins, width = config.n_fft // 2 + 1, config.width
        self.encoder = ConvNeXt(2 * bins, width, config.hidden_width, config.encoder_depth)
        self.to_latents = nn.Conv1d(width, config.latent_channels, 3, padding=1)
        self.decoder = ConvNeXt(config.latent_channels, width, config.hidden_width, config.decoder_depth)
        self.to_spectrum = nn.Conv1d(width, 3 * bins, 1)
        self.register_buffer("mean", torch.zeros(config.latent_channels))
        self.register_buffer("spread", torch.ones(config.latent_channels))
        self.requires_grad_(False)

    def _encode(self, audio_B1S: Tensor) -> Tensor:
        frames = self.frames(audio_B1S.shape[2])
        # The STFT pads both ends by reflecting n_fft / 2 samples, for which the input must be longer than that.
        audio_BS = F.pad(audio_B1S[:, 0], (0, max(0, self.n_fft // 2 + 1 - audio_B1S.shape[2])))
        window = torch.hann_window(self.n_fft, device=audio_BS.device)
        spectrum_BFT = torch.stft(audio_BS, self.n_fft, self.hop, window=window, return_complex=True)[..., :frames]
        latents_BCT = self.to_latents(self.encoder(torch.cat((spectrum_BFT.real, spectrum_BFT.imag), 1)))
        return (latents_BCT - self.mean[:, None]) / self.spread[:, None]

    def _decode(self, x0_BCT: Tensor) -> Tensor:
        latents_BCT = x0_BCT * self.spread[:, None] + self.mean[:, None]
        magnitude, real, imaginary = self.to_spectrum(self.decoder(latents_BCT)).chunk(3, 1)
        length = (real.square() + imaginary.square()).clamp(1e-8, 1e3).sqrt()
        spectrum_BFT = F.softplus(magnitude) * torch.complex(real / length, imaginary / length)
        window = torch.hann_window(self.n_fft, device=x0_BCT.device)
        return torch.istft(spectrum_BFT, self.n_fft, self.hop, window=window)[:, None]


class ConvNeXt(nn.Module):
    """A stack of one-dimensional ConvNeXt blocks between two layer norms: `(B, inputs, T)` → `(B, width, T)`."""

    def __init__(self, inputs: int, width: int, hidden_width: int, depth: int):
        super().__init__()
        self.embed = nn.Conv1d(inputs, width, 7, padding=3)
        self.norm_in = nn.LayerNorm(width, eps=1e-6)
        self.blocks = nn.ModuleList(ConvNeXtBlock(width, hidden_width, scale=1 / depth) for _ in range(depth))
        self.norm_out = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x_BCT: Tensor) -> Tensor:
        """Return `width` features of each frame."""
        x_BTD = self.norm_in(self.embed(x_BCT).transpose(1, 2))
        for block in self.blocks:
            x_BTD = block(x_BTD)
        return self.norm_out(x_BTD).transpose(1, 2)


class ConvNeXtBlock(nn.Module):
    """A depthwise convolution in time, then an MLP on each frame, with a residual connection (arXiv 2201.03545)."""

    def __init__(self, width: int, hidden_width: int, *, scale: float):
        super().__init__()
        self.mix = nn.Conv1d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.mlp_in = nn.Linear(width, hidden_width)
        self.mlp_out = nn.Linear(hidden_width, width)
        self.scale = nn.Parameter(torch.full((width,), scale))

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Apply the block; return the input's shape."""
        mixed_BTD = self.mix(x_BTD.transpose(1, 2)).transpose(1, 2)
        return x_BTD + self.scale * self.mlp_out(F.gelu(self.mlp_in(self.norm(mixed_BTD))))
