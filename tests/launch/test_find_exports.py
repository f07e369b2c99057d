from __future__ import annotations

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
    assert find_exports(runs) == [runs / "a/finetune/export", runs / "b/finetune/export"]
    assert find_exports(tmp_path / "none") == []
