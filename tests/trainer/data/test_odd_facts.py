"""Facts and columns of any type: what is recorded is what was listed, and what can't be used is named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from tests.trainer.data.sound_sources import members_of, rows_of, table_of, write_arrow, write_parquet, write_tar
from tests.trainer.data.test_prepare import (
    REPOSITORY,
    Interrupted,
    all_metadata,
    interrupt_at,
    run,
    write_sounds,
)
from tests.trainer.data.test_prepare_from_elsewhere import made
from trainer.data.locate import Asked
from trainer.data.mixed_sources import open_sources

COUNT = 8


@pytest.fixture
def sounds(tmp_path: Path) -> Path:
    return write_sounds(tmp_path / "audio", {f"sound{n:02d}.wav": 0.2 + 0.13 * n for n in range(COUNT)})


@pytest.mark.parametrize("value", ["NaN", "-Infinity", "1e400", '{"a": [NaN]}', '"\\ud800"', str(2**70), "true"])
def test_the_record_holds_the_facts_that_were_listed(sounds, tmp_path, value):
    """The sets of a run that goes on would have other metadata, and another hash of their content."""
    for path in sounds.glob("*.wav"):
        path.with_suffix(".json").write_text(f'{{"caption": "a knock", "fact": {value}}}')
    source = write_tar(tmp_path / "a.tar", members_of(sounds))
    listed, read = (open_sources(Asked(str(source))).listed(tmp_path).files for _ in range(2))
    assert (tmp_path / "sounds.jsonl").exists()
    assert [dict(one.facts) for one in read] == [dict(one.facts) for one in listed]
    assert len(listed[0].facts) == 1


def test_numbers_that_are_not_finite_change_no_set_that_is_finished_later(sounds, tmp_path):
    rows = [{**row, "snr": float("nan") if number % 2 else 1.5} for number, row in enumerate(rows_of(sounds))]
    source = write_parquet(tmp_path / "a.parquet", table_of(rows, snr=pa.float64()))
    whole = run(source, tmp_path / "whole", shard_mb=0.03)
    with pytest.raises(Interrupted):
        run(source, tmp_path / "out", shard_mb=0.03, progress=interrupt_at(3))
    assert run(source, tmp_path / "out", shard_mb=0.03).content == whole.content
    assert made(tmp_path / "out") == made(tmp_path / "whole")
    texts = [json.dumps(metadata["facts"]) for metadata in all_metadata(tmp_path / "out")]
    assert set(texts) == {'{"snr": 1.5}', '{"snr": null}'}


@pytest.mark.parametrize("write", [write_parquet, write_arrow])
@pytest.mark.parametrize("kind", [pa.list_(pa.uint8()), pa.string()])
def test_bytes_of_another_type_are_named(sounds, tmp_path, write, kind):
    values: list[Any] = [{"bytes": [1, 2] if pa.types.is_list(kind) else "1", "path": "a.wav"}] * 3
    column = pa.array(values, pa.struct({"bytes": kind, "path": pa.string()}))
    source = write(tmp_path / f"a.{write.__name__.partition('_')[2]}", pa.table({"audio": column}))
    with pytest.raises(ValueError, match=r"a\.\w+: the column audio holds struct<.*neither files of sound nor"):
        run(source, tmp_path / "out")


def test_a_view_of_bytes_is_named(tmp_path):
    column = pa.array([{"bytes": b"12", "path": "a.wav"}], pa.struct({"bytes": pa.binary_view(), "path": pa.string()}))
    source = write_arrow(tmp_path / "a.arrow", pa.table({"audio": column}))
    with pytest.raises(ValueError, match=r"a\.arrow: the column audio holds struct<.*neither files of sound nor"):
        run(source, tmp_path / "out")


def test_bytes_that_are_all_missing_are_looked_for_at_their_paths(sounds, tmp_path):
    names = [path.name for path in sorted(sounds.glob("*.wav"))]
    kind = pa.struct({"bytes": pa.null(), "path": pa.string()})
    table = pa.table({"audio": pa.array([{"bytes": None, "path": name} for name in names], kind)})
    run(write_parquet(sounds / "a.parquet", table), tmp_path / "parquet", shard_mb=0.03)
    run(write_arrow(sounds / "a.arrow", table), tmp_path / "arrow", shard_mb=0.03)
    assert made(tmp_path / "parquet") == made(tmp_path / "arrow")


def test_what_is_passed_over_at_a_url_is_reported_in_one_order(sounds, tmp_path):
    """The order of a set of texts differs from process to process."""
    write_tar(tmp_path / "t/a.tar", members_of(sounds))
    for number in range(20):
        (tmp_path / f"t/note{number}.md").touch()
    program = (
        "import json, sys; from trainer.data.locate import Asked; from trainer.data.mixed_sources import open_sources; "
        "print(json.dumps(open_sources(Asked(sys.argv[1])).listed().passed_over.report()))"
    )
    reports = {
        subprocess.run(
            [sys.executable, "-c", program, f"file://{tmp_path}/t"],
            env={**os.environ, "PYTHONHASHSEED": str(seed)},
            cwd=REPOSITORY,
            capture_output=True,
            check=True,
        ).stdout
        for seed in range(2)
    }
    assert len(reports) == 1


def test_sounds_of_one_name_get_names_that_no_other_has(sounds, tmp_path):
    first, second, third = (path.read_bytes() for path in sorted(sounds.glob("*.wav"))[:3])
    write_tar(tmp_path / "x/a.tar", [("s.wav", first), ("1/a/s.wav", second)])
    write_tar(tmp_path / "y/a.tar", [("s.wav", third)])
    files = open_sources(Asked(f"{tmp_path}/{{x,y}}/a.tar")).listed().files
    assert [one.name for one in files] == ["2/a/s.wav", "1/a/s.wav", "3/a/s.wav"]


@pytest.mark.parametrize("write", [write_parquet, write_arrow])
def test_two_columns_of_one_name_are_named(sounds, tmp_path, write):
    table = table_of(rows_of(sounds)).append_column("text", pa.array(["rain"] * COUNT))
    source = write(tmp_path / f"a.{write.__name__.partition('_')[2]}", table.replace_schema_metadata(None))
    with pytest.raises(ValueError, match=r"a\.\w+ has several columns text: write the table with a name for each"):
        run(source, tmp_path / "out")
