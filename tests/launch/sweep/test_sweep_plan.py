"""Which points a command asks for, what they share, and what it refuses. Nothing is trained here."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from launch.cli import main
from launch.sweep import directory, sharing
from launch.sweep.plan import KnownPoints, Plan, make_plan, recorded_plan
from launch.sweep.record import read
from trainer.run_directory import write_config


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)


def planned(*overrides: str, folder: str = "s", points: Path | None = None) -> Plan:
    return make_plan("tiny", overrides, points=points, folder=Path(folder))


def begin(plan: Plan) -> None:
    """Make the directory of a sweep in which each point has begun to train."""
    directory.make(plan)
    for point in plan.points:
        write_config(Path(point.config.run_dir) / "finetune", point.config)


def places(plan: Plan) -> dict[str, dict[str, str]]:
    """Return the run directory in which each stage of each point lies."""
    return {
        point.name: {
            stage: point.recorded.folder_of(stage)
            for stage in sharing.stages_of(point.config)
            if sharing.may_be_shared(stage)
        }
        for point in plan.points
    }


def shared_by(plan: Plan, stage: str) -> int:
    """Return in how many different directories a stage lies."""
    return len({each[stage] for each in places(plan).values()})


@pytest.mark.parametrize(
    ("grid", "copies"),
    [
        ("finetune.lr=1e-4,2e-4", {"prepare": 1, "pretrain": 1, "autoencode": 1, "quantize": 1, "finetune": 2}),
        ("quantizer.books=4,8", {"prepare": 1, "pretrain": 1, "autoencode": 1, "quantize": 2, "finetune": 2}),
        ("lora.rank=2,4", {"prepare": 1, "pretrain": 1, "autoencode": 2, "quantize": 2, "finetune": 2}),
        ("autoencode.samples=64,128", {"prepare": 1, "pretrain": 1, "autoencode": 2, "quantize": 2}),
        ("dit.width=48,96", {"synth": 1, "prepare": 1, "pretrain": 2, "autoencode": 2}),
        ("data.clip_seconds=1,2", {"synth": 1, "prepare": 2, "pretrain": 2, "finetune": 2}),
        ("data.synth_hours=0.02,0.05", {"synth": 2, "prepare": 2, "pretrain": 2}),
        ("seed=1,2", {"synth": 2, "prepare": 2, "pretrain": 2}),
        ("data.shuffle=global,none", {"synth": 1, "prepare": 1, "pretrain": 2, "quantize": 2}),
        # no row of a stage says that these decide anything, and none says that they decide nothing
        ("parallel.precision=fp32,bf16", {"synth": 1, "prepare": 1, "pretrain": 2, "autoencode": 2, "finetune": 2}),
        ("health.spike=5,10", {"prepare": 1, "pretrain": 2}),
        ("evaluate.clips=2,4", {"prepare": 1, "pretrain": 1, "finetune": 1}),
        ("sampling.steps=4,8", {"pretrain": 1, "finetune": 1}),
    ],
)
def test_points_share_the_stages_that_do_not_depend_on_what_differs(grid: str, copies: dict[str, int]):
    plan = planned(grid)
    assert {stage: shared_by(plan, stage) for stage in copies} == copies
    for point in plan.points:
        assert {*point.own} | {*point.elsewhere} == {*point.config.stages}


def test_of_four_points_two_share_each_autoencode():
    plan = planned("autoencode.lr=1e-4,2e-4", "finetune.lr=1e-4,2e-4")
    by_stage = {}
    for shared in plan.shared:
        by_stage.setdefault(shared.stage, []).append(len(shared.points))
    assert by_stage == {"synth": [4], "prepare": [4], "pretrain": [4], "autoencode": [2, 2], "quantize": [2, 2]}
    order = [shared.key for shared in plan.shared]
    assert all(order.index(before) < order.index(shared.key) for shared in plan.shared for before in shared.after)


def test_the_names_of_keys_and_values_may_come_in_any_order():
    assert places(planned("lora.rank=2,4", "seed=1,2")) == places(planned("seed=2,1", "lora.rank=4,2"))


def test_latents_that_exist_elsewhere_are_nobodys_stage(prepared: Path):
    plan = planned("finetune.lr=1e-4,2e-4", f"data.latents={prepared / 'latents'}")
    assert [shared.stage for shared in plan.shared] == ["pretrain", "autoencode", "quantize"]


def test_one_folder_for_different_latents_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"one folder, but the points prepare different latents: leave data\.latents"):
        planned("data.clip_seconds=1,2", f"data.latents={tmp_path / 'mine'}")
    with pytest.raises(ValueError, match=r"log\.prometheus=.* is one file for several points: put \$\{name\}"):
        planned("seed=1,2", "log.prometheus=all.prom")
    planned("seed=1,2", "log.prometheus=${name}.prom")


def test_all_problems_of_all_points_are_told_at_once_with_the_point():
    with pytest.raises(ValueError, match="finetune") as raised:
        planned("finetune.lr=1e-4,-1,fast", "quantizer.size=32,33")
    told = str(raised.value).splitlines()
    assert any(
        line.startswith("finetune.lr=-1,quantizer.size=32 and 1 more: finetune.lr=-1.0 must be") for line in told
    )
    assert "finetune.lr=fast,quantizer.size=32 and 1 more: finetune.lr=fast is no number" in told
    assert any(
        line.startswith("finetune.lr=1e-4,quantizer.size=33: quantizer.size=33 is not a power of two") for line in told
    )
    with pytest.raises(ValueError, match=r"^unknown key finetune\.rl"):
        planned("finetune.lr=1,2", "finetune.rl=3")


def test_more_values_and_keys_keep_what_exists():
    first = planned("finetune.lr=1e-4,3e-4")
    begin(first)
    more = planned("lora.rank=4,8", "finetune.lr=0.0003,0.0001,5e-4")
    assert len(more.points) == 6
    kept = {point.name: point for point in more.points if point.name in places(first)}
    assert {name: point.elsewhere for name, point in kept.items()} == {
        point.name: point.elsewhere for point in first.points
    }
    assert [shared.stage for shared in more.shared].count("pretrain") == 1
    directory.make(more)
    record = read(Path("s"))
    assert [point.name for point in record.points[:2]] == [point.name for point in first.points]
    assert len({point.name for point in record.points}) == 6


def test_a_new_point_takes_the_stage_of_an_old_one_from_where_it_lies():
    """The first command had nothing to share, so that each point trained its own autoencode."""
    first = planned("autoencode.lr=1e-4,3e-4")
    begin(first)
    assert places(first)["autoencode.lr=1e-4"]["autoencode"] == "points/autoencode.lr=1e-4"
    more = planned("autoencode.lr=1e-4,3e-4", "finetune.lr=3e-4,5e-4")
    assert places(more)["autoencode.lr=1e-4,finetune.lr=5e-4"]["autoencode"] == "points/autoencode.lr=1e-4"
    [shared] = [each for each in more.shared if each.key == ("points/autoencode.lr=1e-4", "autoencode")]
    assert shared.points == ["autoencode.lr=1e-4", "autoencode.lr=1e-4,finetune.lr=5e-4"]
    assert next(point for point in more.points if point.name == "autoencode.lr=1e-4").own == [
        "finetune",
        "evaluate",
        "page",
    ]
    directory.make(more)
    link = Path("s/points/autoencode.lr=1e-4,finetune.lr=5e-4/autoencode")
    assert str(link.readlink()) == "../autoencode.lr=1e-4/autoencode"


@pytest.mark.parametrize("grid", ["finetune.lr=1e-4,3e-4", "finetune.lr=7e-4,8e-4"])
def test_other_settings_of_all_points_are_refused_with_the_mend(grid: str):
    begin(planned("finetune.lr=1e-4,3e-4"))
    with pytest.raises(ValueError, match=r"autoencode\.lr \(0\.0003 → 0\.0005\): set autoencode\.lr=0\.0003 as before"):
        planned(grid, "autoencode.lr=5e-4")
    with pytest.raises(
        ValueError, match=r"finetune\.samples \(64 → 128\).* let it differ with finetune\.samples=64,128"
    ):
        planned(grid, "finetune.samples=128")
    planned(grid, "log.every=8", "parallel.threads=1", "data.workers=1", "evaluate.clips=2")


def test_settings_may_change_while_nothing_has_begun():
    directory.make(planned("finetune.lr=1e-4,3e-4"))
    planned("finetune.lr=1e-4,3e-4", "finetune.samples=128")


def test_points_with_the_same_values_count_once():
    plan = planned("lora.rank=2,4,02,4", "lora.alpha=1,1.0")
    assert [point.name for point in plan.points] == ["lora.alpha=1,lora.rank=2", "lora.alpha=1,lora.rank=4"]
    assert plan.repeated == 6


def test_hundreds_of_points_are_not_compared_two_by_two(monkeypatch: pytest.MonkeyPatch):
    compared = []
    touches = sharing.touches
    monkeypatch.setattr(sharing, "touches", lambda *keys: compared.append(keys) or touches(*keys))
    known = KnownPoints({"old": ({"lora.rank": "4"}, {"seed": 0, "lora.rank": 4.0})}, ["seed"])
    for number in range(400):
        values = {"seed": 2**62 + number, "lora.rank": 4}
        assert known.same({}, values) is None
        known.add(f"p{number}", {}, values)
    assert known.same({}, {"seed": 2**62 + 7, "lora.rank": 4.0}) == "p7"
    assert known.same({}, {"seed": 0, "lora.rank": 4}) == "old"
    assert len(compared) < 5 * len(known.typed) * len(values)


@pytest.mark.parametrize(
    "values", ["'/x y/ä','/x y/ö'", "a/../b,'it''s'", "${oc.env:HOME},$(touch hacked)", f"{'x' * 300},{'y' * 300}"]
)
def test_hostile_values_make_points_of_their_own_inside_the_directory(values: str, tmp_path: Path):
    plan = planned(f"log.project={values}")
    directory.make(plan)
    assert len(plan.points) == 2
    for point in plan.points:
        assert Path(point.config.run_dir).resolve().parent == tmp_path / "s/points"
        assert (Path(point.config.run_dir) / "config.yaml").is_file()
    assert {point.config.log.project for point in recorded_plan(Path("s")).points} == {
        point.config.log.project for point in plan.points
    }
    assert not (tmp_path / "hacked").exists()


def test_a_directory_with_other_files_is_not_made_a_sweep(tmp_path: Path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s/mine.txt").touch()
    with pytest.raises(ValueError, match=r"holds mine\.txt and no sweep\.json"):
        directory.make(planned("seed=1,2"))
    plan = planned("seed=1,2", folder="t")
    (tmp_path / "t/points/seed=1/latents").mkdir(parents=True)
    shutil.copy(Path(__file__), tmp_path / "t/points/seed=1/latents")
    plan = planned("finetune.lr=1,2", folder="u")
    directory.make(plan)
    link = tmp_path / "u/points/finetune.lr=1/pretrain"
    link.unlink()
    link.mkdir()
    with pytest.raises(ValueError, match=r"is in the way of the pretrain that shared/pretrain-.* shares"):
        directory.make(plan)


def test_a_moved_directory_goes_on(tmp_path: Path):
    plan = planned("finetune.lr=1e-4,3e-4")
    begin(plan)
    (tmp_path / "s").rename(tmp_path / "moved")
    again = planned("finetune.lr=1e-4,3e-4", folder="moved")
    assert places(again) == places(plan)
    assert recorded_plan(tmp_path / "moved").points[0].config.run_dir == str(tmp_path / "moved/points/finetune.lr=1e-4")
    directory.make(again)
    assert (tmp_path / "moved/points/finetune.lr=1e-4/pretrain").resolve().is_relative_to(tmp_path / "moved/shared")


@pytest.mark.parametrize("place", ["../elsewhere", "/etc/passwd", "shared/a/b", "shared"])
def test_a_record_that_leads_out_of_the_directory_is_damaged(place: str):
    directory.make(planned("finetune.lr=1e-4,3e-4"))
    path = Path("s/sweep.json")
    content = json.loads(path.read_text())
    content["points"][0]["stages"]["pretrain"] = place
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"sweep\.json is damaged"):
        read(Path("s"))
    path.write_text(json.dumps(content | {"format": 2}))
    with pytest.raises(ValueError, match="newer version"):
        planned("finetune.lr=1e-4,3e-4")


def test_a_dry_run_shows_all_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["sweep", "tiny", "finetune.lr=1e-4,3e-4", "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "2 point(s) in runs/tiny-sweep" in told
    assert "finetune.lr=3e-4" in told
    assert "shared/pretrain-" in told
    assert list(tmp_path.iterdir()) == []


def test_stores_get_a_folder_for_each_run_directory():
    plan = planned("finetune.lr=1e-4,3e-4", "checkpoint.upload=s3://bucket/mine/")
    urls = {each.config.checkpoint.upload for each in (*plan.points, *plan.shared)}
    assert len(urls) == 2 + 5
    assert "s3://bucket/mine/points/finetune.lr=1e-4" in urls
