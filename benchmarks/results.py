"""Compare each rate of an evaluation with the next lower one: python benchmarks/results.py EVALUATION.json [KEY …].

The keys are those of `systems` in the report, from the highest rate to the lowest (default: continuous z and the rates
of the run itself, then those of `evaluate.codecs`). Every system decodes the same clips, so that a difference is taken
clip by clip; its 95 % interval is a bootstrap over the clips.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from trainer.evaluate.bootstrap import excludes_zero, interval, mean_replicates  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, help="evaluation.json")
    parser.add_argument("keys", nargs="*", help="systems, from the highest rate to the lowest")
    options = parser.parse_args()
    report = json.loads(options.report.read_text())
    systems = {system["key"]: system for system in report["systems"]}
    keys = options.keys or [key for key, system in systems.items() if system["role"] == "system" and system["page"]]
    figures = [name for name in ("log_mel", "mrstft", "denoising", "retrieval") if name in report["results"][keys[0]]]
    count = len(report["results"][keys[0]]["log_mel"]["clips"])
    print(f"{count} clips\n\n| | payload, kbps | {' | '.join(figures)} | frechet |")
    print("|---" * (3 + len(figures)) + "|")
    for key, system in systems.items():
        if scores := report["results"].get(key):
            print(f"| {system['title']} ({key}) | {system['payload_kbps'] or ''} | ", end="")
            print(" | ".join(told(scores.get(name)) for name in (*figures, "frechet")), "|")
    print("\n| from | to | log-mel, dB | denoising error, 10⁻³ |\n|---|---|---|---|")
    for better, worse in itertools.pairwise(keys):
        pair = [report["results"][key] for key in (better, worse)]
        print(f"| {better} | {worse} | {difference(pair, 'log_mel', 1)} | {difference(pair, 'denoising', 1e3)} |")


def told(score: dict[str, Any] | None) -> str:
    """Return a mean, half its interval, and in brackets the mean with another clip's z or codes."""
    if score is None:
        return ""
    half = f" ± {(score['ci'][1] - score['ci'][0]) / 2:.3g}" if score.get("ci") else ""
    return f"{score['mean']:.4g}{half}" + (f" [{score['control']:.4g}]" if score.get("control") else "")


def difference(pair: list[dict[str, Any]], figure: str, scale: float) -> str:
    """Return the mean difference and its interval; bold if the interval excludes zero."""
    if any(figure not in scores for scores in pair):
        return ""
    first, second = (np.array([np.nan if v is None else v for v in scores[figure]["clips"]]) for scores in pair)
    bounds = interval(mean_replicates(second - first))
    text = f"{scale * np.nanmean(second - first):+.4g} [{scale * bounds[0]:.4g}, {scale * bounds[1]:.4g}]"
    return f"**{text}**" if excludes_zero(bounds) else text


if __name__ == "__main__":
    main()
