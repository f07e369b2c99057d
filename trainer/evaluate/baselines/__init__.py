"""Codecs by others to compare with ours, behind one interface; each is named by `NAME@KBPS` or `NAME`.

Importing this package imports no codec: the packages that a codec needs are imported when the codec is loaded.
"""

from __future__ import annotations

import difflib

from trainer.evaluate.baselines.baseline import Baseline
from trainer.evaluate.baselines.codec2 import Codec2
from trainer.evaluate.baselines.huggingface import DAC, EnCodec, StableAudio
from trainer.evaluate.baselines.lc3 import LC3
from trainer.evaluate.baselines.opus import Opus
from trainer.evaluate.baselines.packages import Music2Latent, SemantiCodec

__all__ = ["BASELINES", "Baseline", "make_baseline", "problems_of"]

BASELINES: dict[str, type[Baseline]] = {
    kind.name: kind for kind in (Opus, LC3, Codec2, DAC, EnCodec, SemantiCodec, StableAudio, Music2Latent)
}


def make_baseline(spec: str, weights: str | None = None) -> Baseline:
    """Return the codec that a spec such as `dac@1.7` or `music2latent` names; nothing is loaded yet.

    Args:
        spec: a name, optionally with @ and a rate in kbps; the default is the rate on the paper's page.
        weights: a folder of weights; None: the hub's cache, or the default of the codec's own package.

    Raises:
        ValueError: there is no such codec, or it has no such rate; the message names the nearest.
    """
    name, at, rate = spec.partition("@")
    if name not in BASELINES:
        raise ValueError(f"{spec}: there is no codec {name}, the nearest known one is {_nearest(name)}")
    kind = BASELINES[name]
    if not at:
        return kind(kind.default_kbps, weights)
    if not kind.rates:
        raise ValueError(f"{spec}: {name} has continuous latents and no bit rate: write {name}")
    try:
        kbps = float(rate)
    except ValueError:
        raise ValueError(f"{spec}: {rate!r} is not a number of kbps: write {name}@{kind.default_kbps:g}") from None
    near = min(kind.rates, key=lambda known: abs(known - kbps))
    if abs(near - kbps) > 1e-6:
        known = ", ".join(f"{known:g}" for known in kind.rates)
        raise ValueError(f"{spec}: {name} has {known} kbps, the nearest is {name}@{near:g}")
    return kind(near, weights)


def problems_of(specs: list[str], weights: dict[str, str]) -> list[str]:
    """Return all errors in a recipe's `evaluate.baselines` and `evaluate.weights`."""
    found = []
    for spec in specs:
        try:
            make_baseline(spec)
        except ValueError as error:
            found.append(f"evaluate.baselines: {error}")
    found += [f"evaluate.baselines holds {spec} twice" for spec in sorted({s for s in specs if specs.count(s) > 1})]
    found += [
        f"evaluate.weights.{name}: there is no codec {name}, the nearest known one is {_nearest(name)}"
        for name in weights
        if name not in BASELINES
    ]
    return found


def _nearest(name: str) -> str:
    return difflib.get_close_matches(name, list(BASELINES), n=1, cutoff=0.0)[0]
