"""MagnitudeAE, an AudioAE without weights whose latents are magnitudes: it finds the phases again when it decodes.

Shape suffixes: B batch, S samples, T latent frames, C latent channels, F frequency bins, W samples of a window.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from models.autoencoder import AudioAE, scrambled


class MagnitudeAE(AudioAE):
    """Computes latents from the energies of an STFT: 128 channels at 100 Hz for 48 kHz mono audio.

    Channels 0…55 are the lowest bins of the STFT (33.3 Hz each), and channels 56…127 are bands up to 24 kHz, 3.6 % wide
    each. A channel is the mean energy of its bins, companded (x^p) and standardised.

    The decoder interpolates the channels to a magnitude for each bin. It chooses first phases that keep partials steady
    and clicks sharp, and improves them by the fast Griffin-Lim algorithm (Perraudin, Balazs and Søndergaard, 2013).
    All that is random in the first phases is a fixed function of frame and bin, so decoding is deterministic.
    """

    name = "magnitude"
    sample_rate, channels, latent_channels, hop = 48000, 1, 128, 480
    window = 3 * hop
    bands, single_bins = 128, 56

    # A bin of white noise at 0 dBFS has energy 1, one of a sine at most 240. The limit prevents an overflow if D
    # predicts an extreme value.
    loudest = 1e3
    companding = 0.1
    # The mean and the spread of the channels 0, 16, … 128, between which they are interpolated. They are fitted to 431
    # clips of recorded effects and 160 of synthesized ones, levelled to -23 dBFS RMS and counted equally, with an error
    # of at most a quarter of a channel's spread. The last knots continue the line, as in SpectralAE: many recordings
    # are empty above 20 kHz.
    mean_knots = (0.423, 0.436, 0.392, 0.367, 0.358, 0.314, 0.268, 0.227, 0.180)
    spread_knots = (0.257, 0.236, 0.219, 0.202, 0.193, 0.173, 0.151, 0.120, 0.100)

    iterations = 16
    momentum = 0.5
    segment = 32
    """Frames after which the phases of partials start anew, so that a decoded sample depends on few frames."""
    # An iteration spreads a frame over those that overlap with it, two on either side, as the last synthesis does.
    context = 2 * (iterations + 1) + segment

    # A band's interpolated energies are scaled by at most this factor to have the band's energy.
    most_scaled = 4.0
    # Added to magnitudes before a logarithm or a division, so that much smaller ones count as silent.
    silence = 1e-4
    # Thresholds in nepers (1 Np is a factor of e): a bin belongs to a partial if its peak exceeds the mean of its
    # neighbourhood by `prominence`, and to an onset if the magnitudes change by `onset` from one frame to the next.
    prominence, onset = 1.0, 1.0

    band: Tensor
    share: Tensor
    lower: Tensor
    upper: Tensor
    fraction: Tensor
    mean: Tensor
    spread: Tensor
    taper: Tensor

    def __init__(self) -> None:
        settings = ("window", "single_bins", "companding", "mean_knots", "spread_knots")
        super().__init__({"version": 2, **{setting: getattr(self, setting) for setting in settings}})
        edges = _band_edges(self.single_bins, self.window // 2 + 1, self.bands)
        bins = torch.arange(self.window // 2 + 1)
        band = torch.bucketize(bins, edges[1:], right=True)
        member = band[:, None] == torch.arange(self.bands)
        self._constant("band", band)
        self._constant("share", member.float() / member.sum(0))
        centres = (edges[:-1] + edges[1:] - 1) / 2
        upper = torch.bucketize(bins, centres).clamp(1, self.bands - 1)
        self._constant("upper", upper)
        self._constant("lower", upper - 1)
        fraction = (bins - centres[upper - 1]) / (centres[upper] - centres[upper - 1])
        self._constant("fraction", fraction.clamp(0, 1))
        self._constant("mean", _between(self.mean_knots, self.bands))
        self._constant("spread", _between(self.spread_knots, self.bands))
        self._constant("taper", torch.hann_window(self.window))

    def _encode(self, audio_B1S: Tensor) -> Tensor:
        spectrum_BTF = self._analyse(audio_B1S[:, 0])
        energy_BTF = power(spectrum_BTF) / self.taper.square().sum()
        return self._features(energy_BTF).transpose(1, 2).contiguous()

    def _features(self, energy_BTF: Tensor) -> Tensor:
        """Return each band's mean energy, companded and standardised `(B, T, bands)`."""
        return ((energy_BTF @ self.share) ** self.companding - self.mean) / self.spread

    def at_gain(self, x0_BCT: Tensor, gain_db_B: Tensor) -> Tensor:
        """See `AudioAE.at_gain`. A gain multiplies the energies, so no phase has to be found."""
        factor_B11 = 10 ** (gain_db_B.float() / 10 * self.companding)[:, None, None]
        mean_C1, spread_C1 = self.mean[:, None], self.spread[:, None]
        companded_BCT = (x0_BCT.float() * spread_C1 + mean_C1).clamp(min=0) * factor_B11
        return ((companded_BCT - mean_C1) / spread_C1).to(x0_BCT.dtype)

    def _decode_from(self, begin: int, x0_BCT: Tensor) -> Tensor:
        return self._synthesise(self._with_phases(begin, self._magnitudes(x0_BCT)))[:, None]

    def _with_phases(self, begin: int, magnitude_BTF: Tensor) -> Tensor:
        """Find the phases of a spectrum whose first frame is frame `begin` of the sound; return the spectrum."""
        spectrum_BTF = torch.polar(magnitude_BTF, 2 * math.pi * self._first_phases(begin, magnitude_BTF))
        before_BTF = torch.zeros_like(spectrum_BTF)
        for _ in range(self.iterations):
            consistent_BTF = self._analyse(self._synthesise(spectrum_BTF))
            ahead_BTF = torch.sub(consistent_BTF, before_BTF, alpha=self.momentum)
            scale_BTF = magnitude_BTF * (power(ahead_BTF) + 1e-18).rsqrt()
            spectrum_BTF = torch.view_as_complex(torch.view_as_real(ahead_BTF) * scale_BTF[..., None])
            before_BTF = consistent_BTF
        return spectrum_BTF

    def _magnitudes(self, x0_BCT: Tensor) -> Tensor:
        """Return the magnitude of each bin: interpolated between the centres of the bands, and scaled in each band so
        that it keeps its energy, which lies higher than both neighbours at a peak."""
        companded_BTC = (x0_BCT.transpose(1, 2) * self.spread + self.mean).clamp(0, self.loudest**self.companding)
        smooth_BTF = torch.lerp(companded_BTC[..., self.lower], companded_BTC[..., self.upper], self.fraction)
        energy_BTF = smooth_BTF ** (1 / self.companding)
        wanted_BTC = companded_BTC ** (1 / self.companding)
        scale_BTC = (wanted_BTC / (energy_BTF @ self.share + 1e-20)).clamp(1 / self.most_scaled, self.most_scaled)
        return (energy_BTF * scale_BTC[..., self.band] * self.taper.square().sum()).sqrt()

    def _analyse(self, audio_BS: Tensor) -> Tensor:
        """Compute the STFT `(B, T, F)`; frames are centred on hop boundaries."""
        around = self.window // 2
        frames_BTW = F.pad(audio_BS, (around, around)).unfold(-1, self.window, self.hop)
        return torch.fft.rfft(frames_BTW * self.taper)

    def _synthesise(self, spectrum_BTF: Tensor) -> Tensor:
        """Return the audio `(B, (T - 1) · hop)` whose STFT is nearest to `spectrum_BTF` (Griffin and Lim, 1984)."""
        frames_BTW = torch.fft.irfft(spectrum_BTF, n=self.window) * self.taper
        audio_BS = _overlap_add(frames_BTW, self.hop)
        weights_1S = _overlap_add(self.taper.square().expand(1, frames_BTW.shape[1], -1), self.hop)
        inside = slice(self.window // 2, self.window // 2 + (frames_BTW.shape[1] - 1) * self.hop)
        return audio_BS[:, inside] / weights_1S[:, inside]

    def _first_phases(self, begin: int, magnitude_BTF: Tensor) -> Tensor:
        """Return the phases in turns that the iterations start from: of partials, of onsets, or random ones."""
        log_BTF = (magnitude_BTF + self.silence).log()
        frame = torch.arange(begin, begin + log_BTF.shape[1], device=log_BTF.device)[:, None]
        bin = torch.arange(log_BTF.shape[2], device=log_BTF.device)
        top_BTF, peak_BTF = F.max_pool1d(log_BTF, 5, stride=1, padding=2, return_indices=True)
        partial_BTF = self._partials(begin, (bin + _offsets(magnitude_BTF)).gather(2, peak_BTF))
        stands_out_BTF = top_BTF - _smooth(log_BTF, 13) > self.prominence
        phase_BTF = torch.where(stands_out_BTF, partial_BTF, _random_turns(frame, bin))
        change_BTF = _smooth(log_BTF[:, 1:] - log_BTF[:, :-1], 33).abs()
        sudden_BTF = F.pad(change_BTF, (0, 0, 1, 0)).maximum(F.pad(change_BTF, (0, 0, 0, 1))) > self.onset
        # In the middle of a window, a phase of -bin/2 turns is that of an impulse.
        return torch.where(sudden_BTF, self._impulses(magnitude_BTF), phase_BTF) - bin / 2

    def _partials(self, begin: int, frequency_BTF: Tensor) -> Tensor:
        """Return phases that advance by the frequency in bins of the peak that a bin belongs to.

        At the begin of each segment, the bins of a peak have one phase, which is random.
        """
        mean_BTF = (frequency_BTF[:, 1:] + frequency_BTF[:, :-1]) / 2
        advance_BTF = F.pad((mean_BTF * (self.hop / self.window)) % 1, (0, 0, 1, 0))
        # the sum of all advances since the first frame of the segment
        front, frames = begin % self.segment, frequency_BTF.shape[1]
        padded = F.pad(advance_BTF, (0, 0, front, -(front + frames) % self.segment)).unflatten(1, (-1, self.segment))
        since_BTF = (padded.cumsum(2) - padded[:, :, :1]).flatten(1, 2)[:, front : front + frames]
        place = torch.arange(front, front + frames, device=frequency_BTF.device)
        first = (place - place % self.segment - front).clamp(min=0)
        segment = (place[:, None] + (begin - front)) // self.segment
        return since_BTF + _random_turns(segment, frequency_BTF[:, first].round().long())

    def _impulses(self, magnitude_BTF: Tensor) -> Tensor:
        """Return phases of impulses whose delays follow from the magnitudes of neighbouring frames.

        An impulse d samples after the middle of a frame has the magnitude of the Hann window there, cos²(π d / W). With
        the root r of its ratio to the next frame's magnitude, tan(π d / W) = (r - cos(π h / W)) / sin(π h / W), where h
        is the hop; the louder one of both neighbours decides.
        """
        earlier_BTF, later_BTF = F.pad(magnitude_BTF, (0, 0, 1, 0))[:, :-1], F.pad(magnitude_BTF, (0, 0, 0, 1))[:, 1:]
        ratio_BTF = (earlier_BTF.maximum(later_BTF) / (magnitude_BTF + self.silence)).sqrt()
        angle = math.pi * self.hop / self.window
        turns_BTF = ((ratio_BTF - math.cos(angle)) / math.sin(angle)).atan() / math.pi
        return -(turns_BTF * (later_BTF - earlier_BTF).sign()).cumsum(-1)


def _band_edges(single_bins: int, bins: int, bands: int) -> Tensor:
    """Return the first bin of each band, and the number of bins: the lowest bands have one bin, the others' edges are
    in geometric progression."""
    wide = bands - single_bins
    edges = single_bins * (bins / single_bins) ** (torch.arange(1, wide + 1, dtype=torch.float64) / wide)
    return torch.cat((torch.arange(single_bins + 1), edges.round().long()))


def _between(knots: tuple[float, ...], channels: int) -> Tensor:
    """Interpolate `channels` values between evenly spaced knots, of which the last is one step past the last value."""
    values = torch.tensor(knots)
    place = torch.arange(channels) * ((len(knots) - 1) / channels)
    below = place.long()
    return torch.lerp(values[below], values[below + 1], place - below)


def power(spectrum: Tensor) -> Tensor:
    """Return the energy of each bin of a complex spectrum."""
    return spectrum.real.square() + spectrum.imag.square()


def _overlap_add(frames_BTW: Tensor, hop: int) -> Tensor:
    """Add frames, each `hop` samples after the one before: `(B, T, W)` → `(B, (T - 1) · hop + W)`."""
    batch, frames, window = frames_BTW.shape
    parts = frames_BTW.unflatten(2, (window // hop, hop)).unbind(2)
    audio = frames_BTW.new_zeros(batch, frames + len(parts) - 1, hop)
    for place, part in enumerate(parts):
        audio[:, place : place + frames] += part
    return audio.flatten(1)


def _smooth(x_BTF: Tensor, bins: int) -> Tensor:
    return F.avg_pool1d(x_BTF, bins, stride=1, padding=bins // 2, count_include_pad=False)


def _offsets(magnitude_BTF: Tensor) -> Tensor:
    """Return how far from a bin, in bins, a partial lies whose peak is at the bin: exact for a sine and a Hann window.

    It is ±(2r - 1) / (r + 1) with the ratio r of the larger neighbour to the peak (Grandke, 1983).
    """
    below, above = F.pad(magnitude_BTF, (1, 0))[..., :-1], F.pad(magnitude_BTF, (0, 1))[..., 1:]
    ratio = below.maximum(above) / (magnitude_BTF + 1e-9)
    return ((2 * ratio - 1) / (ratio + 1)).clamp(0, 0.5) * (above - below).sign()


def _random_turns(row: Tensor, column: Tensor) -> Tensor:
    """Return numbers in [0, 1) by hashing rows and columns, so they are equal on all devices and in all runs."""
    return (scrambled(row * 4096 + column) >> 8).float() / 2**24
