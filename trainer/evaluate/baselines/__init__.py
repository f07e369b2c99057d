"""Codecs by others, to stand beside ours in a table: one interface, and each by `NAME@KBPS` or `NAME`.

Importing this imports none of them: what a codec needs is imported when it is loaded.
"""

from __future__ import annotations

import difflib

from trainer.evaluate.baselines.baseline import Baseline
from trainer.evaluate.baselines.huggingface import DAC, EnCodec, StableAudio
from trainer.evaluate.baselines.opus import Opus
from trainer.evaluate.baselines.packages import Music2Latent, SemantiCodec

__all__ = ["BASELINES", "Baseline", "make_baseline", "problems_of"]

BASELINES: dict[str, type[Baseline]] = {
    kind.name: kind for kind in (Opus, DAC, EnCodec, SemantiCodec, StableAudio, Music2Latent)
}


def make_baseline(spec: str, weights: str | None = None) -> Baseline:
    """The codec that `dac@1.7` or `music2latent` names, not loaded yet.

    Args:
        spec: a name, and after an @ one of its rates in kbps (without it, that of the paper's page).
        weights: a folder of them; None: the hub's cache, or what the codec's own package does.

    Raises:
        ValueError: there is no such codec, or it has no such rate; names the nearest.
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
        raise ValueError(f"{spec}: {rate!r} is no number of kbps: write {name}@{kind.default_kbps:g}") from None
    near = min(kind.rates, key=lambda known: abs(known - kbps))
    if abs(near - kbps) > 1e-6:
        known = ", ".join(f"{known:g}" for known in kind.rates)
        raise ValueError(f"{spec}: {name} has {known} kbps, the nearest is {name}@{near:g}")
    return kind(near, weights)


def problems_of(specs: list[str], weights: dict[str, str]) -> list[str]:
    """All that is wrong with a recipe's choice of them."""
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
