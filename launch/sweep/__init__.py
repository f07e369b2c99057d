"""Sweeps: many runs of one recipe that differ in some settings, and that share the stages which are the same for them.

`points` makes the settings of each run (`values`, `random_draws`, `points_file`, `names`), `sharing` finds the stages
that several runs share, `plan` puts both into a directory, and `here` and `jobs` carry it out on this machine and on
SLURM. `record` is the directory's `sweep.json`.
"""
