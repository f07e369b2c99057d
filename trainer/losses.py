"""What comes out of a stage's module: named loss terms for each sample, and their weighted sum."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor


class Losses(NamedTuple):
    """Losses of a micro batch of b samples; a tuple, so that wrappers of modules find the tensors in it.

    A module adds a term by giving it a name; the stage's `loss_weights` say how much the term counts, and each term has
    a curve of its own in the log.
    """

    terms: dict[str, Tensor]
    """By name, (b,) in float32 each: the mean over what a sample holds, padding left out."""
    quantiles: Tensor
    """(b,), in (0, 1): where in the distribution of noise levels each sample lay; 0.5 where there is no noise."""

    def total(self, weights: Mapping[str, float]) -> Tensor:
        """The sum of all terms (b,), each times its weight, which is 1 where `weights` does not name the term.

        Raises:
            ValueError: `weights` names a term that there is not.
        """
        if unknown := [name for name in weights if name not in self.terms]:
            raise ValueError(
                f"loss_weights names {', '.join(unknown)}, and the stage's loss has the terms {', '.join(self.terms)}"
            )
        weighted = [value * weights[name] if name in weights else value for name, value in self.terms.items()]
        return sum(weighted[1:], start=weighted[0])
