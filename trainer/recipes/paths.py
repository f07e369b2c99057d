"""The settings that are paths, in which `~` stands for a home folder. The shell leaves a `~` after a `=` as it is."""

from __future__ import annotations

import os

from trainer.recipes.schema import Config

PATHS = (
    *("run_dir", "data.audio", "data.latents", "data.cache.folder", "autoencoder.folder", "text.folder"),
    *("pretrained.folder", "checkpoint.resume", "checkpoint.start_from", "log.prometheus"),
)
"""Keys whose value is a path, or may be one."""


def expanded(path: str) -> str:
    """Return a path with `~` or `~user` replaced by the home folder; one whose home is unknown stays as it is."""
    return os.path.expanduser(path)  # noqa: PTH111 (pathlib raises RuntimeError for an unknown home)


def expand_homes(config: Config) -> None:
    """Expand all paths of a recipe in place."""
    for key in PATHS:
        *groups, name = key.split(".")
        holder = config
        for group in groups:
            holder = getattr(holder, group)
        if isinstance(value := getattr(holder, name), str):
            setattr(holder, name, expanded(value))
    data, evaluate = config.data, config.evaluate
    data.mix = {expanded(folder): share for folder, share in data.mix.items()}
    evaluate.codecs = {title: expanded(folder) for title, folder in evaluate.codecs.items()}
    evaluate.weights = {name: expanded(folder) for name, folder in evaluate.weights.items()}
    kind, colon, where = evaluate.embedding.partition(":")
    evaluate.embedding = f"{kind}{colon}{expanded(where)}"
