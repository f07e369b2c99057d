"""The commands for public weights and the hub."""

from __future__ import annotations

from launch.number_option import add_number
from launch.options.common import Commands, add_command, path
from models.ranges import Range


def add_commands(subs: Commands) -> None:
    """Add the commands for public weights and the hub."""
    weights = add_command(
        subs, "weights", "on_hub:weights", "list the public weights to start from and how to get them, or check some"
    )
    weights.add_argument(
        "folder",
        nargs="?",
        type=path,
        metavar="FOLDER",
        help="folder of a release or an export, name in the hub's cache, or archive, to check for missing and damaged "
        "files (default: list all weights)",
    )
    help_ = "put a codec on the Hugging Face hub, with its model card; `hf auth login` comes first"
    push = add_command(subs, "push", "on_hub:push", help_)
    push.add_argument("codec", type=path, metavar="RUN", help="directory or name of a run, or an export folder")
    push.add_argument("name", metavar="OWNER/NAME", help="name on the hub; the model is created if it does not exist")
    push.add_argument("--private", action="store_true", help="make a private model")
    push.add_argument("--revision", metavar="BRANCH", help="branch to commit to (default: main)")
    push.add_argument(
        "--evaluation", type=path, metavar="FOLDER", help="evaluation whose figures to show (default: the run's)"
    )
    sounds = "clips of the evaluation to upload, with their decodes; you need the right to publish them"
    add_number(push, "--sounds", Range(least=0, most=100), sounds, default=0)
    push.add_argument(
        "--license", metavar="ID", help="the codec's licence by the hub's name, such as cc-by-4.0 (default: its base's)"
    )
    push.add_argument("--dry-run", action="store_true", help="print the files and the card; upload nothing")
