"""The number of a disk's error decides what is said of it and whether it is tried again."""

from __future__ import annotations

import errno
import os

import pytest

from launch.error_line import describe_error
from models import atomic_write
from models.atomic_write import sync, write_whole
from models.disk_errors import first_lasting, with_number


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EBADF])
def test_a_folder_that_its_disk_can_not_flush_is_passed_over(tmp_path, monkeypatch, number):
    write_whole(tmp_path / "file", "content")

    def fail(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(atomic_write.os, "fsync", fail)
    sync(tmp_path)
    with pytest.raises(OSError, match=os.strerror(number)):
        sync(tmp_path / "file")


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_other_errors_of_flushing_a_folder_are_raised(tmp_path, monkeypatch, number):
    def fail(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(atomic_write.os, "fsync", fail)
    with pytest.raises(OSError, match=os.strerror(number)) as error:
        sync(tmp_path)
    assert error.value.errno == number


@pytest.mark.parametrize(
    ("number", "told"),
    [
        (errno.ENOSPC, "no space left on the disk for /a: free some space or set another run_dir"),
        (errno.EDQUOT, "the disk quota is used up for /a: free some space or set another run_dir"),
        (errno.EROFS, "/a is on a disk that can only be read; allow it or name another path"),
        (errno.EACCES, "/a can't be opened: permission denied; allow it or name another path"),
        (errno.EIO, "/a failed: input/output error"),
    ],
)
def test_an_error_says_what_mends_it(number, told):
    assert describe_error(OSError(number, os.strerror(number), "/a")).startswith(told)


def test_a_number_goes_with_any_message():
    error = with_number(errno.EIO, "it failed")
    assert str(error) == describe_error(error) == "it failed"
    assert error.errno == errno.EIO


def test_what_a_person_must_mend_stands_for_all_ranks():
    assert first_lasting([errno.EIO, None, errno.EROFS, errno.ENOSPC]) == errno.ENOSPC
    assert first_lasting([None, errno.ESTALE, errno.EACCES]) == errno.EACCES
    assert first_lasting([None, errno.ESTALE]) == errno.ESTALE
    assert first_lasting([None]) is None
