from __future__ import annotations

import errno
import io
import itertools
import json
import logging
import os
import pickletools
import random
import resource
import signal
import stat
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing
from safetensors.torch import save_file

from trainer.checkpoints import checkpoint, cover, manifest, writers
from trainer.ranks.flat_ranges import FlatRange, equal_ranges, whole_ranges

META = {"config": "c0ffee", "base_model": None, "code": "0.1.0"}
SHAPES: dict[str, tuple[int, ...]] = {
    "param/g.blocks.0.weight": (16, 12),
    "param/g.scale": (),
    "exp_avg/g.blocks.0.weight": (16, 12),
    "exp_avg_sq/g.empty": (0, 3),
    "ema/f.bias": (7,),
    "ema/f.weight": (3, 1, 61),
}


def state(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def blank() -> dict[str, torch.Tensor]:
    return {name: torch.full(shape, float("nan")) for name, shape in SHAPES.items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def save(directory: Path, samples: int, tensors: dict[str, torch.Tensor] | None = None) -> Path:
    return checkpoint.save(directory, samples, whole_ranges(tensors or state()), META)


def loaded(path: Path) -> dict[str, torch.Tensor]:
    tensors = blank()
    checkpoint.load(path, whole_ranges(tensors))
    return tensors


def uneven_ranges(tensors: dict[str, torch.Tensor], rank: int) -> dict[str, FlatRange]:
    """Each tensor cut for two ranks at another place, some of them at an end."""
    ranges = {}
    for i, (name, tensor) in enumerate(tensors.items()):
        cut = min(tensor.numel(), [5, 1, 190, 0, 0, 131][i])
        start, stop = [(0, cut), (cut, tensor.numel())][rank]
        ranges[name] = FlatRange(tensor.view(-1)[start:stop], tuple(tensor.shape), start)
    return ranges


def flip_a_byte(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


@contextmanager
def small_disk(limit: int = 256):
    """No file can grow beyond the limit: a real failure to write."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# One process


def test_round_trip_is_exact_and_carries_meta(tmp_path):
    path = save(tmp_path / "new" / "checkpoints", 1234)
    assert path == tmp_path / "new" / "checkpoints" / "step_000000001234"
    tensors = blank()
    meta = checkpoint.load(path, whole_ranges(tensors))
    assert same(tensors, state())
    assert abs(meta.pop("time") - time.time()) < 60
    assert meta == {**META, "samples": 1234, "world_size": 1}
    assert checkpoint.find_problems(path) == []
    assert sorted(p.name for p in path.iterdir()) == ["manifest.json", "rank_00000.safetensors"]


def test_every_bit_pattern_survives(tmp_path):
    bits = torch.tensor([0, 1, 0x7F800000, 0x7FC00001, -(2**31), 0x00800000, 0x7F7FFFFF], dtype=torch.int32)
    path = save(tmp_path, 1, {"w": bits.view(torch.float32)})
    target = torch.zeros(7)
    checkpoint.load(path, whole_ranges({"w": target}))
    assert torch.equal(target.view(torch.int32), bits)


def test_load_fills_parameters_in_place(tmp_path):
    layer = torch.nn.Linear(4, 3)
    path = save(tmp_path, 1, {"w": layer.weight.data.clone()})
    expected, address = layer.weight.detach().clone(), layer.weight.data_ptr()
    torch.nn.init.zeros_(layer.weight)
    checkpoint.load(path, whole_ranges({"w": layer.weight}))
    assert layer.weight.data_ptr() == address
    assert torch.equal(layer.weight, expected)


def test_a_part_of_a_tensor_can_be_loaded(tmp_path):
    path = save(tmp_path, 1, {"w": torch.arange(30.0).view(5, 6), "v": torch.ones(2)})
    part = FlatRange(torch.zeros(7), (5, 6), 11)
    checkpoint.load(path, {"w": part, "v": FlatRange(torch.zeros(0), (2,))})
    assert part.data.tolist() == list(range(11, 18))


def test_meta_of_every_json_kind_is_kept(tmp_path):
    meta = {"best": {10: 0.5, 9: 0.25}, "lr": 1e-4, "stages": ("a", "b"), "name": "σ \u2028"}
    path = checkpoint.save(tmp_path, 1, whole_ranges(state()), meta)
    assert checkpoint.find_problems(path) == []
    assert checkpoint.read_manifest(path)["meta"]["best"] == {"10": 0.5, "9": 0.25}


def test_saving_again_replaces_what_is_there(tmp_path):
    save(tmp_path, 8, state(0))
    path = save(tmp_path, 8, state(1))
    assert same(loaded(path), state(1))
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torchs_own_reader_reads_the_files(tmp_path):
    path = save(tmp_path, 1)
    flat = {name: torch.zeros(tensor.numel()) for name, tensor in state().items() if tensor.numel()}
    dcp.load(flat, storage_reader=dcp.HuggingFaceStorageReader(str(path)))
    assert all(torch.equal(flat[name], state()[name].view(-1)) for name in flat)


def test_a_checkpoint_holds_no_pickle(tmp_path):
    for file in save(tmp_path, 1).iterdir():
        assert file.suffix in {".safetensors", ".json"}
        assert not zipfile.is_zipfile(file)
        with pytest.raises(Exception, match=r"opcode|pickle|exhausted|expected"):
            pickletools.dis(file.read_bytes(), out=io.StringIO())


def test_others_may_read_what_the_umask_allows(tmp_path):
    before = os.umask(0o027)
    try:
        path = save(tmp_path, 1)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()} == {0o640}
    assert stat.S_IMODE(path.stat().st_mode) == 0o750


def test_ranges_refuse_what_a_load_could_not_fill():
    matrix = torch.zeros(4, 6)
    with pytest.raises(AssertionError, match="w is not contiguous"):
        whole_ranges({"w": matrix.T})
    with pytest.raises(AssertionError, match="contiguous"):
        FlatRange(matrix[:, 0], (4, 6))
    with pytest.raises(AssertionError, match="float32"):
        FlatRange(torch.zeros(3, dtype=torch.bfloat16), (3,))
    with pytest.raises(AssertionError, match="not within"):
        FlatRange(torch.zeros(3), (4,), start=2)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 1000])
def test_equal_ranges_share_out_every_element_once(world_size):
    tensors = state()
    total = sum(tensor.numel() for tensor in tensors.values())
    seen = {name: torch.zeros(tensor.numel()) for name, tensor in tensors.items()}
    for rank in range(world_size):
        ranges = equal_ranges(tensors, rank=rank, world_size=world_size)
        assert ranges.keys() == tensors.keys()
        assert abs(sum(len(part.data) for part in ranges.values()) - total / world_size) < 1
        for name, part in ranges.items():
            seen[name][part.start : part.stop] += 1
            assert torch.equal(part.data, tensors[name].view(-1)[part.start : part.stop])
    assert all((count == 1).all() for count in seen.values())


# What does not fit


def test_load_names_every_tensor_that_does_not_fit(tmp_path):
    path = save(tmp_path, 1)
    wanted = {"param/new": torch.zeros(2), **blank()}
    del wanted["ema/f.bias"]
    wanted["param/g.blocks.0.weight"] = torch.zeros(12, 16)
    with pytest.raises(ValueError, match="cannot be loaded") as error:
        checkpoint.load(path, whole_ranges(wanted))
    assert "it has no param/new" in str(error.value)
    assert "it has ema/f.bias, which this run does not have" in str(error.value)
    assert "its param/g.blocks.0.weight has shape (16, 12), not (12, 16)" in str(error.value)
    assert "\n" not in str(error.value)
    assert wanted["ema/f.weight"].isnan().all()


def test_many_misfits_are_told_shortly(tmp_path):
    path = save(tmp_path, 1)
    with pytest.raises(ValueError, match=r"no w0; .*no w4; and 101 more$"):
        checkpoint.load(path, whole_ranges({f"w{i}": torch.zeros(1) for i in range(100)}))


def test_a_path_that_is_no_checkpoint_is_told(tmp_path):
    with pytest.raises(ValueError, match=r"not a checkpoint: it has no manifest\.json"):
        checkpoint.load(tmp_path / "nothing", whole_ranges(blank()))


def test_the_ends_of_ranges_tell_whether_they_cover_every_element_once():
    chosen = random.Random(0)
    for _ in range(300):
        sizes = {f"w{number}": chosen.randrange(6) for number in range(chosen.randrange(1, 4))}
        cuts = [
            (name, first, last)
            for name, size in sizes.items()
            for first, last in itertools.pairwise(sorted({0, size, *(chosen.randrange(size + 1) for _ in range(2))}))
        ]
        for _ in range(chosen.randrange(3)):
            name, size = chosen.choice(list(sizes.items()))
            first, last = sorted(chosen.randrange(size + 1) for _ in range(2))
            if (name, first, last) in cuts and chosen.random() < 0.7:
                cuts.remove((name, first, last))
            else:
                cuts.append((name, first, last))
        counts = Counter((name, place) for name, first, last in cuts for place in range(first, last))
        once = counts == Counter((name, place) for name, size in sizes.items() for place in range(size))
        whole = cover.ends((name, 0, size) for name, size in sizes.items())
        chosen.shuffle(cuts)
        of_ranks = [cover.ends(cuts[rank::3]) for rank in range(3)]
        assert once == ((sum(of_ranks) - whole) % 2**64 == 0)


def test_ranges_with_a_gap_are_not_saved(tmp_path):
    ranges = whole_ranges(state()) | {"ema/f.bias": FlatRange(torch.zeros(6), (7,), start=1)}
    with pytest.raises(ValueError, match=r"ema/f\.bias have a gap or an overlap at 0"):
        checkpoint.save(tmp_path, 1, ranges, META)
    ranges["ema/f.bias"] = FlatRange(torch.zeros(6), (7,))
    with pytest.raises(ValueError, match="at 6"):
        checkpoint.save(tmp_path, 1, ranges, META)
    assert list(tmp_path.iterdir()) == []


# Damage


def ways_to_damage(path: Path) -> dict[str, Callable[[], object]]:
    tensors = path / "rank_00000.safetensors"
    return {
        "wrong checksum": lambda: flip_a_byte(tensors, -1),
        "bytes, not": lambda: tensors.write_bytes(tensors.read_bytes()[:-1]),
        "is missing": tensors.unlink,
        "no manifest.json": (path / "manifest.json").unlink,
        "manifest.json is damaged": lambda: (path / "manifest.json").write_text("{"),
        "its checksum is wrong": lambda: (path / "manifest.json").write_text(
            (path / "manifest.json").read_text().replace("c0ffee", "c0ffef")
        ),
        "not in the manifest": lambda: save_file({"w": torch.zeros(1)}, path / "rank_00001.safetensors"),
    }


@pytest.mark.parametrize("problem", ways_to_damage(Path()))
def test_a_damaged_checkpoint_is_passed_over_loudly(tmp_path, caplog, problem):
    older, newer = save(tmp_path, 8, state(0)), save(tmp_path, 16, state(1))
    assert checkpoint.newest_on_all_ranks(tmp_path) == newer
    assert not caplog.records
    ways_to_damage(newer)[problem]()
    assert len(checkpoint.find_problems(newer)) == 1
    assert problem in checkpoint.find_problems(newer)[0]
    assert checkpoint.newest_on_all_ranks(tmp_path) == older
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert newer.name in caplog.text
    assert problem in caplog.text
    assert same(loaded(older), state(0))


def test_a_flipped_byte_anywhere_in_the_tensors_is_found(tmp_path):
    path = save(tmp_path, 8)
    file = path / "rank_00000.safetensors"
    for position in range(0, file.stat().st_size, 97):
        flip_a_byte(file, position)
        assert checkpoint.find_problems(path), position
        flip_a_byte(file, position)
    assert checkpoint.find_problems(path) == []


def test_a_newer_format_is_refused(tmp_path, monkeypatch):
    path = save(tmp_path, 8)
    monkeypatch.setattr(manifest, "CHECKPOINT_FORMAT", 2)
    with pytest.raises(ValueError, match="has format 1, but this version of the program reads 2"):
        checkpoint.read_manifest(path)


def test_no_checkpoint_gives_none(tmp_path):
    assert checkpoint.newest_on_all_ranks(tmp_path / "not there") is None
    assert checkpoint.newest_on_all_ranks(tmp_path) is None
    (tmp_path / "step_latest").mkdir()
    (tmp_path / "tmp_step_000000000008_0badcafe").mkdir()
    assert checkpoint.newest_on_all_ranks(tmp_path) is None


def test_a_save_deletes_what_a_killed_one_left_and_nothing_else(tmp_path):
    for name in ("tmp_step_000000000008_0badcafe", "tmp_old_step_1000000000000_0badcafe"):
        (tmp_path / name).mkdir()
    kept = {"tmp_best_so_far", "tmp_step_000000000008", "tmp_step_000000000008_0badcafe_mine"}
    for name in kept:
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes.txt").write_text("mine")
    save(tmp_path, 8)
    assert {path.name for path in tmp_path.iterdir()} == {"step_000000000008", *kept}
    assert all((tmp_path / name / "notes.txt").is_file() for name in kept)


def test_checkpoints_are_ordered_by_samples_not_by_letters(tmp_path):
    for samples in (9, 10**12, 10, 999_999_999_999):
        save(tmp_path, samples)
    order = [checkpoint.samples_of(path) for path in checkpoint.checkpoints(tmp_path)]
    assert order == [9, 10, 999_999_999_999, 10**12]


# Failing and dying writers


@pytest.mark.parametrize("samples", [8, 16])
def test_a_full_disk_leaves_what_was_there(tmp_path, samples):
    older = save(tmp_path, 8, state(0))
    with small_disk(), pytest.raises(OSError, match=r"^could not save .*: rank 0: .*untouched$") as error:
        save(tmp_path, samples, state(1))
    assert os.strerror(errno.EFBIG) in str(error.value)
    assert list(tmp_path.iterdir()) == [older]
    assert same(loaded(older), state(0))


def test_meta_that_is_not_json_fails_like_any_write(tmp_path):
    with pytest.raises(OSError, match="not JSON serializable"):
        checkpoint.save(tmp_path, 8, whole_ranges(state()), {"device": torch.device("cpu")})
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="could not save"):
        save(tmp_path / "file" / "checkpoints", 8)


@pytest.mark.parametrize(
    ("function", "left"),
    [
        ("write_safetensors", []),
        ("_commit", ["rank_00000.safetensors"]),
        ("sync", ["manifest.json", "rank_00000.safetensors"]),
    ],
)
def test_a_kill_at_any_point_leaves_the_older_checkpoint(tmp_path, monkeypatch, function, left):
    older = save(tmp_path, 8, state(0))
    child = os.fork()
    if child == 0:
        try:
            monkeypatch.setattr(checkpoint, function, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
            save(tmp_path, 16, state(1))
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    [leftover] = tmp_path.glob("tmp_*")
    assert sorted(file.name for file in leftover.iterdir()) == left
    assert checkpoint.newest_on_all_ranks(tmp_path) == older
    newer = save(tmp_path, 24, state(2))
    assert sorted(tmp_path.iterdir()) == [older, newer]


# Pruning


def test_damaged_checkpoints_neither_count_nor_are_lost(tmp_path):
    sound = save(tmp_path, 8, state(0))
    for samples in (64, 96):
        [file] = save(tmp_path, samples, state(1)).glob("*.safetensors")
        file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert checkpoint.newest_on_all_ranks(tmp_path) == sound
    save(tmp_path, 16, state(2))
    checkpoint.prune(tmp_path, last=2)
    assert [checkpoint.samples_of(path) for path in checkpoint.checkpoints(tmp_path)] == [8, 16]
    assert len(list(tmp_path.glob("damaged_step_*"))) == 2


def pruned(directory: Path, saved: list[int], losses: dict[int, float] | None = None, **rule) -> list[int]:
    """What stays when each is saved in turn, with its loss where it has one, and the rule is applied after each."""
    for samples in saved:
        loss = (losses or {}).get(samples)
        meta = META if loss is None else META | {"held_out_loss": loss}
        checkpoint.save(directory, samples, whole_ranges({"w": torch.zeros(1)}), meta)
        checkpoint.prune(directory, **rule)
    return [checkpoint.samples_of(path) for path in checkpoint.checkpoints(directory)]


def test_prune_keeps_the_last_the_best_and_every_nth(tmp_path):
    steps = list(range(10, 130, 10))
    assert pruned(tmp_path / "last", steps, last=2) == [110, 120]
    assert pruned(tmp_path / "every", steps, last=2, every=40) == [40, 80, 110, 120]
    losses = {30: 0.1, 70: 0.2, 40: 0.3}
    assert pruned(tmp_path / "best", steps, losses, last=1, best=2) == [30, 70, 120]
    assert {p.name[:5] for p in (tmp_path / "every").iterdir()} == {"step_"}


def test_every_nth_needs_no_save_at_the_very_multiple(tmp_path):
    assert pruned(tmp_path, [64, 96, 128, 192, 224, 256, 320], last=1, every=100) == [128, 224, 320]


def test_prune_tells_what_it_deleted_and_never_deletes_the_last(tmp_path):
    paths = [save(tmp_path, samples, {"w": torch.zeros(1)}) for samples in (1, 2, 3)]
    assert checkpoint.prune(tmp_path, last=2) == paths[:1]
    assert checkpoint.prune(tmp_path, last=2) == []
    with pytest.raises(ValueError, match="at least the last"):
        checkpoint.prune(tmp_path, last=0)


# Two ranks, which go through all their cases in one start


def message_of(function, *args) -> str:
    """The kind and text of the error that the call raises."""
    try:
        function(*args)
    except (OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def two_ranks(rank: int, root: str) -> None:
    torch.set_num_threads(1)
    writers.LEAST_BYTES = 1  # so that each rank writes a file
    directory = Path(root)
    dist.init_process_group("gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=2)
    results: dict[str, object] = {}
    equal = equal_ranges(state(), rank=rank, world_size=2)

    checkpoint.save(directory / "equal", 8, equal, {**META, "rank": rank})
    checkpoint.save(directory / "uneven", 8, uneven_ranges(state(), rank), META)

    for name in ("one", "equal", "uneven"):
        whole, parts = blank(), blank()
        results[f"meta of {name}"] = checkpoint.load(directory / name / "step_000000000008", whole_ranges(whole))
        checkpoint.load(directory / name / "step_000000000008", uneven_ranges(parts, rank))
        results[f"whole of {name}"] = same(whole, state())
        untouched = uneven_ranges(parts, 1 - rank).values()
        results[f"parts of {name}"] = all(
            torch.equal(part.data, expected.data)
            for part, expected in zip(
                uneven_ranges(parts, rank).values(), uneven_ranges(state(), rank).values(), strict=True
            )
        ) and all(part.data.isnan().all() for part in untouched)

    with small_disk(256 if rank == 1 else resource.RLIM_INFINITY):
        results["full disk"] = message_of(checkpoint.save, directory / "equal", 16, equal, META)
    results["latest"] = str(checkpoint.newest_on_all_ranks(directory / "equal"))
    results["latest of damaged"] = str(checkpoint.newest_on_all_ranks(directory / "damaged"))

    misfit = whole_ranges(blank()) | ({"param/new": FlatRange(torch.zeros(1), (1,))} if rank == 1 else {})
    results["misfit"] = message_of(checkpoint.load, directory / "equal" / "step_000000000008", misfit)
    overlap = equal | {"ema/f.bias": FlatRange(torch.zeros(4), (7,), start=3 * rank)}
    results["overlap"] = message_of(checkpoint.save, directory / "bad", 8, overlap, META)
    unknown = {name: part for name, part in equal.items() if rank == 0 or name != "ema/f.bias"}
    results["unknown"] = message_of(checkpoint.save, directory / "bad", 8, unknown, META)

    checkpoint.save(directory / "equal", 24, equal, META)
    for pruning in (1, 0):
        if rank == pruning:
            results["pruned"] = [str(path) for path in checkpoint.prune(directory / "equal", last=1)]
        dist.barrier()
    (directory / f"results_{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> tuple[Path, list[dict]]:
    directory = tmp_path_factory.mktemp("two_ranks")
    save(directory / "one", 8)
    save(directory / "damaged", 8)
    flip_a_byte(save(directory / "damaged", 16) / "rank_00000.safetensors", -1)
    torch.multiprocessing.spawn(two_ranks, args=(str(directory),), nprocs=2)
    return directory, [json.loads((directory / f"results_{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("how", ["one", "equal", "uneven"])
def test_two_ranks_load_what_one_or_two_saved(ranks, how):
    for results in ranks[1]:
        assert results[f"whole of {how}"]
        assert results[f"parts of {how}"]
        assert results[f"meta of {how}"]["world_size"] == (1 if how == "one" else 2)
        assert results[f"meta of {how}"].get("rank", 0) == 0


def test_one_process_loads_what_two_ranks_saved(ranks):
    path = ranks[0] / "uneven" / "step_000000000008"
    assert same(loaded(path), state())
    assert checkpoint.find_problems(path) == []
    assert len(list(path.glob("*.safetensors"))) == 2


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torchs_own_reader_puts_two_ranks_files_together(ranks):
    flat = {name: torch.zeros(tensor.numel()) for name, tensor in state().items() if tensor.numel()}
    dcp.load(flat, storage_reader=dcp.HuggingFaceStorageReader(str(ranks[0] / "uneven" / "step_000000000008")))
    assert all(torch.equal(flat[name], state()[name].view(-1)) for name in flat)


def test_two_ranks_share_the_writing(ranks):
    sizes = [file.stat().st_size for file in (ranks[0] / "uneven").glob("*/*.safetensors")]
    assert min(sizes) > 0.3 * max(sizes)


def test_every_rank_tells_that_one_had_no_space(ranks):
    directory, (first, second) = ranks
    assert first["full disk"] == second["full disk"]
    assert first["full disk"].startswith("OSError: could not save")
    assert "rank 1: " in first["full disk"]
    assert "rank 0: " not in first["full disk"]
    assert first["latest"] == second["latest"] == str(directory / "equal" / "step_000000000008")


def test_every_rank_passes_over_the_same_damaged_checkpoint(ranks):
    directory, results = ranks
    assert {result["latest of damaged"] for result in results} == {str(directory / "damaged" / "step_000000000008")}


def test_what_one_rank_finds_wrong_every_rank_tells(ranks):
    directory, (first, second) = ranks
    for case, told in {
        "misfit": "it has no param/new",
        "overlap": "ema/f.bias have a gap or an overlap at 3",
        "unknown": "ema/f.bias is not on every rank",
    }.items():
        assert first[case] == second[case]
        assert first[case].startswith("ValueError: ")
        assert told in first[case]
    assert not (directory / "bad").exists()


def test_rank_0_alone_prunes(ranks):
    directory, (first, second) = ranks
    assert first["pruned"] == [str(directory / "equal" / "step_000000000008")]
    assert second["pruned"] == []
    assert [p.name for p in (directory / "equal").iterdir()] == ["step_000000000024"]


def test_the_reader_in_the_docs_reads_what_two_ranks_saved(ranks):
    page = (Path(__file__).parents[3] / "docs/checkpoints.md").read_text()
    code: dict = {}
    exec(page.split("```python")[1].split("```")[0], code)
    assert same(code["read"](ranks[0] / "uneven" / "step_000000000008"), state())
