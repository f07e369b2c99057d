"""The output of a stage's module: named loss terms for each sample, and their weighted sum."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor


class Losses(NamedTuple):
    """Losses of a micro batch of b samples; a tuple, so that wrappers of modules find the tensors in it.

    A module adds a term by giving it a name. The stage's `loss_weights` set the term's weight, and the log shows a
    separate curve for each term.
    """

    terms: dict[str, Tensor]
    """Terms by name, each (b,) in float32: the mean over a sample without its padding."""
    quantiles: Tensor
    """(b,), in (0, 1): each sample's quantile in the distribution of noise levels; 0.5 if the stage adds no noise."""

    def total(self, weights: Mapping[str, float]) -> Tensor:
        """Return the weighted sum of all terms (b,). The weight of a term that `weights` does not name is 1.

        Raises:
            ValueError: `weights` names a term that the stage does not have.
        """
        if unknown := [name for name in weights if name not in self.terms]:
            raise ValueError(
                f"loss_weights names {', '.join(unknown)}, but the stage's loss has the terms {', '.join(self.terms)}: "
                f"remove {unknown[0]}, or name one of them"
            )
        weighted = [value * weights[name] if name in weights else value for name, value in self.terms.items()]
        return sum(weighted[1:], start=weighted[0])
