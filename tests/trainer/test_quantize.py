"""The quantizer as a stage: learned by the one loop, from clips at other gains."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from models.codec import SPresso
from models.quantizers.qinco2 import QINCo2
from tests.trainer import rank_processes
from tests.trainer.test_loop import losses, stop_after, tensors
from trainer import code_tasks
from trainer.data.shard_set import open_set
from trainer.inputs import Inputs
from trainer.loop import train
from trainer.recipes.reading import load_recipe
from trainer.run_directory import RunDirectory
from trainer.tasks import make_task

QINCO2 = (
    *("quantizer.kind=qinco2", "quantizer.candidates=8", "quantizer.depth=1", "quantizer.embedding=16"),
    *("quantizer.hidden=32", "quantizer.gain_db=6", "quantize.samples=96", "quantize.lr=3e-3", "quantize.warmup=0"),
    *("log.every=8", "log.samples_every=0", "checkpoint.every=32"),
)


@pytest.fixture(scope="module")
def autoencoded(prepared, tmp_path_factory) -> Path:
    """A run whose step 1 has ended."""
    folder = tmp_path_factory.mktemp("autoencoded") / "run"
    config = load_recipe("tiny", [*places(folder, prepared), "pretrain.samples=8", "autoencode.samples=8"])
    for stage in ("pretrain", "autoencode"):
        assert train(config, stage) == "done"
    return folder


def places(run_dir: Path | str, prepared: Path | str) -> list[str]:
    paths = [f"run_dir={run_dir}", f"data.latents={prepared}/latents", f"data.audio={prepared}/audio"]
    return [*paths, "parallel.threads=1", "parallel.device=cpu"]


@pytest.fixture
def start(autoencoded, prepared, tmp_path):
    def make(*overrides: str, name: str = "run"):
        shutil.copytree(autoencoded, tmp_path / name)
        return load_recipe("tiny", [*places(tmp_path / name, prepared), *QINCO2, *overrides])

    return make


@pytest.fixture(scope="module")
def whole(autoencoded, prepared, tmp_path_factory) -> Path:
    """A stage that nothing interrupted, on one rank."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    shutil.copytree(autoencoded, folder)
    assert train(load_recipe("tiny", [*places(folder, prepared), *QINCO2]), "quantize") == "done"
    return folder


def learn(rank: int, run_dir: str, prepared: str, *overrides: str) -> None:
    assert train(load_recipe("tiny", [*places(run_dir, prepared), *QINCO2, *overrides]), "quantize") == "done"


def test_it_learns_and_is_exported(whole, start, prepared):
    """The k-means that it starts from has a larger error of z."""
    assert len(losses(whole, "quantize")) == 12
    codecs = []
    for samples in (0, 960):
        config = start(f"quantize.samples={samples}", name=f"run_{samples}")
        assert train(config, "quantize") == "done"
        codecs.append(SPresso.from_pretrained(Path(config.run_dir) / "quantize/export"))
    exported, shards = codecs[1].quantizer, open_set(str(prepared / "latents/train"))
    x0 = torch.stack([torch.from_numpy(each[:, :99]).float() for each in shards.latents(range(64))])
    z = codecs[1].g(x0).transpose(1, 2)
    errors = [(codec.quantizer.decode(codec.quantizer.encode(z)) - z).square().mean() for codec in codecs]
    assert errors[1] < 0.99 * errors[0]
    assert exported.kind == "qinco2"
    assert all(step.outward.weight.abs().max() > 0 for step in exported.steps)  # they start at zero


@pytest.mark.parametrize("strategy", ["ddp", "zero3", "fsdp2"])
def test_any_strategy_on_two_ranks_learns_the_same(whole, start, prepared, strategy):
    run_dir = start().run_dir
    overrides = (f"parallel.strategy={strategy}", "parallel.processes=2")
    assert rank_processes.run(learn, 2, str(run_dir), str(prepared), *overrides) == [0, 0]
    expected, found = losses(whole, "quantize"), losses(Path(run_dir), "quantize")
    assert found.keys() == expected.keys()
    # two codes may be as near as rounding can tell: then one rank's sum decides
    assert list(found.values()) == pytest.approx(list(expected.values()), rel=1e-3)


def test_it_resumes_exactly(whole, start):
    config = start()
    assert train(config, "quantize", stop=stop_after(5)) == "stopped"
    assert train(config, "quantize") == "done"
    last = "quantize/checkpoints/step_000000000096"
    expected, found = tensors(whole / last), tensors(Path(config.run_dir) / last)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_without_steps_it_is_the_fit_alone(start):
    config = start("quantize.samples=0")
    assert train(config, "quantize") == "done"
    quantizer = SPresso.from_pretrained(Path(config.run_dir) / "quantize/export").quantizer
    assert all(step.outward.weight.abs().max() == 0 for step in quantizer.steps)
    assert torch.equal(quantizer.preselection, quantizer.codebooks[1:])


def test_idle_codewords_have_work_once_it_ends(start, monkeypatch):
    fit = QINCo2.fit

    def spoiled(self, vectors, *, seed, progress):
        fit(self, vectors, seed=seed, progress=progress)
        with torch.no_grad():
            self.codebooks[1, 3:6] = self.preselection[0, 3:6] = 100.0

    monkeypatch.setattr(QINCo2, "fit", spoiled)
    config = start("quantize.samples=0")
    assert train(config, "quantize") == "done"
    quantizer = SPresso.from_pretrained(Path(config.run_dir) / "quantize" / "export").quantizer
    assert quantizer.codebooks.abs().max() < 50
    assert quantizer.preselection.abs().max() < 50


def test_the_k_means_and_the_search_for_idle_codewords_show_how_far_they_are(start, monkeypatch):
    told, write_status = [], RunDirectory.write_status

    def noted(self, state, **facts):
        told.append(facts.get("doing"))
        write_status(self, state, **facts)

    monkeypatch.setattr(RunDirectory, "write_status", noted)
    config = start("quantize.samples=0")
    assert train(config, "quantize") == "done"
    assert told[:4] == [f"k-means, codebooks: {book} of 4" for book in (1, 2, 3, 4)]
    assert told[4] == "searches for idle codewords: 1 of 9"
    assert told[-1] is None
    assert "doing" not in RunDirectory(Path(config.run_dir) / "quantize", "quantize").status


@pytest.mark.parametrize(("rank", "warned"), [(3, True), (4, False)])
def test_a_z_of_few_directions_is_warned_of(start, monkeypatch, rank, warned):
    monkeypatch.setattr(code_tasks, "effective_rank", lambda covariance_ZZ: rank)  # of 16 channels
    config = start("quantize.samples=0")
    assert train(config, "quantize") == "done"
    folder = Path(config.run_dir) / "quantize"
    warnings = RunDirectory(folder, "quantize").status.get("warnings", [])
    assert [line.partition(" directions")[0] for line in warnings] == (
        ["quantize: 99 % of the variance of z lies in 3"] if warned else []
    )
    assert ("latent_encoder.z_channels" in (folder / "logs/rank_0.log").read_text()) == warned


def test_fsq_needs_no_fit(start):
    config = start("quantizer.kind=fsq", "quantizer.books=4", "quantizer.size=16", "quantize.samples=32")
    assert train(config, "quantize") == "done"
    assert SPresso.from_pretrained(Path(config.run_dir) / "quantize/export").quantizer.kind == "fsq"


def test_a_clip_is_heard_at_the_gain_that_its_key_draws(start):
    module = make_task(start(), "quantize").module
    x0_BCT = 0.5 * torch.randn(8, 128, 63, generator=torch.Generator().manual_seed(0))
    positions_B = torch.arange(8)
    heard = module.at_drawn_gain(Inputs(x0=x0_BCT, positions=positions_B))
    last = Inputs(x0=x0_BCT[5:], positions=positions_B[5:])
    assert torch.equal(module.at_drawn_gain(last.to(x0_BCT.device, module.draws(last.positions))), heard[5:])
    (autoencoder,) = module.frozen

    def level_db(x0: torch.Tensor) -> torch.Tensor:
        return 10 * autoencoder.decode(x0).square().mean((1, 2)).log10()

    gains_db = level_db(heard) - level_db(x0_BCT)
    assert gains_db.abs().max() < 6.5
    assert gains_db.max() > 2
    assert gains_db.min() < -2


def test_without_other_gains_x0_is_left_alone(start):
    inputs = Inputs(x0=torch.randn(2, 128, 63), positions=torch.arange(2))
    assert make_task(start("quantizer.gain_db=0"), "quantize").module.at_drawn_gain(inputs) is inputs.x0
