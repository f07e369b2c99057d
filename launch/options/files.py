"""The commands that inspect checkpoints and latents."""

from __future__ import annotations

from launch.number_option import add_number
from launch.options.common import Commands, add_command, add_workers, path
from models.ranges import Range


def add_commands(subs: Commands) -> None:
    """Add the commands that inspect checkpoints and latents."""
    checkpoint = add_command(
        subs, "checkpoint", "on_files:checkpoint", "list the checkpoints of a run, or describe one"
    )
    checkpoint.add_argument(
        "folder",
        type=path,
        metavar="DIR",
        help="directory of a run, or its name under runs/; or the directory of one checkpoint, step_…",
    )
    checkpoint.add_argument(
        "--verify",
        action="store_true",
        help="compare each checkpoint with its checksums, which reads all files in full",
    )

    index = add_command(
        subs,
        "index",
        "on_files:index",
        "build the index of existing tar files of latents, or verify the files with it",
    )
    index.add_argument(
        "folder", help="folder with *.tar files, made by `spresso prepare`, WebDataset or tar; or with train/ and test/"
    )
    index.add_argument("--verify", action="store_true", help="compare the tar files with their index and write nothing")
    index.add_argument(
        "--autoencoder",
        choices=("spectral", "magnitude", "magnitude_stereo", "woosh", "oobleck", "same"),
        help="autoencoder that made the latents (default: the one that the existing index names)",
    )
    index.add_argument("--autoencoder-folder", type=path, help="folder with its weights, for woosh, oobleck and same")
    add_workers(index)

    data = add_command(subs, "data", "on_files:data", "summarize a set of latents")
    data.add_argument("location", metavar="DIR", help="folder or URL of a set, or of its parent with train/ and test/")
    data.add_argument("--play-to", type=path, metavar="FOLDER", help="decode some samples to wav files in this folder")
    add_number(data, "--samples", Range(least=1), "number of samples to decode", default=5)
