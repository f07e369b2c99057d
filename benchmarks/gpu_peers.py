"""The section of `gpu.py` that trains the same modules by the loops that people write, beside the product's own.

Both peers compute the same loss with the same g, f and D, whose LoRA is computed by PEFT's own layers, and draw noise
by `torch.randn`. What the product does inside D, such as one rotary table a pass, helps them, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from gpu_cases import Case, Row, Setting
from gpu_training import STAGE, TEXT, alternating, random_task, recipe, sizes_of_dit, take_step, training
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn

from trainer.objectives import LatentDenoiser
from trainer.recipes.schema import Config

Step = Callable[[], None]


def cases(setting: Setting) -> Mapping[str, Case]:
    """Return a case for each peer and number of clips."""
    found: dict[str, Case] = {}
    for clips in (2,) if setting.small else (32, 8):
        for peer, make in {"diffusers-style": diffusers_style, "Lightning-style": lightning_style}.items():
            name = f"{peer}, {clips} clips"
            found[name] = partial(_compare, name=name, clips=clips, make=make, setting=setting)
    return found


def _compare(row: Row, name: str, clips: int, make: Callable[[PeerModule, Batches], Step], setting: Setting) -> None:
    """Let the product's loop, compiled as by default and eager, and the peer take turns."""
    batch = (f"{STAGE}.global_batch={clips}", "parallel.precision=bf16", *TEXT[False])
    for variant in ("compiled", "eager"):
        chosen = f"parallel.compile={'true' if variant == 'compiled' else 'false'}"
        config = recipe(setting, f"{name} {variant}", *batch, chosen)
        rounds, count = (1, 2) if setting.small else (3, 6)
        with training(setting, config) as prepared:
            peer = make(PeerModule(config, setting), Batches(config, clips, setting))
            steps = {"ours": lambda prepared=prepared: take_step(prepared), "peer": peer}
            seconds = alternating(steps, setting.device, rounds=rounds, count=count)
        figures = {f"{who}, ms a step": 1000 * value for who, value in seconds.items()}
        row(f"{name}, ours {variant}", **figures, **{"peer / ours": seconds["peer"] / seconds["ours"]})


class PeerModule(nn.Module):
    """g, f and D with PEFT's layers; maps x0 (b, C, T) to the mean loss ()."""

    def __init__(self, config: Config, setting: Setting) -> None:
        super().__init__()
        task = random_task(config, STAGE, torch.device(setting.device), sizes_of_dit(setting))
        assert isinstance(task.module, LatentDenoiser)
        self.g, self.f, self.dit, self.diffusion = task.module.g, task.module.f, task.module.dit, task.module.diffusion
        self.dropout = config.stage(STAGE).condition_dropout
        use_pefts_layers(self)

    def forward(self, x0_BCT: Tensor) -> Tensor:
        kept_B = torch.rand(len(x0_BCT), device=x0_BCT.device) >= self.dropout
        condition = self.f(self.g(x0_BCT)) * kept_B[:, None, None]
        t_B = self.diffusion.noise_level(torch.rand(len(x0_BCT), device=x0_BCT.device))
        noise_BCT = torch.randn_like(x0_BCT)
        prediction = self.diffusion.prediction(lambda x, t: self.dit(x, t, condition=condition), x0_BCT, noise_BCT, t_B)
        return prediction.squared_error().mean()


class Batches:
    """Batches in pageable host memory, as a plain DataLoader gives them; they are moved by the loop."""

    def __init__(self, config: Config, clips: int, setting: Setting) -> None:
        shape = (clips, sizes_of_dit(setting).channels, config.stage(STAGE).crop_frames)
        self.x0_BCT, self.device = torch.randn(shape), setting.device
        self.lr, self.clip_norm = config.stage(STAGE).lr, config.stage(STAGE).clip_norm or 1.0

    def next(self) -> Tensor:
        return self.x0_BCT.to(self.device)


def use_pefts_layers(module: nn.Module) -> int:
    """Have PEFT compute the LoRA in the way of its own layers; return the number of layers."""
    layers = [layer for layer in module.modules() if isinstance(layer, PeftLinear)]
    for layer in layers:
        layer.__class__ = PeftLinear
    return len(layers)


def diffusers_style(module: PeerModule, batches: Batches) -> Step:
    """Train as the LoRA scripts of diffusers do: Accelerate in bf16, a frozen base in bf16, and the loss read back."""
    AcceleratorState._reset_state()  # the product's own one has no mixed precision
    accelerator = Accelerator(mixed_precision="bf16", cpu=batches.device == "cpu")
    for parameter in module.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    learned = [value for value in module.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=batches.lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    model, optimizer, schedule = accelerator.prepare(module, optimizer, schedule)
    losses: list[float] = []

    def step() -> None:
        with accelerator.accumulate(model):
            loss = model(batches.next())
            losses.append(accelerator.gather(loss.detach().repeat(1)).mean().item())
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(learned, batches.clip_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        losses.append(loss.detach().item())

    return step


def lightning_style(module: PeerModule, batches: Batches) -> Step:
    """Train as Lightning does with `bf16-mixed`: all weights in float32, autocast, and the loss in the progress bar."""
    learned = [value for value in module.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=batches.lr)
    shown: list[float] = []

    def step() -> None:
        x0_BCT = batches.next()
        optimizer.zero_grad()
        with torch.autocast(batches.device, dtype=torch.bfloat16):
            loss = module(x0_BCT)
        loss.backward()
        nn.utils.clip_grad_norm_(learned, batches.clip_norm)
        optimizer.step()
        shown.append(loss.item())

    return step
