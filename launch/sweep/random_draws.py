"""Random values of settings that are the same on every machine: each is a function of seed, key and number alone.

Drawing more values therefore keeps the first ones, and another key changes none of the others. The arithmetic is
Python's decimal one, whose logarithm and exponential are rounded correctly everywhere; those of C libraries are not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import ROUND_HALF_EVEN, Context, Decimal

_CONTEXT = Context(prec=40, rounding=ROUND_HALF_EVEN)
_DIGITS = 4  # significant digits of a value, unless its range is too narrow for them
_BITS = 64


@dataclass(frozen=True)
class Draw:
    """How the values of one setting are drawn."""

    kind: str
    """`uniform`, `log_uniform`, `integers` or `choices`."""
    options: tuple[str, ...]
    """The two ends of a range, both of which may be drawn; or the choices."""

    def problem(self) -> str:
        """Return what is wrong, as a phrase with its mend; empty if nothing is."""
        if self.kind == "choices":
            return "" if self.options else "has no choices: give a list of values"
        if len(self.options) != 2:
            return f"must have two ends: write {{{self.kind}: [LOW, HIGH]}}"
        try:
            low, high = (Decimal(option) for option in self.options)
        except ArithmeticError:
            return f"has ends that are no numbers: write {{{self.kind}: [LOW, HIGH]}}"
        if not (low.is_finite() and high.is_finite() and low < high):
            return "must have a low end below its high end, both finite"
        if self.kind == "integers" and (low % 1 or high % 1):
            return "has ends that are no whole numbers: round them, or take uniform"
        return "must be above 0: take uniform" if self.kind == "log_uniform" and low <= 0 else ""

    def value(self, *, seed: int, key: str, number: int) -> str:
        """Return the value with a number, 0 for the first one, as text that stands for exactly this value."""
        word = _word(seed, key, number)
        if self.kind == "choices":
            return self.options[word * len(self.options) >> _BITS]
        low, high = (Decimal(option) for option in self.options)
        if self.kind == "integers":
            return str(int(low) + (word * (int(high) - int(low) + 1) >> _BITS))
        fraction = _CONTEXT.divide(Decimal(word), Decimal(1 << _BITS))
        return _short(self._at(fraction, low, high), low, high, log=self.kind == "log_uniform")

    def _at(self, fraction: Decimal, low: Decimal, high: Decimal) -> Decimal:
        c = _CONTEXT
        if self.kind == "uniform":
            return c.add(low, c.multiply(fraction, c.subtract(high, low)))
        first = c.ln(low)
        return c.exp(c.add(first, c.multiply(fraction, c.subtract(c.ln(high), first))))


def _word(seed: int, key: str, number: int) -> int:
    """Return a random integer below 2⁶⁴."""
    return int.from_bytes(hashlib.sha256(f"{seed}\0{key}\0{number}".encode()).digest()[:8], "big")


def _short(value: Decimal, low: Decimal, high: Decimal, *, log: bool) -> str:
    """Round a value to few digits, a thousandth of its range or finer, without leaving the range."""
    spread = _CONTEXT.subtract(high, low)
    coarsest = spread.adjusted() - _DIGITS + 1
    place = min(coarsest, value.adjusted() - _DIGITS + 1) if log else coarsest
    rounded = value.quantize(Decimal(1).scaleb(place), context=_CONTEXT)
    return repr(float(min(max(rounded, low), high)))


def draws(ranges: dict[str, Draw], *, number: int, seed: int) -> Sequence[dict[str, str]]:
    """Return `number` points, each with a value of every key."""
    return [
        {key: draw.value(seed=seed, key=key, number=index) for key, draw in ranges.items()} for index in range(number)
    ]
