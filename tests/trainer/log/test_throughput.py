"""FLOPs are those of the model's matrix products and attention, and the log says how many there are in a second."""

from __future__ import annotations

import pytest
import torch
from peft.tuners.lora import Linear
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from trainer.inputs import Inputs
from trainer.log import throughput
from trainer.log.metrics import read_metrics
from trainer.log.throughput import Throughput, peak_tflops, sample_flops
from trainer.loop import train
from trainer.memory.outline import OutlinedModels
from trainer.stages import trained_stages
from trainer.tasks import make_task


@pytest.mark.parametrize("stage", ["pretrain", "autoencode"])
def test_they_are_those_that_torch_counts_on_real_tensors(stage, tiny):
    config = tiny()
    task = make_task(config, stage, models=OutlinedModels(config, config.dit))
    for layer in task.module.modules():
        if isinstance(layer, Linear):
            layer.__class__ = Linear  # torch does not count the in-place product of the fused layer
    x0_BCT = torch.randn(1, config.dit.channels, config.stage(stage).crop_frames)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        task.module(Inputs(x0=x0_BCT, positions=torch.arange(1))).total({}).mean().backward()
    assert sample_flops(config, stage) == counter.get_total_flops() > 0


@pytest.mark.parametrize("kind", ["residual", "qinco2"])
def test_every_stage_is_counted(kind, tiny):
    asked = [
        f"{name}.{key}" for name in ("prior", "distill") for key in ("samples=8", "global_batch=8", "crop_frames=63")
    ]
    config = tiny(f"quantizer.kind={kind}", *asked, "distillation.steps=[2,1]")
    counted = {stage: sample_flops(config, stage) for stage in trained_stages()}
    assert min(counted.values()) > 0
    assert counted["autoencode"] > counted["finetune"]  # g is frozen
    assert counted["distill"] > 1.5 * counted["finetune"]  # three steps a sample; f is frozen


def test_the_log_has_them_after_a_while(tiny, tmp_path, monkeypatch):
    brief = ("pretrain.samples=16", "pretrain.global_batch=8", "log.every=8", "log.samples_every=0")

    def lines(folder: str) -> list[dict]:
        train(tiny(*brief, run_dir=tmp_path / folder), "pretrain")
        path = tmp_path / folder / "pretrain/metrics.jsonl"
        return [line for line in read_metrics(path) if line["kind"] == "train"]

    brief_lines = lines("brief")
    assert all("tflops" not in line for line in brief_lines)
    monkeypatch.setattr(throughput, "COUNTED_AFTER", 0.0)
    config, (first, second) = tiny(*brief), lines("long")
    assert [line["loss"] for line in brief_lines] == [first["loss"], second["loss"]]  # to count changes nothing
    assert first["tflops"] == pytest.approx(sample_flops(config, "pretrain") * first["samples_per_second"] / 1e12, 0.01)
    tokens = config.pretrain.crop_frames // config.dit.patch_size
    assert first["tokens_per_second"] == pytest.approx(tokens * first["samples_per_second"], 0.01)
    assert "mfu" not in first  # a CPU's peak is unknown


def test_mfu_is_a_rank_s_share_of_what_its_device_can_do(tiny, monkeypatch):
    monkeypatch.setattr(throughput, "COUNTED_AFTER", 0.0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(throughput, "sample_flops", lambda *_: 10**12)
    speed = Throughput(tiny("parallel.precision=bf16"), "pretrain", ranks=2, device=torch.device("cuda"))
    found = speed.of(800.0)
    assert found["tflops"] == 400
    assert found["mfu"] == pytest.approx(400 / 989, abs=1e-4)


def test_a_base_model_that_is_gone_ends_no_training(tiny, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(throughput, "COUNTED_AFTER", 0.0)
    (tmp_path / "gone").mkdir()
    config = tiny(f"pretrained.folder={tmp_path / 'gone'}")
    (tmp_path / "gone").rmdir()
    speed = Throughput(config, "autoencode", ranks=1, device=torch.device("cpu"))
    assert speed.of(10.0) == {} == speed.of(20.0)
    assert caplog.text.count("no TFLOP") == 1


@pytest.mark.parametrize(
    ("name", "precision", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989),
        ("NVIDIA H200", "fp16", 989),
        ("NVIDIA L40S", "bf16", 362),
        ("NVIDIA L4", "bf16", 121),
        ("NVIDIA A10G", "bf16", 70),
        ("NVIDIA H100 PCIe", "fp32", None),
        ("a card of next year", "bf16", None),
    ],
)
def test_the_peak_is_known_by_the_device_s_name(name, precision, peak):
    assert peak_tflops(name, precision) == peak
