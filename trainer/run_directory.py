"""The run directory of a stage: all there is to know of it, and the guard against mixing two runs in one place."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from yaml import YAMLError

from trainer.data.shard_set import ShardSet, open_set, open_training_set
from trainer.files import file_digest
from trainer.recipes.schema import TRAINED_STAGES, Config, flatten, hash_values, to_yaml

logger = logging.getLogger("spresso")

COPIED_FROM = "COPIED_FROM"
"""Beside code that was set aside for a job: the commit that it was, and its changes."""
_ROOT = Path(__file__).resolve().parents[1]

_RUN = (
    "seed",
    "checkpoint.start_from",
    *(f"data.{key}" for key in ("shuffle", "block", "window_mib", "window", "lanes", "buckets")),
    "autoencoder",
)
_LEARNED = {
    "pretrain": (*_RUN, "dit", "diffusion", "pretrain"),
    "autoencode": (*_RUN, "dit", "diffusion", "pretrained", "latent_encoder", "lora", "autoencode"),
    "quantize": (*_RUN, "latent_encoder", "quantizer", "quantize"),
    "prior": (*_RUN, "quantizer", "prior"),
    "finetune": (*_RUN, "diffusion", "quantizer", "finetune"),
}


def stage_folder(config: Config, stage: str) -> Path:
    """The run directory of a stage."""
    return Path(config.run_dir) / stage


def stage_before(config: Config, stage: str) -> str | None:
    """The trained stage whose export a trained stage builds on; None for the first."""
    stages = [name for name in TRAINED_STAGES if name != "prior" or name in config.stages]
    return stages[stages.index(stage) - 1] if stage != stages[0] else None


def base_model(config: Config) -> Path:
    """Where D's pretrained weights are: the release's folder, or what `pretrain` exported."""
    if config.pretrained.folder is not None:
        return Path(config.pretrained.folder)
    return stage_folder(config, "pretrain") / "export" / "dit.safetensors"


def training_sets(config: Config) -> dict[ShardSet, int]:
    """The sets that a run learns from, with their shares in a batch."""
    folders = config.data.mix or {config.data.latents: 1}
    return {open_training_set(folder, config.data.cache): share for folder, share in folders.items()}


def held_out_set(config: Config) -> ShardSet:
    """The set that no stage learns from."""
    return open_set(f"{config.data.latents.rstrip('/')}/test", config.data.cache)


def stage_inputs(config: Config, stage: str) -> dict[str, str]:
    """Hashes of what a trained stage builds on: the shards, and the export of the stage before.

    Raises:
        ValueError: something of it is not there yet; names the command that makes it.
    """
    sets = [f"{share} × {shard_set.fingerprint}" for shard_set, share in training_sets(config).items()]
    inputs = {"latents": " + ".join(sets)}
    before = stage_before(config, stage)
    if before == "pretrain" and config.pretrained.folder is not None:
        from models.backbones.pretrained import weight_files

        files = weight_files(base_model(config))
        inputs["pretrained"] = hash_values({name: file_digest(path) for name, path in files.items()})
    elif before is not None:
        export = RunDirectory(stage_folder(config, before), before).status.get("export")
        if export is None:
            raise ValueError(f"the stage {stage} builds on {before}, which has not ended yet: run that first")
        inputs[before] = export
    return inputs


class RunDirectory:
    """`config.yaml`, `command.txt`, `environment.txt`, `status.json`, and folders for the rest."""

    def __init__(self, path: Path, stage: str, *, permitted: Callable[[], None] = lambda: None) -> None:
        """`permitted` raises where this process may no longer write, as another start of the run has taken over."""
        self.path, self.stage, self.permitted = path, stage, permitted
        self.checkpoints = path / "checkpoints"
        self.tensorboard = path / "tensorboard"
        self.samples = path / "samples"
        self.export = path / "export"

    def claim(self, config: Config, inputs: dict[str, str]) -> None:
        """Take the directory for this config, or raise where it holds a run of another one.

        Args:
            config: the whole recipe; only what this stage learns from has to agree.
            inputs: what the stage builds on: hashes of shards and of earlier stages.

        Raises:
            ValueError: names what differs, and the mend.
        """
        self.require_same(config, inputs)
        self.permitted()
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path / "inputs.json", json.dumps(inputs, indent=2))
        write_atomically(self.path / "config.yaml", to_yaml(config))
        _append(self.path / "command.txt", " ".join(sys.argv))
        write_atomically(self.path / "environment.txt", environment())

    def identity(self, config: Config, inputs: dict[str, str]) -> str:
        """Hash of all that the stage learns from: settings, and what it builds on. A longer run has the same."""
        return hash_values(self._relevant(config) | inputs)

    def _relevant(self, config: Config | dict[str, Any]) -> dict[str, Any]:
        flat = flatten(config) if isinstance(config, Config) else config
        names = _LEARNED[self.stage]
        # a longer run is the same run
        return {
            key: value
            for key, value in flat.items()
            if key.startswith(tuple(f"{name}." for name in names)) or key in names
            if key != f"{self.stage}.samples"
        }

    def require_same(self, config: Config, inputs: dict[str, str] | None = None) -> None:
        """Raise ValueError where the directory holds a run of another config or, if they are given, of other inputs."""
        if not (self.path / "config.yaml").exists() or not any(self.checkpoints.glob("step_*")):
            return  # nothing learned yet that could be mixed up
        relevant = self._relevant(config)
        if config.checkpoint.start_from is None:
            relevant.pop("checkpoint.start_from")  # the run has begun: with what, needn't be said again
        before = self._relevant(_flatten_dict(self._stored_config()))
        if inputs is not None:
            relevant |= {f"input {name}": value for name, value in inputs.items()}
            before |= {f"input {name}": value for name, value in read_json(self.path / "inputs.json").items()}
        differing = [
            f"{key} ({before.get(key, 'unset')} → {relevant.get(key, 'unset')})"
            for key in sorted(before.keys() | relevant.keys())
            if not (key == "checkpoint.start_from" and key not in relevant)
            if before.get(key) != relevant.get(key)
        ]
        if differing:
            shown = "; ".join(differing[:4]) + (f"; and {len(differing) - 4} more" if len(differing) > 4 else "")
            raise ValueError(
                f"{self.path} holds a run with other settings: {shown}. Take another run_dir=…, or remove {self.path}"
            )

    def _stored_config(self) -> dict[Any, Any]:
        path = self.path / "config.yaml"
        try:
            stored = OmegaConf.to_container(OmegaConf.create(path.read_text("utf-8")))
        except (OSError, ValueError, YAMLError) as error:
            raise ValueError(f"{path} can't be read ({error}): take another run_dir=…, or remove {self.path}") from None
        assert isinstance(stored, dict)
        return stored

    @property
    def status(self) -> dict[str, Any]:
        """What `write_status` wrote last; empty before."""
        return read_json(self.path / "status.json")

    def write_status(self, state: str, **facts: Any) -> None:
        """`state` is running, stopped or done."""
        self.permitted()
        status = {"stage": self.stage, "state": state, "time": datetime.now(UTC).isoformat(timespec="seconds"), **facts}
        write_atomically(self.path / "status.json", json.dumps(status, indent=2))

    def done(self, config: Config) -> bool:
        """Whether this stage ran to the end that the config asks for."""
        status = self.status
        return status.get("state") == "done" and status.get("samples", -1) >= config.stage(self.stage).samples


def read_json(path: Path) -> dict[str, Any]:
    """A small JSON file, or an empty dict where there is none; raises ValueError where it is damaged."""
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): remove it") from None


def write_atomically(path: Path, text: str) -> None:
    """A reader sees the old text or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    making = path.with_name(f".{path.name}.{os.getpid()}")
    making.write_text(text)
    making.replace(path)


def environment() -> str:
    """Python, packages, git commit and uncommitted changes."""
    packages = sorted({f"{item.metadata['Name']}=={item.version}" for item in distributions()}, key=str.lower)
    return "\n".join([f"python {sys.version}", f"commit {code_version()}", *packages, "", local_changes()])


def code_version() -> str:
    """The git commit of this code, or `unknown` where it was installed without one."""
    return _copied().partition("\n")[0] or _git("rev-parse", "HEAD") or "unknown"


def local_changes() -> str:
    """What of this code is not committed, as a diff."""
    return _copied().partition("\n")[2] or _git("diff", "HEAD")


def _copied() -> str:
    """Of code that was set aside for a job: commit and changes of the checkout that it was copied from."""
    path = _ROOT / COPIED_FROM
    return path.read_text("utf-8") if path.exists() else ""


def log_to(path: Path, *, show: bool) -> None:
    """Send the log to a file, and to the terminal too where it is to be shown."""
    path.parent.mkdir(parents=True, exist_ok=True)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    for handler in logger.handlers[:]:
        logger.removeHandler(handler)
        handler.close()
    to_file = logging.FileHandler(path)
    to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(to_file)
    if show:
        logger.addHandler(logging.StreamHandler(sys.stderr))


def _git(*arguments: str) -> str:
    if not (_ROOT / ".git").exists():
        return ""
    try:
        return subprocess.run(["git", *arguments], cwd=_ROOT, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _append(path: Path, line: str) -> None:
    with path.open("a") as file:
        file.write(line + "\n")


def _flatten_dict(values: dict[Any, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        # `diffusion.options` and the like are one value, as in the schema's own flattening
        nested = isinstance(value, dict) and not key.endswith("options")
        flat |= _flatten_dict(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat
