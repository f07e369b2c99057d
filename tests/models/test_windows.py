from __future__ import annotations

import numpy as np
import pytest
import torch

from models import windows
from models.diffusion import FlowMatching
from models.samplers import sample
from models.windows import JointWindows, starts


@pytest.mark.parametrize(("frames", "expected"), [(5, [0]), (8, [0]), (9, [0, 1]), (20, [0, 6, 12])])
def test_windows_cover_all_frames(frames, expected):
    assert starts(frames, 8, 6) == expected


def make_joint(dit, f=None, window: int = 12, pooling: int = 3) -> JointWindows:
    return JointWindows(dit, f or (lambda z: z), window=window, pooling=pooling)


def local(x, t, condition=None):
    """A D that looks at each frame alone."""
    return torch.sin(x) * t[:, None, None] + (0 if condition is None else condition.repeat_interleave(3, dim=-1))


@pytest.mark.parametrize("frames", [18, 21, 60, 99])
@pytest.mark.parametrize("clips", [1, 3])
def test_what_looks_at_each_frame_alone_is_the_same_jointly(frames, clips):
    x, z, t = torch.randn(clips, 4, frames), torch.randn(clips, 4, frames // 3), torch.rand(clips)
    torch.testing.assert_close(make_joint(local)(x, t, condition=z), local(x, t, condition=z))
    torch.testing.assert_close(make_joint(local)(x, t), local(x, t))


@pytest.mark.parametrize("frames", [20, 60, 61, 99])
def test_windows_of_one_step_lie_across_where_those_of_the_other_meet(frames):
    joint, meet = make_joint(local), []
    for joint.step in (0, 1, 2):
        begins = joint.starts(frames)
        covered = np.zeros(frames)
        for start in begins:
            covered[start : start + 12] += 1
        assert covered.min() == 1
        meet.append({start for start in begins if 0 < start < frames - 12})
    assert meet[0] == meet[2]
    assert all(abs(one - other) >= 6 for one in meet[0] for other in meet[1])


def test_windows_are_taken_a_few_at_a_time():
    seen = []

    def watched(x, t, condition=None):
        seen.append(len(x))
        return local(x, t, condition)

    make_joint(watched)(torch.randn(1, 4, 3000), torch.ones(1))
    assert max(seen) <= windows.WINDOWS_AT_ONCE
    assert sum(seen) == 3000 / 12


def edged(x, t, condition=None):
    """A D that knows less the nearer a frame is to an end of its window."""
    place = torch.arange(x.shape[-1])
    return torch.zeros_like(x) + 1 / (1 + torch.minimum(place, place.flip(0)))


@pytest.mark.parametrize("step", [0, 1])
def test_a_frame_is_taken_from_where_it_is_nearest_to_the_middle(step):
    joint, frames = make_joint(edged, window=48), 48 * 3 + 24
    joint.step = step
    best = torch.full((frames,), torch.inf)
    for start in joint.starts(frames):
        best[start : start + 48] = torch.minimum(best[start : start + 48], edged(torch.zeros(48), None))
    assert torch.equal(joint(torch.zeros(1, 1, frames), torch.ones(1))[0, 0], best)


def throughout(x, t, condition=None):
    """The exact D of data that are +1 or -1 throughout a window: it decides by all that is in it."""
    alpha, sigma = 1 - t[:, None, None], t[:, None, None].clamp_min(1e-3)
    x0 = torch.tanh((alpha * x).sum(-1, keepdim=True) / sigma**2).expand_as(x)
    return (x0 - x) / sigma  # the velocity that leads there


def sampled(network, noise: torch.Tensor, joint: JointWindows | None = None) -> torch.Tensor:
    def stepped(done, _):
        if joint is not None:
            joint.step = done

    return sample(FlowMatching(), network, noise, steps=16, sampler="dpmpp", progress=stepped)


def test_windows_agree_on_one_sound():
    """Sampled apart, neighbours decide otherwise each by itself, and where they are cross-faded it is neither."""
    noise = torch.randn(32, 1, 120, generator=torch.Generator().manual_seed(0))
    joint = make_joint(throughout)
    jointly = sampled(joint, noise, joint)
    apart, weights = torch.zeros_like(noise), torch.zeros(120)
    triangle = torch.cat([torch.arange(1, 7), torch.arange(6, 0, -1)])
    for start in starts(120, 12, 9):
        apart[..., start : start + 12] += sampled(throughout, noise[..., start : start + 12]) * triangle
        weights[start : start + 12] += triangle

    def neither(x):
        return (x.abs() < 0.9).float().mean()

    def changes(x):
        return (x.sign().diff(dim=-1) != 0).sum(-1).float().mean()

    assert neither(apart / weights) > 0.1
    assert neither(jointly) < 0.01
    assert changes(jointly) < 0.4 * changes(apart / weights)


def smoother(x):
    """A g that knows what lies about each frame: a mean over 7, with zeros beyond its window."""
    return torch.nn.functional.avg_pool1d(torch.nn.functional.avg_pool1d(x, 7, 1, 3), 3)


@pytest.mark.parametrize("frames", [9, 24, 27, 30, 99, 300])
def test_encoded_windows_know_what_lies_beyond_them(frames):
    x = torch.randn(2, 4, frames)
    z = windows.encode(smoother, x, window=24, pooling=3, margin=6)
    torch.testing.assert_close(z, smoother(x))
