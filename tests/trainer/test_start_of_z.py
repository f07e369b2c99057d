"""Where z starts: computed from the training set on rank 0, the same for any ranks and strategy, kept by a resume."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from models.codec import SPresso
from tests.trainer import rank_processes
from tests.trainer.test_loop import losses, stop_after, tensors
from trainer.data.stream import Batch
from trainer.loop import train
from trainer.recipes.reading import load_recipe
from trainer.task_models import LoadedModels
from trainer.tasks import make_task

STEPS = ("autoencode.samples=48", "log.every=8", "log.samples_every=0", "checkpoint.every=16")


def places(run_dir: Path | str, prepared: Path | str) -> list[str]:
    paths = [f"run_dir={run_dir}", f"data.latents={prepared}/latents", f"data.audio={prepared}/audio"]
    return [*paths, "parallel.threads=1", "parallel.device=cpu", *STEPS]


@pytest.fixture(scope="module")
def pretrained(prepared, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pretrained") / "run"
    assert train(load_recipe("tiny", [*places(folder, prepared), "pretrain.samples=8"]), "pretrain") == "done"
    return folder


@pytest.fixture(scope="module")
def whole(pretrained, prepared, tmp_path_factory) -> Path:
    """A stage that nothing interrupted, on one rank."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    shutil.copytree(pretrained, folder)
    learn(0, str(folder), str(prepared))
    return folder


def learn(rank: int, run_dir: str, prepared: str, *overrides: str) -> None:
    assert train(load_recipe("tiny", [*places(run_dir, prepared), *overrides]), "autoencode") == "done"


def start_of(run: Path) -> dict[str, torch.Tensor]:
    """Return what z of an exported codec starts from."""
    return dict(SPresso.from_pretrained(run / "autoencode/export").g.start.named_buffers())


@pytest.mark.parametrize(("ranks", "strategy"), [(2, "ddp"), (4, "zero2"), (2, "zero3"), (4, "fsdp2")])
def test_any_ranks_and_strategy_start_and_learn_the_same(whole, pretrained, prepared, tmp_path, ranks, strategy):
    run = tmp_path / "run"
    shutil.copytree(pretrained, run)
    overrides = (f"parallel.strategy={strategy}", f"parallel.processes={ranks}")
    assert rank_processes.run(learn, ranks, str(run), str(prepared), *overrides) == [0] * ranks
    expected, found = start_of(whole), start_of(run)
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    assert expected["directions"].abs().sum(1).min() > 0
    curve, ours = losses(whole, "autoencode"), losses(run, "autoencode")
    assert ours.keys() == curve.keys()
    assert list(ours.values()) == pytest.approx(list(curve.values()), rel=1e-5)


def test_a_stop_in_the_middle_changes_nothing(whole, pretrained, prepared, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(pretrained, run)
    config = load_recipe("tiny", places(run, prepared))
    assert train(config, "autoencode", stop=stop_after(3)) == "stopped"
    assert train(config, "autoencode") == "done"
    last = "autoencode/checkpoints/step_000000000048"
    ours, theirs = tensors(run / last), tensors(whole / last)
    assert ours.keys() == theirs.keys()
    assert "statistics/g.start.directions" in ours
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


@torch.no_grad()
@pytest.mark.parametrize("pooling", [1, 4, 9, 21, 100])
def test_z_uses_all_its_channels_from_the_start(prepared, tmp_path, pooling):
    """Of blocks that vary in many directions: padding is not counted, and f starts with what z holds."""
    sizes = [f"latent_encoder.pooling={pooling}", "latent_encoder.patch_size=1", "dit.patch_size=1"]
    crops = [f"{stage}.crop_frames={2 * pooling}" for stage in ("autoencode", "quantize", "finetune")]
    config = load_recipe("tiny", [*places(tmp_path, prepared), *sizes, *crops, "data.clip_seconds=2.5"])
    task = make_task(config, "autoencode", _WithFreshDit(config))
    task.initialise(iter(()), lambda rows: rows, crops_of(task.codec.config.latent_encoder.latent_channels, pooling))
    x0 = next(crops_of(128, pooling, seed=1)).x0.float()[:, :, :pooling]
    z = torch.cat([task.codec.g(batch.x0.float()[:, :, :pooling])[..., 0] for batch in _some(crops_of(128, pooling))])
    assert z.var(0).min() > 1e-3
    assert z.var(0).mean() == pytest.approx(1, rel=0.35)
    assert task.codec.f.spread(task.codec.g(x0).transpose(1, 2)).var() > 0.01


class _WithFreshDit(LoadedModels):
    """The recipe's models, with a D of its sizes that nobody trained."""

    def pretrained_dit(self):
        return self.fresh_dit()


def crops_of(channels: int, pooling: int, *, seed: int = 0) -> Iterator[Batch]:
    """Yield batches of 32 crops of two blocks, whose second block is padding of huge numbers."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(40, channels, generator=torch.Generator().manual_seed(9)) / 6
    while True:
        slow = torch.randn(32, 40, 1, generator=generator) + 0.3 * torch.randn(32, 40, pooling, generator=generator)
        first = torch.einsum("bkt,kc->bct", slow, mixing)
        mask = (torch.arange(2 * pooling) < pooling).expand(32, -1)
        x0 = torch.cat([first, torch.full_like(first, 1e4)], dim=2).half()
        yield Batch(x0=x0, positions=torch.arange(32), mask=mask, ids=torch.arange(32), sets=torch.zeros(32).long())


def _some(batches: Iterator[Batch]) -> list[Batch]:
    return [next(batches) for _ in range(32)]
