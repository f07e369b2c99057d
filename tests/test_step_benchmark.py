"""What a training step asks of a GPU, counted without one: a bound that holds what has been reached."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "step.py"
MOST_KERNELS = 1200


def test_a_step_of_the_released_size_takes_few_kernels():
    done = subprocess.run([sys.executable, str(BENCHMARK), "--top", "99"], capture_output=True, text=True, check=True)
    rows = {words[0]: words[1:] for words in map(str.split, done.stdout.splitlines()) if words}
    forward, backward, both = (int(rows[name][0]) for name in ("forward", "backward", "both"))
    assert 0 < forward + backward == both <= MOST_KERNELS
    for kernel in ("sum_norm", "sum_norm_backward", "turn_heads", "turn_heads_backward"):
        assert int(rows[kernel][0]) > 20
    assert "native_layer_norm" not in rows
    assert int(rows["_to_copy"][0]) < 20
