"""Compare checkpoints with those of peers: python benchmarks/checkpoint.py [--json FILE] [--work DIR].

Two ranks train the same LoRA model under each system in turn and save it several times, with steps in between. Then two
ranks load the last checkpoint, and one rank does. Medians count. Each save starts only after everything written before
is on the disk. The program prints Markdown tables.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import ranks
from checkpoint_peers import RECIPE, SYSTEMS, UNIVERSAL
from ranks import say
from subject import make_base, recipe

TITLES = {
    "ours ddp": "this project, `ddp`",
    "ours zero2": "this project, `zero2`",
    "ours zero3": "this project, `zero3`",
    "ours fsdp2": "this project, `fsdp2`",
    "accelerate ddp": "Accelerate, DDP",
    "accelerate zero2": "Accelerate, ZeRO-2",
    "accelerate zero2, no base": "Accelerate, ZeRO-2, frozen excluded",
    "deepspeed zero2": "DeepSpeed, ZeRO-2",
    "deepspeed zero2, no base": "DeepSpeed, ZeRO-2, frozen excluded",
}
MEASURED = ("stall_s", "extra_s", "whole_s", "load_s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="a file to write the figures to")
    parser.add_argument("--work", type=Path, help="a folder on the disk to measure; default: the temporary folder")
    parser.add_argument(
        "--only", nargs="+", choices=list(SYSTEMS), default=[name for name in SYSTEMS if "zero3" not in name]
    )
    options = parser.parse_args()
    if options.work:
        options.work.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="spresso-benchmark-", dir=options.work))
    try:
        make_base(work, recipe(work, *RECIPE))
        figures = ranks.conditions("torch", "accelerate", "deepspeed") | {"systems": {}}
        for name in options.only:
            figures["systems"][name] = measure(name, work / name.replace(" ", "_").replace(",", ""))
    finally:
        shutil.rmtree(work)
    print(table(figures))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


def measure(name: str, folder: Path) -> dict[str, Any]:
    """Measure one system and return its figures; the checkpoints are removed."""
    folder.mkdir()
    log, begun = folder.with_suffix(".log"), time.perf_counter()
    saved = ranks.run("checkpoint_peers.py", 2, name, "save", folder, log=log)
    saved["half"] = load_on_one_rank(name, "half", folder, saved)
    if name in UNIVERSAL:
        saved["universal"] = convert(name, folder, saved)
    shutil.rmtree(folder)
    os.sync()
    stall, bytes_each = statistics.median(saved["stall_s"]), saved["bytes"] / saved["trained"]
    seconds = time.perf_counter() - begun
    say(f"{TITLES[name]}: a save stalls for {stall:.3f} s, {bytes_each:.2f} bytes a parameter ({seconds:.0f} s)")
    return saved


def load_on_one_rank(name: str, action: str, folder: Path, saved: dict[str, Any]) -> dict[str, Any]:
    """Load the checkpoint on one rank, half as many as saved it; return the figures or the `error`."""
    (folder / "saved.json").write_text(json.dumps(saved))
    try:
        return ranks.run("checkpoint_peers.py", 1, name, action, folder, log=folder.with_suffix(".log"))
    except SystemExit as error:
        return {"error": str(error).strip().splitlines()[-1]}


def convert(name: str, folder: Path, saved: dict[str, Any]) -> dict[str, Any]:
    """Convert a DeepSpeed checkpoint to a universal one, which another world size can load, and load it on one rank."""
    path = Path(saved["path"])
    universal = folder / "universal" / path.name
    program = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    options = ["--input_folder", path, "--output_folder", universal, "--num_extract_workers", "2"]
    begun = time.perf_counter()
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*program, *options], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"error": f"ds_to_universal: {done.stderr.strip().splitlines()[-1]}"}
    seconds = time.perf_counter() - begun
    bytes_written = sum(file.stat().st_size for file in universal.rglob("*") if file.is_file())
    loaded = load_on_one_rank(name, "universal", folder, saved | {"path": str(universal)})
    return {"convert_s": seconds, "bytes": bytes_written} | loaded


def table(figures: dict[str, Any]) -> str:
    """Return the medians of all figures as Markdown tables."""
    systems: dict[str, dict[str, Any]] = figures["systems"]
    any_one = next(iter(systems.values()))
    lines = [
        f"{ranks.describe(figures)} Two ranks, gloo; {any_one['frozen'] / 1e6:.1f} M frozen parameters, "
        f"{any_one['trained'] / 1e6:.2f} M trained ones; medians of {len(any_one['stall_s'])} saves.",
        "",
        "| system | stands still s | (the first) | steps beside longer by s | on the disk after s | load s | MB | "
        "bytes a trained parameter | loaded by half the ranks |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, figure in systems.items():
        stall, extra, whole, load = (statistics.median(figure[key]) for key in MEASURED)
        lines.append(
            f"| {TITLES[name]} | {stall:.3f} | {figure['stall_s'][0]:.3f} | {extra:+.2f} | {whole:.2f} | {load:.2f} | "
            f"{figure['bytes'] / 1e6:.0f} | {figure['bytes'] / figure['trained']:.2f} | {_halved(figure)} |"
        )
    return "\n".join([*lines, "", *_notes(systems), "", *_bars(systems)])


def _halved(figure: dict[str, Any]) -> str:
    direct = _loaded(figure["half"])
    if "universal" not in figure:
        return direct
    universal = figure["universal"]
    if "convert_s" not in universal:
        return f"{direct}; {universal['error']}"
    return f"{direct}; converted in {universal['convert_s']:.1f} s, then: {_loaded(universal)}"


def _loaded(outcome: dict[str, Any]) -> str:
    if "error" in outcome:
        error = outcome["error"]
        return f"fails: {error[:90]}{'…' * (len(error) > 90)}"
    equal = {True: "state equal to the bit, ", False: "state NOT equal, ", None: ""}[outcome["same"]]
    return f"{outcome['load_s']:.2f} s, {equal}losses within {outcome['departs']:.0e}"


def _notes(systems: dict[str, dict[str, Any]]) -> list[str]:
    departs = max(figure["departs"] for figure in systems.values())
    return [
        "*Stands still*: until the training thread goes on, the slower rank. *Steps beside*: by how much the two steps "
        "after the save take longer than usual. *On the disk*: ours when the whole checkpoint has its name, after "
        "fsync; the peers don't fsync, so theirs are saves of their own followed by fsync of each file. *Load*: ours "
        "with checksums verified. Ours holds value, two moments and EMA; the peers have no EMA and, under ZeRO, two "
        "copies of the value. Files are in the page cache when they are loaded. "
        f"Loaded by as many ranks, losses go on within {departs:.0e} of those without a stop.",
    ]


def _bars(systems: dict[str, dict[str, Any]]) -> list[str]:
    ours = {name: figure for name, figure in systems.items() if name.startswith("ours")}
    stalls = {name: statistics.median(figure["stall_s"]) for name, figure in systems.items()}
    peers = {name: stall for name, stall in stalls.items() if name not in ours}
    lines = ["| bar | " + " | ".join(TITLES[name] for name in ours) + " |", "|---|" + "---|" * len(ours)]
    if peers:
        best = min(peers, key=peers.__getitem__)
        shares = " | ".join(f"{stalls[name] / peers[best]:.3f} ×" for name in ours)
        lines.append(f"| stands still at most 1/10 of the best peer's ({TITLES[best]}) | {shares} |")
    sizes = " | ".join(f"{figure['bytes'] / figure['trained'] / 16 - 1:+.1%}" for figure in ours.values())
    halves = " | ".join("yes" if figure["half"].get("same") else "NO" for figure in ours.values())
    lines.append(f"| bytes within 5 % of 16 a trained parameter | {sizes} |")
    return [*lines, f"| loaded by half the ranks, no conversion | {halves} |"] if ours else []


if __name__ == "__main__":
    main()
