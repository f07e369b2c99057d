"""Codecs by others as systems under test. Their errors are recorded and do not end the evaluation."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from trainer.evaluate.baselines import Baseline, make_baseline
from trainer.evaluate.scored_clips import ScoredClips
from trainer.evaluate.systems import System, rate_range_of
from trainer.evaluate.under_test import Decoded, SystemUnderTest
from trainer.recipes.schema import Config
from trainer.recipes.values import hash_values

logger = logging.getLogger(__name__)


class Other(SystemUnderTest):
    """One codec by others at one rate."""

    def __init__(self, baseline: Baseline, clips: ScoredClips, device: torch.device) -> None:
        self.baseline, self.clips, self.device = baseline, clips, device
        self.key = baseline.spec.replace("@", "_")
        self.identity = hash_values({"spec": baseline.spec, "weights": baseline.weights})
        self._error: str | None = None  # why loading failed; empty after success, None before the first try

    def decode(self, rows: Sequence[int]) -> Decoded:
        """Decode clip by clip, seeding torch with the clip's row because a codec may be random."""
        system = self._system()
        if self._error is None:
            self._error = self._load()
        if self._error:
            system.unavailable = self._error
            return Decoded(system, [])
        audio_BCS = self.clips.audio(rows)
        out, made = torch.zeros_like(audio_BCS), Decoded(system, [])
        for index, row in enumerate(rows):
            try:
                with torch.random.fork_rng():
                    torch.manual_seed(row)
                    bits = self._code(audio_BCS[index], out[index])
            except Exception as error:  # code of others may raise anything
                made.failures[row] = _in_one_line(error)
                logger.warning("%s failed on %s: %s", self.key, self.clips.keys[row], made.failures[row])
                continue
            made.payload_bits += [] if bits is None else [bits]
        made.takes = [out]
        return made

    def _code(self, clip_CS: Tensor, out_CS: Tensor) -> int | None:
        """Decode a clip channel by channel into `out_CS`; return the bits of all channels, None if they are unknown."""
        total: int | None = 0
        for channel, clip_S in enumerate(clip_CS.cpu().numpy()):
            decoded_S, bits = self.baseline.code(clip_S, self.clips.sample_rate)
            out_CS[channel] = torch.from_numpy(decoded_S)
            total = None if total is None or bits is None else total + bits
        return total

    def retry(self) -> bool:
        """Whether nothing that the codec needs is missing."""
        return not self.baseline.missing()

    def unload(self) -> None:
        """Free the weights."""
        if self._error == "":
            self.baseline, self._error = make_baseline(self.baseline.spec, self.baseline.weights), None

    def _load(self) -> str:
        missing = self.baseline.missing()
        if missing and not self.baseline.fetches:
            return missing
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # deprecations within the packages of others
                self.baseline.load(self.device)
        except Exception as error:  # code of others may raise anything
            return missing or _in_one_line(error)
        return ""

    def _system(self) -> System:
        baseline, channels = self.baseline, self.clips.channels
        kbps = None if baseline.kbps is None else channels * baseline.kbps
        rate = "" if kbps is None else f", {kbps:g} kbps"
        apart = f" Each of the {channels} channels is coded by itself." if channels > 1 else ""
        return System(
            key=self.key,
            title=f"{baseline.title}{rate}",
            role="baseline",
            note=f"Licence: {baseline.licence}.{apart}",
            licence=baseline.licence,
            table=rate_range_of(kbps),
        )


def other_sources(config: Config, clips: ScoredClips, device: torch.device) -> list[SystemUnderTest]:
    """Return the codecs of `evaluate.baselines`; nothing is loaded yet."""
    return [
        Other(make_baseline(spec, config.evaluate.weights.get(spec.partition("@")[0])), clips, device)
        for spec in config.evaluate.baselines
    ]


def _in_one_line(error: Exception) -> str:
    """Return the type and the first 200 characters of an error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
