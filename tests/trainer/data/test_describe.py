"""`spresso data`: a set at a glance."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile

from launch.cli import main
from trainer.data.describe import describe
from trainer.data.remote import CacheSettings
from trainer.data.shard_set import ShardSet, open_set
from trainer.data.shards import SetInfo, ShardWriter, scan_shard, write_index


def write_set(folder: Path, lengths: list[int]) -> ShardSet:
    with ShardWriter(folder, max_bytes=40_000) as writer:
        for number, frames in enumerate(lengths):
            metadata = {"caption": f"sound <{number}>", "source": f"{number % 2}/s{number // 2}.wav"}
            writer.write(f"s{number}", np.zeros((4, frames), np.float16), metadata)
    info = SetInfo("0123456789abcdef0123", {"kind": "fake"}, 8000, 80, 4, 0.4)
    write_index(folder, info, {name: scan_shard(folder / name) for name in writer.names})
    return ShardSet(folder)


def test_size_lengths_sources_and_captions(tmp_path):
    lengths = [100] * 30 + [150] * 15 + [220] * 5
    shard_set = write_set(tmp_path / "set", lengths)
    text = describe(shard_set, captions=3)
    lines = text.splitlines()
    assert f"samples     50, {sum(lengths) / 100 / 3600:.2f} h" in lines
    assert f"{len(shard_set.shards)}, " in next(line for line in lines if line.startswith("shards"))
    assert "AudioAE     fake, 0123456789abcdef" in lines
    rows = [line for line in lines if " s  " in line]
    assert len(rows) == 12
    counts = [int(row.split(" s  ")[1].split()[0]) for row in rows]
    assert (counts[0], counts[-1], sum(counts)) == (30, 5, 50)
    assert rows[0].count("█") == 40
    assert "sources     50 files in 2 folder(s)" in lines
    assert [line for line in lines if line.startswith("  sound")] == ["  sound <0>", "  sound <24>", "  sound <49>"]


def test_clips_of_one_length_take_one_line(tmp_path):
    assert "  all 1.00 s" in describe(write_set(tmp_path / "set", [100] * 3))


def test_a_set_elsewhere_is_described_from_its_first_shards(tmp_path):
    lengths = [100] * 900
    local = write_set(tmp_path / "set", lengths)
    url = f"file://{tmp_path / 'set'}"
    shard_set = open_set(url, CacheSettings(str(tmp_path / "cache")))
    assert "sources     400 files in 2 folder(s) among 400" in describe(shard_set)
    fetched = len(list(shard_set.folder.glob("*.tar")))
    assert 0 < fetched < len(local.shards)


def test_the_command_shows_both_sets_and_plays_samples(prepared, tmp_path, capsys):
    assert main(["data", str(prepared / "latents"), "--samples", "2", "--play-to", str(tmp_path / "play")]) == 0
    text = capsys.readouterr().out
    assert text.count("AudioAE     magnitude") == 2
    assert ", with their audio" in text
    played = sorted((tmp_path / "play").glob("*.wav"))
    assert len(played) == 4
    for path in played:
        audio, rate = soundfile.read(path)
        assert rate == 48_000
        assert 0.9 < len(audio) / rate < 1.1
        assert 0.01 < np.abs(audio).max() <= 1


def test_bad_input(prepared, tmp_path, capsys):
    assert main(["data", str(tmp_path)]) == 2
    assert "set.json is missing" in capsys.readouterr().err
    write_set(tmp_path / "set", [100])
    assert main(["data", str(tmp_path / "set"), "--play-to", str(tmp_path / "play")]) == 2
    assert "fake" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["shard", "index", "empty"])
def test_damage_is_told_of(tmp_path, capsys, damage):
    shard_set = write_set(tmp_path / "set", [100] * 30)
    if damage == "shard":
        shard_set.paths[0].unlink()
    elif damage == "index":
        (tmp_path / "set/index.npy").write_bytes(b"nothing")
    else:
        shutil.rmtree(tmp_path / "set")
        (tmp_path / "set").mkdir()
    assert main(["data", str(tmp_path / "set")]) == 2
    assert {"shard": "00000.tar is missing", "index": "is damaged", "empty": "set.json is missing"}[
        damage
    ] in capsys.readouterr().err
