"""Stand-ins for SLURM's commands: each writes down how it was called and answers as the test says."""

from __future__ import annotations

from pathlib import Path

COMMAND = """#!/bin/bash
echo "{name} $*" >> {folder}/calls
count=$(grep -c '^{name} ' {folder}/calls)
answer={folder}/{name}.$count
[ -e "$answer" ] || answer={folder}/{name}
if [ -e "$answer" ]; then . "$answer"; fi
"""


class Fakes:
    """A folder to be first in PATH."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.bin = folder / "bin"
        self.bin.mkdir()
        for name in ("sbatch", "scancel", "scontrol", "squeue", "sacct", "srun"):
            self.command(name)

    def command(self, name: str) -> None:
        path = self.bin / name
        path.write_text(COMMAND.format(name=name, folder=self.folder))
        path.chmod(0o755)

    def answer(self, name: str, bash: str, *, time: int | None = None) -> None:
        """What a command does, each time or at one time."""
        (self.folder / (name if time is None else f"{name}.{time}")).write_text(bash + "\n")

    def calls(self, name: str) -> list[str]:
        """How a command was called."""
        path = self.folder / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line.removeprefix(f"{name} ") for line in lines if line.startswith(f"{name} ")]
