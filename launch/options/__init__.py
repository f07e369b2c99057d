"""The commands of `spresso` and their options, one module for each module of `launch.commands`.

Nothing here imports torch or a command, so that `spresso --help` is fast.
"""
