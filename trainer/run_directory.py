"""The run directory of a stage: its records, and the check that prevents two runs from mixing in one directory."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from models.atomic_write import write_whole
from models.documents import damaged, read_bytes, write_json
from models.readable import require_file
from models.yaml_document import read_yaml
from trainer.checkpoints.names import checkpoints
from trainer.data.remote import is_url
from trainer.exported import missing_export
from trainer.provenance import environment
from trainer.recipes.schema import Config, recipe_schema
from trainer.recipes.values import flatten, hash_values, is_stored, older_values, to_yaml
from trainer.run_documents import read_optional, read_status
from trainer.stages import STAGES, decided_by

logger = logging.getLogger(__name__)

_MISSING = object()  # equal to no value
_BY_CONTENT = ("pretrained.folder", "autoencoder.folder")
"""Keys whose value is the path of a release. The hash of its files is an input of the stage, or decides the latents and
is compared with theirs, so that the release may move."""


def stage_folder(config: Config, stage: str) -> Path:
    """Return the run directory of a stage."""
    return Path(config.run_dir) / stage


class RunDirectory:
    """Paths and records of a stage: `config.yaml`, `command.txt`, `environment.txt`, `status.json`, and folders."""

    def __init__(self, path: Path, stage: str, *, require_ownership: Callable[[], None] = lambda: None) -> None:
        """`require_ownership` is called before writing; it raises if a later start of this run has taken over."""
        self.path, self.stage, self.require_ownership = path, stage, require_ownership
        self.checkpoints = path / "checkpoints"
        self.averages = path / "averages"
        self.tensorboard = path / "tensorboard"
        self.samples = path / "samples"
        self.export = path / "export"

    def claim(self, config: Config, inputs: dict[str, str]) -> None:
        """Write the records of a run with this config into the directory.

        Args:
            config: the whole recipe.
            inputs: hashes of the stage's inputs: shards and exports of earlier stages.

        Raises:
            ValueError: the directory holds a run with other inputs, or other settings that this stage learns from. The
                message says how they differ and how to fix it.
        """
        self.require_same(config, inputs)
        self.require_ownership()
        # The config comes first, because it shows that the other files are a run's.
        write_whole(self.path / "config.yaml", to_yaml(config))
        write_json(self.path / "inputs.json", inputs, indent=2)
        _append(self.path / "command.txt", " ".join(sys.argv))
        write_whole(self.path / "environment.txt", environment())

    def identity(
        self, config: Config, inputs: dict[str, str], *, with_paths: bool = False, zero_clip: bool = False
    ) -> str:
        """Hash the settings and inputs that the stage learns from. The number of samples does not change the hash.

        Neither does the place of a release (`_BY_CONTENT`), except `with_paths`, as it was up to 0.1.0. `zero_clip`
        hashes no clipping as 0, which meant that under ZeRO up to 0.1.0.
        """
        later = older_values()
        relevant = self._relevant(config)
        if zero_clip and config.parallel.strategy.startswith("zero"):
            relevant |= {key: 0.0 for key, value in relevant.items() if key.endswith(".clip_norm") and value is None}
        if not with_paths:
            relevant = {key: value for key, value in relevant.items() if key not in _BY_CONTENT or value is None}
        return hash_values(
            {key: value for key, value in relevant.items() if value != later.get(key, _MISSING)} | inputs
        )

    def _relevant(self, config: Config | dict[str, Any]) -> dict[str, Any]:
        flat = flatten(config) if isinstance(config, Config) else config
        return {key: value for key, value in flat.items() if self.learns_from(key)}

    def learns_from(self, key: str) -> bool:
        """Whether a setting, given by its dotted key, decides what the stage learns.

        The number of samples does not, because a longer run continues the same run.
        """
        return key != f"{self.stage}.samples" and decided_by(key, STAGES[self.stage].learned_keys())

    def require_same(self, config: Config, inputs: dict[str, str] | None = None) -> None:
        """Raise ValueError if the directory holds a run with another config, or with other inputs if any are given.

        It is also raised if the directory holds files that a run would replace, but that no run wrote.
        """
        if not checkpoints(self.checkpoints):
            self._require_ours()
            return  # The directory holds no trained weights yet.
        if not (self.path / "config.yaml").exists():
            return
        if differing := self.differences(self.path, config, inputs):
            raise ValueError(
                f"{self.path} holds a run with other settings: {differing}. Take another run_dir=…, or remove "
                f"{self.path}"
            )

    def differences(self, folder: Path, config: Config, inputs: dict[str, str] | None = None) -> str:
        """Name the settings and inputs by which a run's `config.yaml` and `inputs.json` in a folder differ from these.

        Empty if none does. Raises ValueError if a file is damaged.
        """
        relevant = self._relevant(config)
        known = flatten(config)
        if config.checkpoint.start_from is None:
            relevant.pop("checkpoint.start_from")  # A run that has begun need not name its first weights again.
        before = self._relevant(_without_old_zero(older_values() | _flatten_stored(self._stored_config(folder), known)))
        if inputs is not None:
            relevant |= {f"input {name}": value for name, value in inputs.items()}
            before |= {f"input {name}": value for name, value in self._stored_inputs(folder).items()}
        differing = [
            f"{key} ({before.get(key, 'unset')} → {relevant.get(key, 'unset')})"
            for key in sorted(before.keys() | relevant.keys())
            if not (key == "checkpoint.start_from" and key not in relevant)
            if before.get(key) != relevant.get(key)
            if not _is_same_place(key, before.get(key), relevant.get(key))
        ]
        return "; ".join(differing[:4]) + (f"; and {len(differing) - 4} more" if len(differing) > 4 else "")

    def _require_ours(self) -> None:
        require_own_config(self.path)
        if (self.path / "config.yaml").exists():
            return
        for name in ("command.txt", "environment.txt", "export"):
            if (self.path / name).exists():
                raise ValueError(
                    f"{self.path / name} was not written by a run (there is no config.yaml beside it), and a run would "
                    f"replace it: take another run_dir=…, or move {self.path} away"
                )

    def _stored_config(self, folder: Path) -> dict[Any, Any]:
        path = folder / "config.yaml"
        try:
            stored = OmegaConf.to_container(read_yaml(path, mend=self._mend))
        except OmegaConfBaseException as error:
            raise damaged(path, error, self._mend) from None
        assert isinstance(stored, dict)
        return stored

    def _stored_inputs(self, folder: Path) -> dict[str, str]:
        return read_optional(folder / "inputs.json", dict[str, str], mend=self._mend) or {}

    @property
    def _mend(self) -> str:
        return f"restore it, take another run_dir=…, or remove {self.path}"

    @property
    def status(self) -> dict[str, Any]:
        """The status that `write_status` wrote last; empty, with a warning, if it is damaged.

        A run that has no status goes on from its newest checkpoint and writes its status again.
        """
        try:
            return read_status(self.path)
        except ValueError as error:
            logger.warning("%s", error)
            return {}

    def write_status(self, state: str, **facts: Any) -> None:
        """Write `status.json` with a state (running, stopped or done) and further facts; earlier warnings are kept."""
        self.require_ownership()
        if kept := self.status.get("warnings"):
            facts = {"warnings": kept} | facts
        status = {"stage": self.stage, "state": state, "time": datetime.now(UTC).isoformat(timespec="seconds"), **facts}
        write_json(self.path / "status.json", status, indent=2, durable=False)

    def done(self, config: Config) -> bool:
        """Whether this stage is done, with at least as many samples as the config says, and its export is there."""
        status = self.status
        enough = status.get("state") == "done" and status.get("samples", -1) >= config.stage(self.stage).samples
        return enough and not missing_export(self.path, status)


def _without_old_zero(stored: dict[str, Any]) -> dict[str, Any]:
    """Return a stored config in which null turns clipping off, as 0 did under ZeRO up to 0.1.0."""
    if not str(stored.get("parallel.strategy")).startswith("zero"):
        return stored
    return {key: None if key.endswith(".clip_norm") and value == 0 else value for key, value in stored.items()}


def _is_same_place(key: str, before: object, now: object) -> bool:
    """Whether two values of a setting are paths of the same thing, or of things that are compared by their content."""
    if not isinstance(before, str) or not isinstance(now, str):
        return False
    if key == "checkpoint.start_from" and not (is_url(before) or is_url(now)):
        return Path(before).resolve() == Path(now).resolve()
    return key in _BY_CONTENT


def write_config(folder: Path, config: Config) -> None:
    """Write the resolved config as `config.yaml` into a run's or a stage's directory; raises ValueError as below.

    If the same config is there, the file stays: its time says which figures and pages are newer.
    """
    require_own_config(folder)
    path, text = folder / "config.yaml", to_yaml(config)
    if not path.is_file() or path.read_bytes() != text.encode():
        write_whole(path, text)


def require_own_config(folder: Path) -> None:
    """Raise ValueError if the `config.yaml` of a run's or a stage's directory was not written by a run.

    A run writes all sections and no comment. A recipe by hand has comments, or only the settings that differ.
    """
    path = folder / "config.yaml"
    if not path.exists():
        return
    require_file(path)
    try:
        complete = is_stored(read_yaml(path, mend=""))
        text = read_bytes(path, mend="")
    except ValueError:
        complete, text = False, b""
    if not complete or any(line.lstrip().startswith(b"#") for line in text.splitlines()):
        raise ValueError(
            f"{path} was not written by a run, which keeps its settings there: rename that file, or take another "
            "run_dir=…"
        )


def stored_settings(folder: Path) -> dict[str, Any]:
    """Return the settings in a run's `config.yaml` by their dotted keys, with the older values of those it lacks.

    Raises:
        ValueError: the file is damaged.
        OSError: it is missing or can't be read.
    """
    mend = f"restore it, or remove {folder}"
    stored: Any = OmegaConf.to_container(read_yaml(folder / "config.yaml", mend=mend))
    return older_values() | _flatten_stored(stored, flatten(recipe_schema()()))


def _append(path: Path, line: str) -> None:
    with path.open("a") as file:
        file.write(line + "\n")


def _flatten_stored(values: dict[Any, Any], known: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings to dotted keys, as `values.flatten` does. The mapping of a `known` key is not split."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        nested = isinstance(value, dict) and key not in known
        flat |= _flatten_stored(value, known, f"{key}.") if nested else {key: value}
    return flat
