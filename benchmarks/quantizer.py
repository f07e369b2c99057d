"""Compare quantizers on z of held-out sounds: python benchmarks/quantizer.py CODEC LATENTS [--json FILE].

CODEC is the export of an `autoencode` stage; LATENTS holds its latents (`train/` and `test/`, split by file). At 1 Hz,
`--bits 96 300 --book-bits 6` are the paper's rates. The vectors are z at every frame offset and, with `--vectors 0`, at
several gains. Each method is fitted on the same vectors with the same number of threads. Errors are mean squared errors
on vectors of held-out files, relative to the vectors' variance. Methods that learn by gradient descent take the same
number of steps and the same batch size, and stop early on validation clips, never on the test files. ResidualVQ needs
`pip install vector-quantize-pytorch`; without that package, name the other methods with `--only`.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from torch import Tensor, nn

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from models.atomic_write import write_whole  # noqa: E402
from models.codec import SPresso  # noqa: E402
from models.quantizers.qinco2 import QINCo2  # noqa: E402
from models.quantizers.residual import VECTORS_PER_CODEWORD, ResidualQuantizer  # noqa: E402
from trainer.data.shard_set import ShardSet  # noqa: E402

GAINS_DB = (-9.0, -6.0, -3.0, 3.0, 6.0, 9.0, -12.0, 12.0, 0.0)
POINTS, MANY_POINTS = 256, 4096
"""Vectors per codeword that faiss's k-means takes by default, and that one row takes."""
TRAINING, SEARCH = (4, 8), (32, 64)
"""Beam and candidates of our QINCo2, in training and when it is measured."""
Decoded = Callable[[Tensor], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("codec", type=Path, help="the export folder of an `autoencode` stage")
    parser.add_argument("latents", type=Path, help="the folder with its latents, `train/` and `test/`")
    parser.add_argument(
        "--vectors", type=int, default=60_000, help="vectors to train on; 0: all, at all gains (default: %(default)s)"
    )
    parser.add_argument("--held-out", type=int, default=8_000, help="vectors to test on (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=600, help="training steps (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=1024, help="vectors per step (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=8e-4, help="peak learning rate of QINCo2 (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="default: all cores")
    parser.add_argument("--bits", nargs="+", type=int, default=[64, 96, 120], help="bits a z (default: 64 96 120)")
    parser.add_argument("--book-bits", type=int, default=8, help="bits of a codebook (default: %(default)s)")
    parser.add_argument("--trained", type=Path, help="an export of `quantize` on CODEC, to be measured, too")
    parser.add_argument("--only", nargs="+", help="methods to measure, by their names in the table")
    parser.add_argument("--json", type=Path, help="a file to write the figures to, updated after each row")
    options = parser.parse_args()
    if any(bits % options.book_bits for bits in options.bits):
        parser.error(f"--bits must be multiples of --book-bits, which is {options.book_bits}")
    options.size, options.books = 2**options.book_bits, [bits // options.book_bits for bits in sorted(options.bits)]
    torch.set_num_threads(options.threads)
    faiss.omp_set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    data = vectors(options.codec, options.latents, options.vectors, options.held_out)
    figures: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {options.threads} thread(s)",
        "versions": {"torch": torch.__version__, "faiss": faiss.__version__},
        "vectors": {name: len(part) for name, part in data.items()},
        "steps": options.steps,
        "batch": options.batch,
        "book_bits": options.book_bits,
        "books": options.books,
        "rows": [],
    }
    for name, method in METHODS.items():
        if options.only is None or name in options.only:
            for row in method(data, options):
                figures["rows"].append({"method": name, **row})
                say(json.dumps(figures["rows"][-1]))
                if options.json:
                    write_whole(options.json, json.dumps(figures, indent=1))
    print(markdown(figures))


# ---- vectors


def vectors(codec_path: Path, latents: Path, count: int, held_out: int) -> dict[str, Tensor]:
    """Return z (N, width) for training, for validation (early stopping) and for the test; no clip is in two of them."""
    codec = SPresso.from_pretrained(codec_path)
    train, test = ShardSet(latents / "train"), ShardSet(latents / "test")
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(train), generator=generator).tolist()
    kept = len(train) // 20
    gains = (0.0,) if count else GAINS_DB
    parts = {
        "train": z_of(codec, train, order[kept:], gains),
        "validation": z_of(codec, train, order[:kept], (0.0,)),
        "test": z_of(codec, test, list(range(len(test))), (0.0,)),
    }
    wanted = {"train": count or len(parts["train"]), "validation": held_out // 2, "test": held_out}
    return {
        name: part[torch.randperm(len(part), generator=generator)[: wanted[name]]].contiguous()
        for name, part in parts.items()
    }


@torch.inference_mode()
def z_of(codec: SPresso, shards: ShardSet, ids: list[int], gains_db: tuple[float, ...]) -> Tensor:
    """Encode clips to z (N, width), at every frame offset and at each gain."""
    pooling, window, found = codec.config.latent_encoder.pooling, codec.config.window, []
    for number, id_ in enumerate(ids):
        if number % 200 == 0:
            say(f"vectors: {number} of {len(ids)} clips")
        x0_1CT = torch.from_numpy(np.asarray(shards.latents([id_])[0], np.float32))[None]
        for gain_db in gains_db:
            scaled = x0_1CT if gain_db == 0 else codec.autoencoder.at_gain(x0_1CT, torch.tensor([gain_db]))
            for offset in range(pooling):
                shifted = scaled[..., offset:]
                windows = [part for part in shifted.split(window, dim=-1) if part.shape[-1] == window]
                if windows:
                    found.append(codec.g(torch.cat(windows)).transpose(1, 2).flatten(0, 1))
    return torch.cat(found)


# ---- methods


def ours(data: dict[str, Tensor], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Fit one QINCo2 for the highest rate; its first codebooks give the lower rates."""
    torch.manual_seed(0)
    quantizer = QINCo2(
        data["train"].shape[1], max(options.books), options.size, beam=TRAINING[0], candidates=TRAINING[1]
    )
    fit_seconds = time_call(lambda: quantizer.fit(data["train"], seed=0))[0]
    learn_seconds, quantizer = time_call(lambda: train_quantizer(quantizer, data, options))
    quantizer.beam, quantizer.candidates = SEARCH
    quantizer.revive(data["train"][: VECTORS_PER_CODEWORD * options.size])
    used = sum(len(torch.unique(column)) for column in quantizer.encode(data["train"][:65_536]).T)
    dead = options.size * max(options.books) - used
    for books in options.books:
        row = measure(data["test"], partial_encode(quantizer, books), quantizer.decode, fit_seconds + learn_seconds)
        prefix = quantizer.decode(quantizer.encode(data["test"])[:, :books])
        yield row | {"books": books, "prefix_error": relative_error(prefix, data["test"]), "dead": dead}


def trained(data: dict[str, Tensor], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measure the quantizer that a `quantize` stage has trained on z of the same g."""
    if options.trained is None:
        return
    quantizer = SPresso.from_pretrained(options.trained).quantizer
    assert isinstance(quantizer, QINCo2), "--trained names a codec with a QINCo2"
    quantizer.beam, quantizer.candidates = SEARCH
    for books in options.books:
        row = measure(data["test"], partial_encode(quantizer, books), quantizer.decode, None)
        prefix = quantizer.decode(quantizer.encode(data["test"])[:, :books])
        yield row | {"books": books, "prefix_error": relative_error(prefix, data["test"])}


def partial_encode(quantizer: Any, books: int) -> Decoded:
    return lambda z: quantizer.encode(z, books=books)


def train_quantizer(quantizer: nn.Module, data: dict[str, Tensor], options: argparse.Namespace) -> nn.Module:
    """Train with AdamW, warm-up and cosine decay; return the weight average that is best on the validation vectors."""
    optimizer = torch.optim.AdamW(quantizer.parameters(), lr=options.lr, weight_decay=0.1)
    average, best, best_error = copy.deepcopy(quantizer), copy.deepcopy(quantizer.state_dict()), float("inf")
    generator = torch.Generator().manual_seed(1)
    validation = data["validation"][:2000]
    for step in range(options.steps + 1):
        if step % max(1, options.steps // 12) == 0:
            error = relative_error(average.decode(average.encode(validation)), validation)
            if error < best_error:
                best, best_error = copy.deepcopy(average.state_dict()), error
            say(f"  step {step}: validation {1000 * error:.4g}")
        rate = min(1.0, (step + 1) / 50) * (0.5 + 0.5 * np.cos(np.pi * step / options.steps))
        optimizer.param_groups[0]["lr"] = options.lr * max(1e-3, rate)
        rows = torch.randint(len(data["train"]), (options.batch,), generator=generator)
        optimizer.zero_grad()
        quantizer.loss(data["train"][rows]).mean().backward()
        nn.utils.clip_grad_norm_(quantizer.parameters(), 0.1)
        optimizer.step()
        with torch.no_grad():
            for mean, value in zip(average.parameters(), quantizer.parameters(), strict=True):
                mean.lerp_(value, 1 - min(0.98, step / (step + 10)))
    average.load_state_dict(best)
    return average.eval()


def faiss_rq(train_beam: int, search_beam: int, points: int = POINTS) -> Callable[..., Iterator[dict[str, Any]]]:
    """Return a method: faiss's residual quantizer for the highest rate, fitted on `points` vectors per codeword.

    Its first codebooks give the lower rates.
    """

    def method(data: dict[str, Tensor], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
        width = data["train"].shape[1]
        if points > POINTS and len(data["train"]) <= POINTS * options.size:
            return  # this row would train on the same vectors as the other rows
        quantizer = faiss.ResidualQuantizer(width, max(options.books), options.book_bits)
        quantizer.max_beam_size, quantizer.cp.max_points_per_centroid = train_beam, points
        quantizer.train_type |= faiss.ResidualQuantizer.Skip_codebook_tables
        seconds, _ = time_call(lambda: quantizer.train(sample(data["train"], points * options.size)))
        codebooks = faiss.vector_to_array(quantizer.codebooks).reshape(max(options.books), options.size, width)
        for books in options.books:
            part = faiss.ResidualQuantizer(width, books, options.book_bits)
            faiss.copy_array_to_vector(codebooks[:books].ravel(), part.codebooks)
            part.is_trained, part.max_beam_size = True, search_beam
            row = measure(data["test"], *of_faiss(part), seconds)
            # the error of codes that were searched with all codebooks and then cut to the first ones
            whole = ResidualQuantizer(width, max(options.books), options.size, beam=search_beam)
            with torch.no_grad():
                whole.codebooks.copy_(torch.from_numpy(codebooks))
                prefix = whole.decode(whole.encode(data["test"])[:, :books])
            yield row | {"books": books, "prefix_error": relative_error(prefix, data["test"])}

    return method


def faiss_lsq(data: dict[str, Tensor], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Fit faiss's local search quantizer for each rate, as its codes have no order; it is made for unit scale."""
    mean, scale = data["train"].mean(0).numpy(), data["train"].std().item()

    def standardised(z: np.ndarray) -> np.ndarray:
        return (z - mean) / scale

    for books in options.books:
        quantizer = faiss.LocalSearchQuantizer(data["train"].shape[1], books, options.book_bits)
        points = standardised(sample(data["train"], POINTS * options.size))
        seconds, _ = time_call(lambda quantizer=quantizer, points=points: quantizer.train(points))
        encode, decode = of_faiss(quantizer, standardised)
        row = measure(data["test"], encode, lambda codes, d=decode: d(codes) * scale + mean, seconds)
        yield row | {"books": books}


def faiss_pq(data: dict[str, Tensor], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Fit faiss's product quantizer for each rate; z is zero-padded to a multiple of the number of codebooks."""
    width = data["train"].shape[1]
    for books in options.books:
        missing = -width % books
        quantizer = faiss.ProductQuantizer(width + missing, books, options.book_bits)

        def padded(z: np.ndarray, missing: int = missing) -> np.ndarray:
            return np.pad(z, ((0, 0), (0, missing)))

        seconds, _ = time_call(
            lambda q=quantizer, pad=padded: q.train(pad(sample(data["train"], POINTS * options.size)))
        )
        encode, decode = of_faiss(quantizer, padded)
        yield measure(data["test"], encode, lambda codes, d=decode: d(codes)[:, :width], seconds) | {"books": books}


def lucidrains(data: dict[str, Tensor], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Train vector-quantize-pytorch's ResidualVQ: k-means initialises its codebooks, moving averages update them."""
    from vector_quantize_pytorch import ResidualVQ

    width = data["train"].shape[1]
    mean, scale = data["train"].mean(0), data["train"].std()
    torch.manual_seed(0)
    quantizer = ResidualVQ(
        dim=width,
        num_quantizers=max(options.books),
        codebook_size=options.size,
        kmeans_init=True,
        threshold_ema_dead_code=2,
    )

    def train() -> None:
        generator = torch.Generator().manual_seed(1)
        quantizer.train()
        for _ in range(options.steps):
            rows = torch.randint(len(data["train"]), (options.batch,), generator=generator)
            quantizer(((data["train"][rows] - mean) / scale)[None])
        quantizer.eval()

    seconds, _ = time_call(train)

    def encode(z: Tensor) -> Tensor:
        with torch.no_grad():
            return quantizer(((z - mean) / scale)[None])[1][0]

    for books in options.books:

        def decode(codes: Tensor, books: int = books) -> Tensor:
            codebooks = quantizer.codebooks[:books]
            return sum(book[codes[:, m]] for m, book in enumerate(codebooks)) * scale + mean

        yield measure(data["test"], encode, decode, seconds) | {"books": books}


METHODS: dict[str, Callable[..., Iterator[dict[str, Any]]]] = {
    "this project's QINCo2": ours,
    "this project's QINCo2, by `quantize`": trained,
    "faiss RQ, trained and searched with beam 32": faiss_rq(32, 32),
    "faiss RQ, trained with beam 1, searched with 32": faiss_rq(1, 32),
    "faiss RQ, beam 1": faiss_rq(1, 1),
    "faiss RQ, trained with beam 1 on a million, searched with 32": faiss_rq(1, 32, MANY_POINTS),
    "faiss LSQ": faiss_lsq,
    "ResidualVQ (vector-quantize-pytorch)": lucidrains,
    "faiss PQ": faiss_pq,
}


# ---- measuring


def sample(train: Tensor, count: int) -> np.ndarray:
    """Return the vectors to fit faiss on, as many as its k-means takes."""
    return train[:count].numpy()


def of_faiss(quantizer: Any, prepared: Callable[[np.ndarray], np.ndarray] = lambda z: z) -> tuple[Decoded, Decoded]:
    return (
        lambda z: torch.from_numpy(quantizer.compute_codes(prepared(z.numpy()))),
        lambda codes: torch.from_numpy(quantizer.decode(codes.numpy())),
    )


@torch.no_grad()
def measure(z: Tensor, encode: Decoded, decode: Decoded, seconds: float | None) -> dict[str, Any]:
    """Measure the relative error on z (N, width), and the µs per vector to encode and to decode."""
    decode(encode(z[:256]))  # warms up, untimed
    encoding, codes = time_call(lambda: encode(z))
    decoding, z_q = time_call(lambda: decode(codes))
    return {
        "error": relative_error(z_q, z),
        "fit_s": "" if seconds is None else round(seconds, 1),
        "encode_us": round(1e6 * encoding / len(z), 1),
        "decode_us": round(1e6 * decoding / len(z), 2),
    }


def relative_error(z_q: Tensor, z: Tensor) -> float:
    return float((z_q - z).square().mean() / (z - z.mean(0)).square().mean())


def time_call(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def markdown(figures: dict[str, Any]) -> str:
    """Return the table, and the ratio of our errors to those of RQ with beam 32 and of the best peer."""
    books, bits = figures["books"], [figures["book_bits"] * count for count in figures["books"]]
    lines = [
        f"{figures['date']}, {figures['machine']}, torch {figures['versions']['torch']}, faiss "
        f"{figures['versions']['faiss']}. Relative error in thousandths; {figures['vectors']['train']} vectors to "
        f"train on, {figures['vectors']['test']} of held-out files; {figures['steps']} steps of {figures['batch']}; "
        f"codebooks of {figures['book_bits']} bits.\n",
        "| method | " + " | ".join(f"{count} bits" for count in bits) + f" | cut from {bits[-1]} bits: "
        f"{' | '.join(map(str, bits[:-1]))} | fit s | encode µs | decode µs |",
        "|---" * (2 * len(bits) + 3) + "|",
    ]
    found = {name: {row["books"]: row for row in figures["rows"] if row["method"] == name} for name in METHODS}
    for name, rows in found.items():
        if rows:
            last = rows[books[-1]]
            errors = [f"{1000 * rows[count]['error']:.4g}" for count in books]
            cut = [rows[count].get("prefix_error") for count in books[:-1]]
            errors += ["" if error is None else f"{1000 * error:.4g}" for error in cut]
            lines.append(
                f"| {name} | {' | '.join(errors)} | {last['fit_s']} | {last['encode_us']} | {last['decode_us']} |"
            )
    mine, beam = found.pop("this project's QINCo2"), found["faiss RQ, trained and searched with beam 32"]
    if mine and beam:
        best = [min(rows[count]["error"] for rows in found.values() if rows) for count in books]
        lines.append(
            f"\nOurs to RQ of beam 32: {_ratios(mine, [beam[count]['error'] for count in books], books)} at "
            f"{' / '.join(map(str, bits))} bits; to the best other method at each rate: {_ratios(mine, best, books)}. "
            f"Codes that no training vector uses: {mine[books[0]]['dead']} of {2 ** figures['book_bits'] * books[-1]}."
        )
    return "\n".join(lines)


def _ratios(mine: dict[int, dict[str, Any]], errors: list[float], books: list[int]) -> str:
    return " / ".join(f"{mine[count]['error'] / error:.3f}" for count, error in zip(books, errors, strict=True))


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
