"""The run directory of a stage: all there is to know of it, and the guard against mixing two runs in one place."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from yaml import YAMLError

from models.atomic_write import write_whole
from trainer.checkpoints.names import checkpoints
from trainer.files import read_json
from trainer.provenance import environment
from trainer.recipes.schema import Config
from trainer.recipes.values import added_later, flatten, hash_values, to_yaml
from trainer.stages import STAGES

logger = logging.getLogger(__name__)


_NOT = object()  # equal to no value


def stage_folder(config: Config, stage: str) -> Path:
    """The run directory of a stage."""
    return Path(config.run_dir) / stage


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
        write_whole(self.path / "inputs.json", json.dumps(inputs, indent=2))
        write_whole(self.path / "config.yaml", to_yaml(config))
        _append(self.path / "command.txt", " ".join(sys.argv))
        write_whole(self.path / "environment.txt", environment())

    def identity(self, config: Config, inputs: dict[str, str]) -> str:
        """Hash of all that the stage learns from: settings, and what it builds on. A longer run has the same."""
        later = added_later()
        relevant = self._relevant(config)
        return hash_values({key: value for key, value in relevant.items() if value != later.get(key, _NOT)} | inputs)

    def _relevant(self, config: Config | dict[str, Any]) -> dict[str, Any]:
        flat = flatten(config) if isinstance(config, Config) else config
        names = STAGES[self.stage].learned_keys()
        # a longer run is the same run
        return {
            key: value
            for key, value in flat.items()
            if key.startswith(tuple(f"{name}." for name in names)) or key in names
            if key != f"{self.stage}.samples"
        }

    def require_same(self, config: Config, inputs: dict[str, str] | None = None) -> None:
        """Raise ValueError where the directory holds a run of another config or, if they are given, of other inputs."""
        if not (self.path / "config.yaml").exists() or not checkpoints(self.checkpoints):
            return  # nothing learned yet that could be mixed up
        relevant = self._relevant(config)
        known = flatten(config)
        if config.checkpoint.start_from is None:
            relevant.pop("checkpoint.start_from")  # the run has begun: with what, needn't be said again
        before = self._relevant(added_later() | _flatten_stored(self._stored_config(), known))
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
        write_whole(self.path / "status.json", json.dumps(status, indent=2), durable=False)

    def done(self, config: Config) -> bool:
        """Whether this stage ran to the end that the config asks for."""
        status = self.status
        return status.get("state") == "done" and status.get("samples", -1) >= config.stage(self.stage).samples


def _append(path: Path, line: str) -> None:
    with path.open("a") as file:
        file.write(line + "\n")


def _flatten_stored(values: dict[Any, Any], known: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys to plain values, as `schema.flatten` has them: a mapping that is one setting's value stays one."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        nested = isinstance(value, dict) and key not in known
        flat |= _flatten_stored(value, known, f"{key}.") if nested else {key: value}
    return flat
