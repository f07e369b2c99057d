"""Sample x0 of a long sound whose z is still coming, exactly as `models.windows.JointWindows` does with all of z.

One step of the sampler changes a frame by what D predicts from the window around that frame, and by nothing else. So a
window's step can be taken as soon as the step before has reached the end of the window. The steps run through the sound
one behind the other, half a window apart, and each window is computed once per step, as for a whole sound.

Shape suffixes: B rows, C channels of x0, Z channels of z, T frames, N vectors z.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from models.samplers import DecodingSteps, State
from models.windows import WINDOWS_AT_ONCE, JointWindows, joint_shift, joint_starts


def lookahead(window: int, pooling: int, steps: int) -> int:
    """Return by how many frames of z, at most, x0 lags behind: about (steps + 3) / 2 windows.

    A window has to be whole, and each step after the first waits for about half a window of the step before. At the
    end of a sound, the last window overlaps with the one before it, which costs up to another window.
    """
    shift = joint_shift(window, pooling, 1)
    return 2 * window + sum(shift if step % 2 else window - shift for step in range(1, steps))


class Wavefront:
    """Samples x0 of a sound of known length part by part.

    Args:
        joint: D and f in windows.
        steps: the steps of the codec, from noise to x0.
        frames: of the whole sound, more than 1.5 windows.
    """

    def __init__(self, joint: JointWindows, steps: DecodingSteps, *, frames: int) -> None:
        self._joint, self._steps, self._frames = joint, steps, frames
        places = [_cells(joint_starts(frames, joint.window, joint.pooling, step), joint.window) for step in (0, 1)]
        self._levels = [_Level(cells=places[step % 2]) for step in range(steps.steps)]
        self._z_BZN: Tensor | None = None
        self._z_begin = 0

    def push(self, z_BZN: Tensor, noise_BCT: Tensor) -> Tensor | None:
        """Go on with the next vectors z and the noise of their frames; return the frames of x0 that are now sampled.

        They follow those that were returned before. None if there are none yet.
        """
        self._z_BZN = z_BZN if self._z_BZN is None else torch.cat([self._z_BZN, z_BZN], dim=-1)
        states = [self._steps.begin(noise_BCT)]
        for done, level in enumerate(self._levels):
            for state in states:
                level.extend(state)
            most = max(1, WINDOWS_AT_ONCE // len(z_BZN))
            states = [self._step(cell, level, done) for cell in level.ready(most)]
        self._forget_z()
        return torch.cat([state[0] for state in states], dim=-1) if states else None

    def _step(self, cell: _Cell, level: _Level, done: int) -> State:
        """Take the step after `done` steps in the frames of a cell, which `level` then forgets."""
        pooling, z_BZN = self._joint.pooling, self._z_BZN
        assert z_BZN is not None
        begins = [start - cell.begin for start in cell.starts]
        z_BZN = z_BZN[..., (cell.begin - self._z_begin) // pooling : (cell.end - self._z_begin) // pooling]

        def dit(x_BCT: Tensor, t_B: Tensor, **inputs: Tensor) -> Tensor:
            return self._joint.predict(begins, x_BCT, t_B, **inputs)

        return self._steps.step(dit, {"condition": z_BZN}, level.take(cell), done)

    def _forget_z(self) -> None:
        """Drop the vectors z of frames that the last step has passed."""
        assert self._z_BZN is not None
        passed = self._levels[-1].begin
        self._z_BZN = self._z_BZN[..., (passed - self._z_begin) // self._joint.pooling :]
        self._z_begin = passed


@dataclass(frozen=True)
class _Cell:
    """Frames from `begin` to `end` with their windows, none of which reaches beyond them."""

    begin: int
    end: int
    starts: tuple[int, ...]
    """First frame of each window."""


def _cells(starts: list[int], window: int) -> Callable[[], Iterator[_Cell]]:
    """Return what makes an iterator over the cells of all windows: those that overlap are in one cell."""

    def cells() -> Iterator[_Cell]:
        held: list[int] = []
        for start in starts:
            if held and start >= held[-1] + window:
                yield _Cell(held[0], held[-1] + window, tuple(held))
                held = []
            held.append(start)
        yield _Cell(held[0], held[-1] + window, tuple(held))

    return cells


class _Level:
    """The frames between two steps, which wait for the second step.

    Attributes:
        begin: the first frame that waits.
    """

    def __init__(self, cells: Callable[[], Iterator[_Cell]]) -> None:
        self._cells = cells()
        self._next = next(self._cells, None)
        self._waiting: State | None = None
        self.begin = self._end = 0

    def extend(self, state: State) -> None:
        """Append frames that the step before has reached."""
        self._end += state[0].shape[-1]
        kept = self._waiting
        self._waiting = state if kept is None else tuple(map(_joined, zip(kept, state, strict=True)))

    def ready(self, most: int) -> Iterator[_Cell]:
        """Yield the cells that can be taken now, joined to cells of about `most` windows."""
        while self._next is not None and self._next.end <= self._end:
            cell, self._next = self._next, next(self._cells, None)
            while self._next is not None and self._next.end <= self._end and len(cell.starts) < most:
                cell = _Cell(cell.begin, self._next.end, cell.starts + self._next.starts)
                self._next = next(self._cells, None)
            yield cell

    def take(self, cell: _Cell) -> State:
        """Return the state of a cell's frames, the first ones that wait, and forget them."""
        assert self._waiting is not None
        length = cell.end - cell.begin
        taken = tuple(each[..., :length] for each in self._waiting)
        self._waiting = tuple(each[..., length:] for each in self._waiting)
        self.begin = cell.end
        return taken


def _joined(parts: tuple[Tensor, Tensor]) -> Tensor:
    return torch.cat(parts, dim=-1)
