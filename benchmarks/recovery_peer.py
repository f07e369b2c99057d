"""The peer that `recovery.py` compares with: an Accelerate training loop that submitit checkpoints and requeues."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

GLOBAL_BATCH, LR, EVERY = 16, 1e-3, 50
SIZE = ("dit.width=384", "dit.depth=4", "dit.hidden_width=1536", "latent_encoder.width=256", "lora.rank=16")
RECIPE = (
    *SIZE,
    f"autoencode.global_batch={GLOBAL_BATCH}",
    "autoencode.samples=100000000",
    f"log.every={GLOBAL_BATCH}",
    "log.samples_every=0",
    f"checkpoint.every={GLOBAL_BATCH * EVERY}",
)


class Loop:
    """The job that submitit pickles, calls, and asks for a checkpoint when SLURM signals it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.state = folder, folder / "peer" / "state"

    def __call__(self) -> None:
        import submitit

        submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False)
        import torch
        from accelerate import Accelerator
        from subject import LossOnly, batches, recipe, task_of

        torch.set_num_threads(1)
        self.accelerator = accelerator = Accelerator(cpu=True)
        task = task_of(recipe(self.folder, *RECIPE))
        trained = [value for value in task.module.parameters() if value.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=LR, fused=True)
        model, optimizer = accelerator.prepare(LossOnly(task.module), optimizer)
        self.step = 0
        if (self.state / "step.json").exists():
            accelerator.load_state(str(self.state))
            self.step = json.loads((self.state / "step.json").read_text())
        ranks, rank = accelerator.num_processes, accelerator.process_index
        for x0_BCT, positions_B in batches(GLOBAL_BATCH, rank, ranks, start=self.step * GLOBAL_BATCH):
            loss = model(x0_BCT, positions_B).mean()
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            self.step += 1
            if rank == 0:
                with (self.folder / "peer" / "steps.jsonl").open("a") as file:
                    file.write(json.dumps({"step": self.step, "time": time.time()}) + "\n")
            if self.step % EVERY == 0:
                self.save()

    def save(self) -> None:
        """Save the state of Accelerate and the step number, on the ranks that call this."""
        self.accelerator.save_state(str(self.state))
        (self.state / "step.json").write_text(json.dumps(self.step))

    def checkpoint(self) -> Any:
        """Save and return the job to requeue; submitit's signal handler calls this on rank 0."""
        import submitit

        self.save()
        return submitit.helpers.DelayedSubmission(type(self)(self.folder))
