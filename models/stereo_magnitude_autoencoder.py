"""StereoMagnitudeAE, an AudioAE without weights whose latents are those of MagnitudeAE and where each band comes from.

Per band, a frame of stereo is its energy E = (|L|² + |R|²) / 2 and two numbers from -1 to 1, which are the Stokes
parameters of the pair: the balance p = (|L|² - |R|²) / 2E and the correlation c = Re(L R*) / E. The decoder takes the
band as the sum of two sounds that have nothing in common. The first is panned to the angle θ, where (cos 2θ, sin 2θ)
points the way of (p, c), and has the share (1 + r) / 2 of the energy, with r² = p² + c². The second has the rest, at
θ + 90°. A sound in the middle has c = 1, one on the left p = 1, one in opposite phases c = -1, and a diffuse one
p = c = 0.

Shape suffixes: B batch, A audio channels, S samples, T latent frames, C latent channels, F frequency bins, P bands.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.magnitude_autoencoder import MagnitudeAE, power


class StereoMagnitudeAE(MagnitudeAE):
    """Computes latents from the energies of an STFT: 256 channels at 100 Hz for 48 kHz stereo audio.

    Channels 0…127 are the energies of `MagnitudeAE`'s bands. Channels 128…191 are the balance and 192…255 the
    correlation of pairs of these bands, each with its mean and spread. Delays between the channels are lost.
    """

    name = "magnitude_stereo"
    channels, latent_channels = 2, 256
    places = 64

    # Added to the energies of both channels, so that silence is in the middle: -100 dB of full scale.
    ambient = 1e-10
    # Frames by which the second sound's random phases are off the first one's: whole segments, past most sounds.
    apart = MagnitudeAE.segment * 2**14
    # Fitted to 109 recorded sounds whose channels differ: Sonic Pi's samples, and sounds of a desktop and of games. The
    # mean balance is -0.03, and is taken to be 0.
    balance_spread, correlation_mean, correlation_spread = 0.38, 0.34, 0.54

    place_of_bin: Tensor
    member: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.config |= {
            name: getattr(self, name)
            for name in ("ambient", "balance_spread", "correlation_mean", "correlation_spread")
        } | {"stereo_version": 1}
        self._constant("place_of_bin", self.band // (self.bands // self.places))
        self._constant("member", (self.place_of_bin[:, None] == torch.arange(self.places)).float())

    def _encode(self, audio_BAS: Tensor) -> Tensor:
        left_BTF, right_BTF = (self._analyse(audio_BAS[:, channel]) for channel in range(2))
        scale = self.taper.square().sum()
        of_left, of_right = (power(spectrum) / scale for spectrum in (left_BTF, right_BTF))
        product = (left_BTF.real * right_BTF.real + left_BTF.imag * right_BTF.imag) / scale
        both_BTP = (of_left + of_right) @ self.member + self.ambient
        balance_BTP = (of_left - of_right) @ self.member / both_BTP
        correlation_BTP = (2 * product @ self.member + self.ambient) / both_BTP
        features = (
            self._features((of_left + of_right) / 2),
            balance_BTP / self.balance_spread,
            (correlation_BTP - self.correlation_mean) / self.correlation_spread,
        )
        return torch.cat(features, -1).transpose(1, 2).contiguous()

    def at_gain(self, x0_BCT: Tensor, gain_db_B: Tensor) -> Tensor:
        """See `AudioAE.at_gain`. A gain changes the energies alone."""
        energies_BCT, places_BCT = x0_BCT.split((self.bands, 2 * self.places), 1)
        return torch.cat((super().at_gain(energies_BCT, gain_db_B), places_BCT), 1)

    def _decode_from(self, begin: int, x0_BCT: Tensor) -> Tensor:
        energies_BCT, balance_BPT, correlation_BPT = x0_BCT.split((self.bands, self.places, self.places), 1)
        balance_BTF = self._of_bins(balance_BPT * self.balance_spread)
        correlation_BTF = self._of_bins(correlation_BPT * self.correlation_spread + self.correlation_mean)
        share_BTF = ((1 + (balance_BTF.square() + correlation_BTF.square()).sqrt()) / 2).clamp(max=1)
        magnitude_BTF = self._magnitudes(energies_BCT) * 2**0.5
        first_BTF = self._with_phases(begin, magnitude_BTF * share_BTF.sqrt())
        second_BTF = self._with_phases(begin + self.apart, magnitude_BTF * (1 - share_BTF).sqrt())
        angle_BTF = torch.atan2(correlation_BTF, balance_BTF) / 2
        cos_BTF, sin_BTF = angle_BTF.cos(), angle_BTF.sin()
        left_BTF = cos_BTF * first_BTF - sin_BTF * second_BTF
        right_BTF = sin_BTF * first_BTF + cos_BTF * second_BTF
        return torch.stack((self._synthesise(left_BTF), self._synthesise(right_BTF)), 1)

    def _of_bins(self, places_BPT: Tensor) -> Tensor:
        """Give each bin the number of its band."""
        return places_BPT.transpose(1, 2)[..., self.place_of_bin]
