"""Variables of torchrun and mpirun that are left over, or not all there."""

from __future__ import annotations

import pytest

from launch.cli import main
from launch.launcher_variables import require_whole_launch

WHOLE = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1234"}


@pytest.mark.parametrize(
    "environment",
    [{}, WHOLE, {**WHOLE, "LOCAL_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"}, {"PMI_SIZE": "1"}, {"MASTER_PORT": "1234"}],
)
def test_no_launcher_and_a_whole_one_are_right(environment):
    require_whole_launch(environment)


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"LOCAL_RANK": "0"}, r"^LOCAL_RANK=0 is set.* but RANK, WORLD_SIZE, .* are not: `unset LOCAL_RANK`"),
        ({"WORLD_SIZE": "4"}, r"^WORLD_SIZE=4 is set.* but RANK, MASTER_ADDR, MASTER_PORT are not: `unset WORLD_SIZE`"),
        ({**WHOLE, "MASTER_PORT": ""}, r"^RANK=0 is set.* but MASTER_PORT is not: `unset RANK WORLD_SIZE`"),
        (
            {"OMPI_COMM_WORLD_SIZE": "4"},
            r"^OMPI_COMM_WORLD_SIZE=4 is set, as by mpirun.*torchrun or parallel\.processes",
        ),
        ({**WHOLE, "RANK": "2"}, r"^RANK=2 is no rank from 0 to WORLD_SIZE=2 - 1"),
        ({**WHOLE, "RANK": "x"}, r"^RANK=x is no rank"),
    ],
)
def test_a_part_of_a_launcher_is_named(environment, words):
    with pytest.raises(ValueError, match=words):
        require_whole_launch(environment)


@pytest.mark.parametrize("command", [["run", "tiny"], ["train", "tiny", "stage=pretrain"]])
def test_it_is_told_before_anything_begins(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert main([*command, f"run_dir={tmp_path / 'run'}"]) == 2
    assert capsys.readouterr().err.startswith("spresso: LOCAL_RANK=0 is set")
    assert not (tmp_path / "run").exists()
