"""What a training tells its trackers: points of curves, clips to hear and see, and that it has gone back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class Points(NamedTuple):
    """One point of each curve of a line of the log."""

    key: str
    """The line's kind: train, held_out or average."""
    samples: int
    """Samples seen: the x axis of all trackers."""
    values: dict[str, float]
    """Curve → value, such as `train/loss`."""

    @property
    def nbytes(self) -> int:
        """Bytes that the event holds in memory, roughly."""
        return 100 * len(self.values)


class HeardClip(NamedTuple):
    """A listening sample."""

    key: str
    """Name, such as `clip_12/decoded`."""
    samples: int
    audio_S: NDArray[np.float32]
    """In -1 … 1."""
    sample_rate: int
    picture: NDArray[np.uint8]
    """Its spectrogram, RGB (height, width, 3)."""

    @property
    def nbytes(self) -> int:
        """Bytes that the event holds in memory."""
        return self.audio_S.nbytes + self.picture.nbytes


class WentBack(NamedTuple):
    """The run was rewound: what comes next replaces the curves after `samples`."""

    samples: int
    nbytes: int = 0


Event = Points | HeardClip | WentBack


def curves_of(kind: str, values: Mapping[str, Any]) -> dict[str, float]:
    """Return the curves of a line of `metrics.jsonl`: its numbers, its losses by noise level, its named groups."""
    return dict(_curves(kind, values))


def _curves(kind: str, values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, int | float):
            yield f"{kind}/{name}", value
        elif isinstance(value, dict):
            for curve, part in value.items():
                yield f"{kind}_{name.removeprefix('loss_')}/{curve}", part
    for bin_, value in enumerate(values.get("loss_bins", [])):
        if value is not None:
            yield f"{kind}_by_noise_level/{bin_}", value
