"""`spresso push`: puts a codec's export and its model card on the Hugging Face hub.

Only the export's own files are uploaded, in one commit, by huggingface_hub. The token is what huggingface_hub finds by
itself; it passes through no code here.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launch.model_card import Base, bases_of, licences_of, model_card
from launch.status.table import resolve
from models.backbones.releases import release_at
from models.codec import SPresso
from models.documents import to_json
from models.export import CARD, DESCRIPTION, FILES, ExportDescription, files_of, read_description
from models.hub import hub_errors, is_hub_name, split_name
from trainer.evaluate.report_file import read_whole_report
from trainer.file_names import printable, printable_lines
from trainer.formatting import aligned, size
from trainer.stages import STAGES

Files = Mapping[str, Path | bytes]
"""What to upload: names in the model → files, or their contents."""


def push(
    codec: Path,
    name: str,
    *,
    evaluation: Path | None = None,
    sounds: int = 0,
    licence: str | None = None,
    private: bool = False,
    revision: str | None = None,
    dry: bool = False,
) -> str:
    """Upload an export; return what was done, in lines to print.

    Args:
        codec: an export's folder, or a run's directory or name, whose last stage with a codec is taken.
        name: `owner/name` on the hub; the model is made if it is not there.
        evaluation: the folder of an evaluation; None: that of the export's run, if it has scored this codec.
        sounds: how many clips of the evaluation to upload, with their decodes.
        licence: the hub's identifier of the codec's licence; None: that of its base.
        private: whether a model that is made is private.
        revision: a branch to commit to, which is made if it is not there; None: main.
        dry: whether to upload nothing, and return the list of files and the card.

    Raises:
        ValueError: the export is damaged, or its base is not here to check it with; the evaluation is of another codec;
            or the hub refuses.
    """
    repo, tagged = split_name(name)
    if tagged is not None:
        raise ValueError(f"{name}: name the branch with --revision {tagged}")
    folder = _export_of(codec)
    description = read_description(folder)
    loaded = SPresso.from_pretrained(folder)  # compares all hashes
    loaded.fitted_quantizer()
    report, scored = _report_of(folder, description, evaluation)
    bases = bases_of(description)
    _tell_licence(bases, licence)
    captions, clips = _sounds(report, scored, sounds)
    text = (folder / CARD).read_text("utf-8") if (folder / CARD).is_file() else ""
    card = model_card(repo, loaded, text, bases=bases, licence=licence, report=report, sounds=captions)
    files: dict[str, Path | bytes] = {file: folder / file for file in files_of(folder)}
    files |= {CARD: card.encode(), DESCRIPTION: _portable(description).encode(), **clips}
    if dry:
        return f"{_listed(files)}\n\n{card}"
    return f"{repo}: {_upload(repo, files, private=private, revision=revision, model=description['model'])}"


def _export_of(codec: Path) -> Path:
    """Return the export's folder. Raises ValueError if there is none."""
    if (codec / DESCRIPTION).is_file():
        return codec
    run = resolve(str(codec))
    exports = [run / stage / "export" for stage in reversed(STAGES)]
    found = [export for export in (run / "export", *exports) if (export / "quantizer.safetensors").is_file()]
    if not found:
        raise ValueError(f"{run} has no export of a codec that can encode: run its stage finetune first")
    return found[0]


def _report_of(
    folder: Path, description: ExportDescription, evaluation: Path | None
) -> tuple[Mapping[str, Any] | None, Path]:
    """Return the report of the evaluation that scored a codec, or None, and the evaluation's folder."""
    where = evaluation or folder.parent.parent / "evaluate"
    path = where / "evaluation.json"
    if evaluation is None and not path.is_file():
        _note("no evaluation of this codec was found, so the card has no figures: `spresso evaluate` makes one")
        return None, where
    report = read_whole_report(path)
    if report["model_hash"] == description["model"]:
        return report, where
    problem = f"{path} scored model {report['model_hash'][:8]}, not {description['model'][:8]}"
    if evaluation is not None:
        raise ValueError(f"{problem}: give the evaluation of this codec, or evaluate again")
    _note(f"{problem}, so the card has no figures: evaluate again")
    return None, where


def _tell_licence(bases: Sequence[Base], licence: str | None) -> None:
    """Say on stderr which licences bind the codec, and what is not known of them."""
    for known in licences_of(bases):
        _note(
            f"the base is under the {known.name}, {known.link}: read what it says of publishing what is trained on it"
        )
    if any(base.licence is None for base in bases):
        _note("the licence of the base is not known: make sure that you may publish what is trained on it")
    if licence is None and not licences_of(bases):
        _note("the card names no licence: give one with --license, such as --license cc-by-4.0")


def _sounds(
    report: Mapping[str, Any] | None, folder: Path, count: int
) -> tuple[list[tuple[str, str]], dict[str, Path | bytes]]:
    """Return captions with names in the model, and the files, of the first clips: original, and each rate's decode."""
    if not count:
        return [], {}
    if report is None:
        raise ValueError("--sounds takes clips of an evaluation, and there is none: evaluate first, or leave it out")
    shown = [each for each in report["systems"] if each["role"] == "original" or each["payload_kbps"]]
    ours = [each for each in shown if each["role"] in ("original", "system")]
    captions: list[tuple[str, str]] = []
    files: dict[str, Path | bytes] = {}
    for number, clip in enumerate(report["clips"][:count]):
        for system in ours:
            for source in clip["audio"].get(system["key"], [])[:1]:
                target = f"sounds/{number}.{system['key']}{Path(source).suffix}"
                captions.append((f"{clip['caption'] or clip['key']} · {system['title']}", target))
                files[target] = folder / source
    return captions, files


def _portable(description: ExportDescription) -> str:
    """Return `codec.json` without this machine's folders: releases stand where recipes look for them."""
    autoencoder = dict(description["config"]["autoencoder"])
    if autoencoder.get("folder"):
        autoencoder["folder"] = _place(str(autoencoder["folder"]))
    path = description["base"]["path"]
    base = {**description["base"], "path": path and _place(path)}
    config = {**description["config"], "autoencoder": autoencoder}
    return to_json({**description, "base": base, "config": config}, indent=2)


def _place(folder: str) -> str:
    if release := release_at(folder):
        return release.place
    return folder if is_hub_name(folder) and not Path(folder).exists() else Path(folder).name


def _upload(repo: str, files: Files, *, private: bool, revision: str | None, model: str) -> str:
    """Commit the files, and remove the files of an earlier export that this one lacks; return the commit's address."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi()
    with hub_errors(repo):
        api.create_repo(repo, private=private or None, exist_ok=True)
        if private and api.model_info(repo).private is False:
            raise ValueError(f"{repo} is public already: make it private in its settings, or leave --private out")
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        there = set(api.list_repo_files(repo, revision=revision))
        operations: list[Any] = [
            *(CommitOperationAdd(name, file) for name, file in sorted(files.items())),
            *(CommitOperationDelete(name) for name in sorted(there.intersection(FILES) - files.keys())),
        ]
        message = f"Codec, model {model[:8]}"
        return str(api.create_commit(repo, operations, commit_message=message, revision=revision).commit_url)


def _listed(files: Files) -> str:
    rows = [
        (name, size(len(file) if isinstance(file, bytes) else file.stat().st_size))
        for name, file in sorted(files.items())
    ]
    return printable_lines("would upload\n" + aligned(rows, right={1}))


def _note(text: str) -> None:
    print(f"spresso: {printable(text)}", file=sys.stderr)
