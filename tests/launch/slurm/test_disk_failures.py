"""A job is over at once if a person must mend the disk, and is tried again if the failure may pass."""

from __future__ import annotations

import errno
import os

import pytest
import torch

from launch import owner
from launch.slurm.worker import _classify
from trainer.checkpoints import checkpoint
from trainer.ranks import collective
from trainer.ranks.flat_ranges import whole_ranges


def failing(number: int):
    def act() -> None:
        raise OSError(number, os.strerror(number), "/runs/step_000000000008")

    return act


@pytest.fixture
def folder(tmp_path):
    stage = tmp_path / "pretrain"
    stage.mkdir()
    owner.take(stage, owner.by_hand())
    return stage


@pytest.mark.parametrize("name", ["ENOSPC", "EDQUOT", "EROFS", "EACCES", "EPERM"])
def test_what_a_person_must_mend_ends_the_job(folder, name):
    with pytest.raises(OSError, match=r".") as failure:
        collective.together(failing(getattr(errno, name)))
    assert failure.value.errno == getattr(errno, name)
    assert _classify(failure.value, folder)[0] == "mistake"


@pytest.mark.parametrize("name", ["EIO", "ESTALE", "EMFILE", "ENFILE"])
def test_what_may_pass_is_tried_again(folder, name):
    with pytest.raises(OSError, match="rank 0: /runs/step_000000000008 failed") as failure:
        collective.together(failing(getattr(errno, name)))
    assert failure.value.errno == getattr(errno, name)
    assert _classify(failure.value, folder)[0] == "failed"


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("EDQUOT", "the disk quota is used up"),
        ("ENOSPC", "no space left on the disk"),
        ("EROFS", "can only be read .allow writing there or set another run_dir.. Older checkpoints are untouched"),
        ("EIO", "could not save .*nput/output error. Older checkpoints are untouched"),
    ],
)
def test_a_save_keeps_the_number(tmp_path, monkeypatch, name, told):
    number = getattr(errno, name)
    monkeypatch.setattr(checkpoint, "sync", lambda path: failing(number)())
    with pytest.raises(OSError, match=told) as failure:
        checkpoint.save(tmp_path, 8, whole_ranges({"w": torch.zeros(3)}), {})
    assert failure.value.errno == number
    assert list(tmp_path.iterdir()) == []
