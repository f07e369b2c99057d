"""Names on the Hugging Face hub: `owner/name`, with a branch, tag or commit `owner/name@revision`.

A local path always wins over a name. Backbones are only looked for in the hub's cache on this machine; the small export
of a codec is fetched. Nothing that is fetched is executed. The token is huggingface_hub's own matter: this project
neither reads it nor passes it on. Importing this module needs neither torch nor huggingface_hub.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

_NAME = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[A-Za-z0-9][\w./-]*))?", re.ASCII)
_NO_NETWORK = "the hub can't be reached: connect this machine, or give a folder"
_WORDS = {
    401: "the hub does not know who asks: log in with  hf auth login  (or set HF_TOKEN)",
    403: "the hub does not allow this: take a token that may (huggingface.co/settings/tokens), or accept the model's "
    "licence on its page",
    404: "the hub has no such model, or it is private: correct the name, or log in with  hf auth login",
    413: "the hub takes no file as large as one of these: push fewer",
    429: "the hub gets too many requests: wait some minutes and repeat the command",
}
"""What an answer of the hub means, by its HTTP status, and what mends it."""


def is_hub_name(folder: str | Path) -> bool:
    """Whether `folder` has the form of a model's name on the hub, `owner/model` or `owner/model@revision`."""
    return _NAME.fullmatch(str(folder)) is not None


def split_name(name: str | Path) -> tuple[str, str | None]:
    """Return the model `owner/model` and the revision, or None, of a name on the hub. Raises ValueError."""
    if not (match := _NAME.fullmatch(str(name))):
        raise ValueError(f"{name} is not a name on the hub: give OWNER/NAME, such as alice/door-codec")
    return match["repo"], match["revision"]


def locate(folder: str | Path) -> Path:
    """Return the folder if it exists, or the copy in the hub's local cache if `folder` is a hub name.

    Nothing is downloaded. A copy of which only some files were downloaded is returned, too: what is missing of it is
    named by what reads it. If neither exists, `folder` itself is returned.
    """
    path = Path(folder)
    if path.exists() or not is_hub_name(folder):
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    repo, revision = split_name(folder)
    try:
        return Path(snapshot_download(repo, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError as error:
        partial = getattr(error, "snapshot_path", None)  # of a copy that lacks some of the files that the hub lists
        return Path(partial) if partial else path


def is_remote(folder: str | Path) -> bool:
    """Whether `folder` names something on the hub, and nothing here.

    A name whose first part is a folder here, such as `runs/tpyo`, is taken for a path.
    """
    path = Path(folder)
    return is_hub_name(folder) and not path.exists() and not path.parent.exists()


def fetch(name: str | Path, files: Sequence[str]) -> Path:
    """Return a folder with those of `files` that a model on the hub has; they are downloaded if they are not cached.

    Without a network, or with `HF_HUB_OFFLINE=1`, the cached copy is taken as it is.

    Raises:
        ValueError: there is no such model or revision, it is not open to this user, or it is not cached and the hub
            can't be reached.
    """
    from huggingface_hub import snapshot_download

    repo, revision = split_name(name)
    with hub_errors(str(name)):
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(files)))


@contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """Turn errors of huggingface_hub in the block into a ValueError of one line that names `what` and the mend.

    The words are our own, so that no part of a request, such as a header, can stand in them.
    """
    from huggingface_hub import errors

    try:
        yield
    except errors.RevisionNotFoundError:
        raise ValueError(f"{what}: the hub has no such revision: give a branch, a tag or a commit of it") from None
    except errors.GatedRepoError:
        raise ValueError(f"{what}: {_WORDS[403]}") from None
    except errors.RepositoryNotFoundError:  # the hub answers 401 to those who have not logged in
        raise ValueError(f"{what}: {_WORDS[404]}") from None
    except errors.LocalEntryNotFoundError:
        raise ValueError(f"{what} is not in the hub's cache on this machine, and {_NO_NETWORK}") from None
    except errors.HFValidationError as error:
        raise ValueError(f"{what} is not a name that the hub takes: {str(error).splitlines()[0]}") from None
    except errors.HfHubHTTPError as error:
        raise ValueError(f"{what}: {_answered(error.response.status_code, error.server_message)}") from None
    except (errors.HTTPError, ConnectionError):  # the first is the HTTP library's, of a connection that failed
        raise ValueError(f"{what}: {_NO_NETWORK}") from None
    except RuntimeError as error:  # huggingface_hub wraps what an upload raised
        if isinstance(error.__cause__, errors.HTTPError | OSError):
            raise ValueError(f"{what}: {_cause(error.__cause__)}") from None
        raise


def _answered(status: int, message: str | None) -> str:
    if status in _WORDS:
        return _WORDS[status]
    said = f" ({' '.join(message.split())})" if message else ""
    return f"the hub answered {status}{said}: repeat the command later, or see status.huggingface.co"


def _cause(error: BaseException) -> str:
    response = getattr(error, "response", None)
    return _NO_NETWORK if response is None else _answered(response.status_code, None)
