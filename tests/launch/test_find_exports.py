from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from launch import find_codec
from launch.find_exports import find_exports


def test_exports_of_linked_runs_are_found_once(tmp_path):
    for run in ("runs/a", "disk/b", "disk/c"):
        (tmp_path / run / "finetune/export").mkdir(parents=True)
        (tmp_path / run / "finetune/export/codec.json").touch()
    (tmp_path / "runs/b").symlink_to(tmp_path / "disk/b")
    (tmp_path / "runs/b2").symlink_to(tmp_path / "disk/b")
    (tmp_path / "disk/b/round").symlink_to(tmp_path / "runs")
    (tmp_path / "runs/a/finetune/codec.json").touch()
    runs = tmp_path / "runs"
    troubles: list[OSError] = []
    assert find_exports(runs, troubles.append) == [runs / "a/finetune/export", runs / "b/finetune/export"]
    assert find_exports(tmp_path / "none", troubles.append) == []
    assert troubles == []


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO])
def test_a_folder_that_can_not_be_listed_is_named_and_hides_no_other(tmp_path, monkeypatch, capsys, number):
    for run in ("a", "b"):
        export = tmp_path / "runs" / run / "finetune/export"
        export.mkdir(parents=True)
        for name in ("codec.json", "quantizer.safetensors"):
            (export / name).touch()
    real = os.scandir

    def scandir(path):
        if Path(path).name == "b":
            raise OSError(number, os.strerror(number), str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    monkeypatch.chdir(tmp_path)
    assert find_codec.newest_codec() == Path("runs/a/finetune/export")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("spresso: runs/b ")
    assert line.endswith("; it is passed over")


def test_of_several_exports_of_a_model_a_stream_gets_the_distilled_one(tmp_path, monkeypatch):
    exports = [tmp_path / f"runs/a/{stage}/export" for stage in ("autoencode", "distill", "finetune")]
    for export in exports:
        export.mkdir(parents=True)
    monkeypatch.setattr(find_codec, "exports_of", lambda model: iter(exports))
    assert find_codec.fitting_codec("0123", tmp_path / "a.spr") == exports[0]
    (exports[1] / "distilled.safetensors").touch()
    assert find_codec.fitting_codec("0123", tmp_path / "a.spr") == exports[1]


def test_an_export_that_can_not_be_read_is_named_and_hides_no_other(tmp_path, monkeypatch, capsys):
    for run in ("a", "b", "no_quantizer"):
        export = tmp_path / "runs" / run / "finetune/export"
        export.mkdir(parents=True)
        for name in ("codec.json", "quantizer.safetensors")[: 1 if run == "no_quantizer" else 2]:
            (export / name).touch()
    real = Path.stat

    def stat(self, **options):
        if "runs/b" in str(self):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(self))
        return real(self, **options)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Path, "stat", stat)
    assert find_codec.newest_codec() == Path("runs/a/finetune/export")
    (line,) = capsys.readouterr().err.splitlines()
    assert "runs/b/finetune/export/quantizer.safetensors failed: " in line
