"""Text of a recipe in a batch script: it arrives as the value that it is, or is refused by its key; bash runs none."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from random import Random

import pytest
import yaml

from launch.slurm import submit
from launch.slurm.job_script import require_writable
from tests.mutant_counts import MutantCounts
from trainer.recipes.cluster import ClusterConfig
from trainer.recipes.reading import load_recipe


def cluster_file(folder: Path, **settings: object) -> Path:
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump({"kind": "slurm", "gpus_per_node": 0, **settings}))
    return path


def script(folder: Path, **settings: object) -> str:
    cluster = cluster_file(folder, **settings)
    config = load_recipe("tiny", [f"cluster={cluster}", f"run_dir={folder / 'run'}"])
    return dict(submit.scripts(config))["autoencode"]


@pytest.mark.parametrize("group", ["options", "srun", "environment"])
@pytest.mark.parametrize("key", ["A;touch x", "A B", "A\nB", "$(touch x)", "A=B", "1A", "", "é"])
def test_a_key_that_is_no_name_is_refused(group: str, key: str):
    told = ClusterConfig(**{group: {key: "1"}}).problems()
    assert len(told) == 1
    assert told[0].startswith(f"cluster.{group}.{key}".replace("\n", "\\x0a"))
    assert "\n" not in told[0]


def test_a_key_of_a_stage_s_own_is_refused_too(tmp_path: Path):
    cluster = cluster_file(tmp_path, stages={"prepare": {"environment": {"X;touch x": "1"}}})
    with pytest.raises(ValueError, match=r"cluster\.stages\.prepare\.environment\.X;touch x is no variable"):
        load_recipe("tiny", [f"cluster={cluster}"])


@pytest.mark.parametrize("key", ["partition", "account", "qos", "constraint", "mem", "python"])
def test_a_setting_of_two_lines_is_refused(key: str):
    told = ClusterConfig(**{key: "x\n#SBATCH --exclusive"}).problems()
    assert told == [f"cluster.{key}=x\\x0a#SBATCH --exclusive must be one line without control characters"]


@pytest.mark.parametrize("group", ["options", "srun"])
@pytest.mark.parametrize("value", ["x\n#SBATCH --exclusive", "\x1b[2J", ["a", "b"], {"a": 1}])
def test_an_option_that_is_not_one_line_is_refused(group: str, value: object):
    [told] = ClusterConfig(**{group: {"comment": value}}).problems()
    assert told.startswith(f"cluster.{group}.comment=")
    assert told.endswith("must be one line without control characters")
    assert told.isprintable()


@pytest.mark.parametrize("value", [None, ["a"], "a\0b"])
def test_what_is_no_value_of_a_variable_is_refused(value: object):
    [told] = ClusterConfig(environment={"A": value}).problems()
    assert told.startswith("cluster.environment.A=")


@pytest.mark.parametrize(
    "value",
    [
        *(
            "two words",
            "$(touch x)",
            "`touch x`",
            "a;touch x",
            "it's",
            '"',
            "\\",
            "a\\nb",
            "",
            "é→",
            "#x",
            "!x",
            "{a,b}",
        ),
        *("one\ntwo", "one\n#SBATCH --exclusive\ntwo", "it's\n\\n'$(touch x)'\r\t\x1b\x7f1", "\n"),
    ],
)
def test_a_variable_arrives_as_it_is(value: str, tmp_path: Path):
    text = script(tmp_path, environment={"ONE": value, "TWO": "2"})
    assert sum(line.startswith("#SBATCH --exclusive") for line in text.split("\n")) == 0
    exports = [line for line in text.split("\n") if line.startswith("export ")][:2]
    done = subprocess.run(
        ["bash", "-c", "\n".join([*exports, 'printf "%s|%s" "$ONE" "$TWO"'])],
        capture_output=True, cwd=tmp_path, check=True,
    )  # fmt: skip
    assert done.stdout.decode() == f"{value}|2"
    assert not (tmp_path / "x").exists()


PARTS = (
    *("\n", "\r", "\0", "\x1b[2J", "\u2028", "#SBATCH --uid=0", "\n#SBATCH --wrap='touch x'\n", "--uid=0"),
    *("$(touch x)", "`touch x`", ";touch x;", "&& touch x", "' touch x '", '" touch x "', "|touch x", "~"),
    *("\\", "%j", "a", "gpu", " ", "é"),
)
KEYS = ("partition", "account", "qos", "constraint", "mem", "options", "srun", "environment", "name")


def hostile_value(chance: Random) -> str:
    return "".join(chance.choice(PARTS) for _ in range(chance.randint(1, 4)))


def options_of(text: str) -> list[str]:
    """Return the names of the options that sbatch reads from a script, each from one line."""
    return sorted(line.split("=")[0].split("'")[0] for line in text.split("\n") if line.startswith("#SBATCH"))


def test_hostile_values_are_refused_or_arrive_as_they_are(tmp_path: Path, mutant_counts: MutantCounts):
    """bash runs every script up to its first command, and sbatch reads no option that was not given."""
    kind = "values of sbatch"
    for seed in range(40):
        chance = Random(seed)
        key, value = chance.choice(KEYS), hostile_value(chance)
        groups: dict[str, object] = {"options": {"comment": "a"}, "srun": {"comment": "a"}, "environment": {"A": "a"}}
        harmless = script(tmp_path, **{key: groups.get(key, "a")} if key != "name" else {})
        given: object = dict.fromkeys(groups[key], value) if key in groups else value  # type: ignore[attr-defined]
        mutant_counts.begin(kind)
        told = ""
        try:
            if key == "name":
                require_writable(value, tmp_path)
                text = harmless
            else:
                text = script(tmp_path, **{key: given})
        except ValueError as error:
            told = str(error)
        if told:
            assert "\n" not in told, seed
            mutant_counts.end(kind, refused=True)
            continue
        assert options_of(text) == options_of(harmless), (seed, key, value)
        exports = [line for line in text.split("\n") if line.startswith("export A=")]
        done = subprocess.run(
            ["bash", "-c", "\n".join([*exports, 'printf %s "$A"'])], capture_output=True, cwd=tmp_path
        )
        if key == "environment":
            assert done.stdout.decode() == value, seed
        assert not (tmp_path / "x").exists(), (seed, key, value)
        mutant_counts.end(kind, refused=False)
    assert mutant_counts.kinds[kind]["right"] > 0


def test_an_option_arrives_as_it_is(tmp_path: Path):
    text = script(tmp_path, options={"comment": "a;b $(c) #d 'e"}, srun={"export": "A=1;touch x,B=$(x)"})
    [line] = [line for line in text.split("\n") if line.startswith("#SBATCH --comment")]
    assert shlex.split(line.removeprefix("#SBATCH ")) == ["--comment=a;b $(c) #d 'e"]
    [srun] = [line for line in text.split("\n") if line.startswith("srun ")]
    assert "--export=A=1;touch x,B=$(x)" in shlex.split(srun)


def test_the_user_s_own_commands_stay(tmp_path: Path):
    text = script(tmp_path, setup=["module load cuda; export A=$(hostname)"], python="conda run -n a python")
    assert "\nmodule load cuda; export A=$(hostname)\n" in text
    assert "$(conda run -n a python -m launch.slurm.begin_end begin autoencode)" in text


def test_only_the_ranks_run_in_the_container(tmp_path: Path):
    text = script(tmp_path, python="host-python", container="apptainer exec --nv 'my image.sif'")
    lines = [line for line in text.split("\n") if " -m launch." in line]
    ranks = [line for line in lines if line.startswith("srun ")]
    assert [line.partition(" apptainer ")[2] for line in ranks] == [
        "exec --nv 'my image.sif' python3 -u -m launch.slurm.job_task autoencode"
    ]
    assert all("host-python -m launch.slurm.begin_end" in line for line in lines if line not in ranks)
    assert len(lines) == 3


def test_a_container_of_several_lines_is_refused():
    [told] = ClusterConfig(container="apptainer exec a.sif\n#SBATCH --exclusive").problems()
    assert "cluster.container" in told


def test_a_percent_sign_of_the_folder_is_none_of_slurm_s_patterns(tmp_path: Path):
    config = load_recipe("tiny", ["cluster=no_accounting", f"run_dir={tmp_path}/50%a $(x)"])
    text = dict(submit.scripts(config))["autoencode"]
    [output] = [line for line in text.split("\n") if line.startswith("#SBATCH --output")]
    assert shlex.split(output)[1] == f"--output={tmp_path}/50%%a $(x)/autoencode/logs/job_%j.out"
    [srun] = [line for line in text.split("\n") if line.startswith("srun ")]
    assert f"--output={tmp_path}/50%%a $(x)/autoencode/logs/job_%j_%t.out" in shlex.split(srun)
    assert f"export SPRESSO_RUN='{tmp_path}/50%a $(x)'" in text


@pytest.mark.parametrize(
    ("name", "run", "told"),
    [
        ("a\n#SBATCH --exclusive", "/runs/a", "name=a\\x0a#SBATCH --exclusive must be one line"),
        ("a", "/runs/a\n#SBATCH --exclusive", "run_dir=/runs/a\\x0a#SBATCH --exclusive must be one line"),
        ("a", "/runs/a:b", "run_dir=/runs/a:b holds :"),
        ("a", "/runs/a\\b", "run_dir=/runs/a\\b holds \\"),
    ],
)
def test_a_name_that_no_script_can_hold_is_refused(name: str, run: str, told: str):
    with pytest.raises(ValueError, match=f"^{re.escape(told)}"):
        require_writable(name, Path(run))
    require_writable("a b; 'c' $(d) %j", Path("/runs/a b; 'c' $(d) %j"))


def test_nothing_is_written_for_a_run_that_is_refused(tmp_path: Path):
    run = tmp_path / "a:b"
    config = load_recipe("tiny", ["cluster=no_accounting", f"run_dir={run}"])
    for submission in (submit.run, submit.whole_script):
        with pytest.raises(ValueError, match=r"run_dir=.* holds :"):
            submission(config)
    assert not run.exists()
