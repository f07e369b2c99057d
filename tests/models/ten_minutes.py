"""What `test_codec.py` runs apart: a codec takes some seconds, then ten minutes, and says how many more MB it took."""

from __future__ import annotations

import resource

import torch

from models import bitstream
from tests.models.test_codec import make_codec


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def there_and_back(seconds: int) -> None:
    """Noise; it is checked that as much comes back."""
    audio = torch.empty(1, seconds * 48_000).uniform_(-0.3, 0.3, generator=torch.Generator().manual_seed(0))
    data = bitstream.write(codec.encode(audio))
    stream = bitstream.read(data, frames_of=codec.z_frames)
    assert sum(block.shape[-1] for block in codec.decode_blocks(stream)) == audio.shape[-1]


if __name__ == "__main__":
    torch.set_num_threads(1)
    codec = make_codec()
    there_and_back(10)
    before = peak_mb()
    there_and_back(600)
    print(peak_mb() - before)
