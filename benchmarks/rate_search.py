"""Weigh error against bits in the search for codes: python benchmarks/rate_search.py CODEC LATENTS.

CODEC is an export with z; LATENTS holds its latents (`train/` and `test/`, split by file). A QINCo2 and a prior over
its codes are trained on z of the training clips. On z of the test clips, each row is one way to encode: all codebooks
with some error per bit (`spresso encode --error-per-bit`), or the least error with fewer codebooks (`--books`). Bits
are those of the entropy coder; errors are relative to the variance of z.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor, nn

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from models.codec import SPresso  # noqa: E402
from models.prior import Coder, Prior  # noqa: E402
from models.quantizers.qinco2 import QINCo2  # noqa: E402
from models.rate_search import RateSearch  # noqa: E402
from trainer.data.shard_set import ShardSet  # noqa: E402

WEIGHTS = (1.0, 2.0, 4.0, 8.0, 16.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("codec", type=Path, help="the export folder of a stage")
    parser.add_argument("latents", type=Path, help="the folder with its latents, `train/` and `test/`")
    parser.add_argument("--clips", type=int, nargs=2, default=(400, 40), help="clips to train on, and to test on")
    parser.add_argument("--books", type=int, default=6, help="codebooks (default: %(default)s)")
    parser.add_argument("--size", type=int, default=64, help="codewords per codebook (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=200, help="steps of quantizer and prior (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    codec = SPresso.from_pretrained(options.codec)
    train_RNZ, test_RNZ = (
        sequences(codec, options.latents / split, count)
        for split, count in zip(("train", "test"), options.clips, strict=True)
    )
    quantizer = QINCo2(
        train_RNZ.shape[-1], options.books, options.size, beam=8, candidates=16, embedding=64, hidden=128
    )
    vectors_NZ = train_RNZ.flatten(0, 1)
    quantizer.fit(vectors_NZ, seed=0)
    learn(quantizer, options.steps, lambda rows: quantizer.loss(vectors_NZ[rows]).mean(), len(vectors_NZ), 256, 1e-3)
    prior, codes_RNM = Prior(options.books, options.size), quantizer.encode(train_RNZ)
    prior.fit(codes_RNM.flatten(0, 1))
    learn(prior, options.steps, lambda rows: prior(codes_RNM[rows]).mean(), len(codes_RNM), 32, 1e-2)
    print(
        f"{datetime.now(UTC).date()}, {platform.machine()}, 1 thread, torch {torch.__version__}; {len(vectors_NZ)} "
        f"vectors of {vectors_NZ.shape[1]} numbers to train on, {test_RNZ[..., 0].numel()} of held-out files; "
        f"{options.books} codebooks of {options.size}, {options.steps} steps.\n\n"
        "| search | bits, plain | bits, coded | error, thousandths | ms per vector |\n|---|---|---|---|---|"
    )
    for row in curve(quantizer, prior.eval(), test_RNZ):
        print(row, flush=True)


@torch.no_grad()
def sequences(codec: SPresso, folder: Path, count: int) -> Tensor:
    """Return z of the first clips of a set, cut to the shortest: (clips, vectors, width)."""
    shards, pooling = ShardSet(folder), codec.config.latent_encoder.pooling
    latents = [torch.from_numpy(x0_CT).float() for x0_CT in shards.latents(range(min(count, len(shards))))]
    z = [codec.x0_to_z(x0_CT[None], x0_CT.shape[1] // pooling)[0].T for x0_CT in latents]
    return torch.stack([z_NZ[: min(map(len, z))] for z_NZ in z])


def learn(
    module: nn.Module, steps: int, loss: Callable[[Tensor], Tensor], rows: int, batch: int, learning_rate: float
) -> None:
    """Train with AdamW at a falling learning rate, on `batch` of the `rows` at each step."""
    optimizer, generator = torch.optim.AdamW(module.parameters()), torch.Generator().manual_seed(0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = learning_rate * (1 - step / steps)
        optimizer.zero_grad()
        loss(torch.randint(rows, (batch,), generator=generator)).backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()


@torch.no_grad()
def curve(quantizer: QINCo2, prior: Prior, z_RNZ: Tensor) -> Iterator[str]:
    coder = prior.coder()
    for books in range(quantizer.books, 0, -1):
        encode = lambda books=books: quantizer.encode(z_RNZ, books=books)  # noqa: E731
        yield measured(f"least error, {books} codebooks", quantizer, coder, z_RNZ, encode)
    for weight in WEIGHTS:
        search = RateSearch(quantizer, prior, error_per_bit=weight)
        yield measured(f"error per bit {weight:g}", quantizer, coder, z_RNZ, lambda search=search: search.encode(z_RNZ))


def measured(name: str, quantizer: QINCo2, coder: Coder, z_RNZ: Tensor, encode: Callable[[], Tensor]) -> str:
    start = time.perf_counter()
    codes_RNM = encode()
    seconds, vectors = time.perf_counter() - start, codes_RNM[..., 0].numel()
    error = (quantizer.decode(codes_RNM) - z_RNZ).square().mean() / (z_RNZ - z_RNZ.mean((0, 1))).square().mean()
    plain, coded = quantizer.bits(codes_RNM.shape[-1]), coder.bits(codes_RNM.numpy()) / vectors
    return f"| {name} | {plain} | {coded:.2f} | {1000 * error:.2f} | {1000 * seconds / vectors:.2f} |"


if __name__ == "__main__":
    main()
