"""Sampling while z is still coming, beside sampling of the whole."""

from __future__ import annotations

import pytest
import torch

from models.diffusion import FlowMatching
from models.samplers import SAMPLERS, GuidedSteps, generate
from models.sizes import Sampling
from models.wavefront import Wavefront, lookahead
from models.windows import WINDOWS_AT_ONCE, JointWindows

WINDOW, POOLING = 12, 3


def of_the_window(x, t, condition=None):
    """A D of which every frame looks at its whole window."""
    seen = torch.sin(3 * x + torch.arange(x.shape[-1])).cumsum(-1) / 4 + x.flip(-1)
    return seen * t[:, None, None] + (0 if condition is None else condition.repeat_interleave(POOLING, dim=-1))


def make_joint(dit=of_the_window) -> JointWindows:
    return JointWindows(dit, lambda z: z, window=WINDOW, pooling=POOLING)


def sampled_whole(z, noise, sampling):
    joint = make_joint()

    def stepped(done, total):
        joint.step = done

    return generate(joint, FlowMatching(), noise, {"condition": z}, sampling=sampling, progress=stepped)


def sampled_live(z, noise, sampling, portion):
    """Return x0, and the greatest number of frames that had come and whose x0 had not."""
    wave = Wavefront(make_joint(), GuidedSteps(FlowMatching(), sampling), frames=noise.shape[-1])
    parts, behind = [], 0
    for first in range(0, z.shape[-1], portion):
        came = min(first + portion, z.shape[-1])
        x0 = wave.push(z[..., first:came], noise[..., first * POOLING : came * POOLING])
        parts += [] if x0 is None else [x0]
        behind = max(behind, came * POOLING - sum(part.shape[-1] for part in parts))
    return torch.cat(parts, dim=-1), behind


@pytest.mark.parametrize("frames", [21, 24, 27, 48, 117, 600])
@pytest.mark.parametrize("steps", [1, 2, 3, 6])
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_x0_is_that_of_the_whole_within_the_lookahead(frames, steps, sampler, guidance):
    sampling = Sampling(steps=steps, sampler=sampler, guidance=guidance, temperature=0.9)
    z, noise = torch.randn(2, 4, frames // POOLING), torch.randn(2, 4, frames)
    whole = sampled_whole(z, noise, sampling)
    for portion in (1, 5, 1000):
        live, behind = sampled_live(z, noise, sampling, portion)
        torch.testing.assert_close(live, whole, rtol=1e-5, atol=1e-5)
        if portion == 1:
            assert behind <= lookahead(WINDOW, POOLING, steps)


def test_the_lookahead_is_hardly_more_than_needed():
    sampling, z, noise = Sampling(steps=6), torch.randn(1, 4, 200), torch.randn(1, 4, 600)
    assert sampled_live(z, noise, sampling, 1)[1] > lookahead(WINDOW, POOLING, 6) - 1.1 * WINDOW


def test_each_window_is_computed_once_a_step_and_a_few_are_taken_together():
    seen = []

    def watched(x, t, condition=None):
        seen.append(len(x))
        return of_the_window(x, t, condition)

    wave = Wavefront(make_joint(watched), GuidedSteps(FlowMatching(), Sampling(steps=2, sampler="euler")), frames=600)
    wave.push(torch.randn(1, 4, 200), torch.randn(1, 4, 600))
    assert max(seen) == WINDOWS_AT_ONCE
    assert sum(seen) == 600 // WINDOW + 600 // WINDOW + 1
