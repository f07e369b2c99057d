"""Headers of .npy members: those of float16 matrices are read, all else is refused in one line."""

from __future__ import annotations

import io

import numpy as np
import pytest

from tests.trainer.data.raw_tars import CHANNELS, END, latents, member, npy, npy_with_header
from trainer.data.npy_header import LONGEST_NPY_HEADER, float16_shape
from trainer.data.shards import scan_shard

VALUES = latents(0).tobytes()


def read(content: bytes) -> tuple[tuple[int, int], int]:
    return float16_shape(content[:LONGEST_NPY_HEADER])


@pytest.mark.parametrize("shape", [(1, 1), (128, 130), (64, 100_000), (0, 7)])
def test_the_header_of_numpy_is_read(shape):
    content = npy(np.zeros(shape, np.float16))
    assert read(content) == (shape, len(content) - 2 * shape[0] * shape[1])


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<f2', 'fortran_order': False, 'shape': (128, 9), }\n",
        "{'descr': '<f2', 'fortran_order': False, 'shape': (128, 9)}" + " " * 3900 + "\n",
        '{"shape":(128,9,),"descr":"<f2","fortran_order":False}',
        "  {'fortran_order': False, 'descr': '=f2', 'shape': (128, 9)}",
    ],
)
def test_headers_of_others_are_read_as_numpy_reads_them(header):
    content = npy_with_header(header, VALUES)
    (rows, columns), length = read(content)
    np.testing.assert_array_equal(np.load(io.BytesIO(content)), latents(0))
    assert ((rows, columns), content[length:]) == ((CHANNELS, 9), VALUES)


NO_HEADERS = {
    "nothing": "",
    "no dictionary": "(128, 9)",
    "an open bracket": "{'descr': '<f2', 'fortran_order': False, 'shape': (",
    "an open text": "{'descr': '''<f2, 'fortran_order': False, 'shape': (128, 9)}",
    "a key that has no hash": "{[]: '<f2', 'fortran_order': False, 'shape': (128, 9)}",
    "a thousand brackets": "(" * 1000 + ")" * 1000,
    "a thousand signs": "-" * 1000 + "1",
    "code": "__import__('os').abort()",
    "a key twice": "{'descr': '<f2', 'descr': '<f2', 'fortran_order': False, 'shape': (128, 9)}",
    "a key too few": "{'descr': '<f2', 'shape': (128, 9)}",
    "a key too many": "{'descr': '<f2', 'fortran_order': False, 'shape': (128, 9), 'more': 1}",
    "a negative shape": "{'descr': '<f2', 'fortran_order': False, 'shape': (-128, -9)}",
    "a shape of three": "{'descr': '<f2', 'fortran_order': False, 'shape': (128, 3, 3)}",
    "a shape of one": "{'descr': '<f2', 'fortran_order': False, 'shape': (1152,)}",
    "a shape of fractions": "{'descr': '<f2', 'fortran_order': False, 'shape': (128.0, 9.0)}",
    "a shape in quotes": "{'descr': '<f2', 'fortran_order': False, 'shape': '(128, 9)'}",
    "a shape of truth": "{'descr': '<f2', 'fortran_order': False, 'shape': (True, 1152)}",
    "no frames": "{'descr': '<f2', 'fortran_order': False, 'shape': (128, 0)}",
    "no channels": "{'descr': '<f2', 'fortran_order': False, 'shape': (0, 99999999999999999999)}",
    "2^64 frames": "{'descr': '<f2', 'fortran_order': False, 'shape': (128, 18446744073709551625)}",
    "frames of 3000 digits": "{'descr': '<f2', 'fortran_order': False, 'shape': (128, " + "9" * 3000 + ")}",
    "objects": "{'descr': '|O', 'fortran_order': False, 'shape': (128, 9)}",
    "the other order": "{'descr': '<f2', 'fortran_order': True, 'shape': (128, 9)}",
    "the other byte order": "{'descr': '>f2', 'fortran_order': False, 'shape': (128, 9)}",
    "fields": "{'descr': [('a', '<f2')], 'fortran_order': False, 'shape': (128, 9)}",
    "5000 bytes": "{'descr': '<f2', 'fortran_order': False, 'shape': (128, 9)}" + " " * 5000,
}


@pytest.mark.parametrize("values", [VALUES, b""])
@pytest.mark.parametrize("header", NO_HEADERS)
def test_what_is_no_header_is_refused_in_one_line(tmp_path, header, values):
    path = tmp_path / "a.tar"
    path.write_bytes(member(b"k.x0.npy", npy_with_header(NO_HEADERS[header], values)) + END)
    with pytest.raises(ValueError, match=r"a\.tar: k\.x0\.npy (is not a|holds no values)") as caught:
        scan_shard(path)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500


def test_text_may_have_no_tokens_but_no_other_lack(tmp_path):
    path = tmp_path / "a.tar"
    for shape, said in [((0, 4), None), ((4, 0), "k.text.npy holds no values"), ((3,), "k.text.npy is not a float16")]:
        text = npy(np.zeros(shape, np.float16))
        path.write_bytes(member(b"k.x0.npy", npy(latents(0))) + member(b"k.text.npy", text) + END)
        if said is None:
            assert scan_shard(path)["text_tokens"].tolist() == [0]
        else:
            with pytest.raises(ValueError, match=said):
                scan_shard(path)
