"""Datasets of the Hugging Face hub: list a repository, choose files, download them into the cache of the hub.

The newest commit is looked up at every start; without a network the cached one is used. Errors of the hub's client are
translated here: which are transient, and what to do.
"""

from __future__ import annotations

import glob
import logging
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies

from rm_gallery.data.sources.config import FileEntry, Role, refuse_keys
from rm_gallery.data.sources.local import has_pattern
from rm_gallery.data.sources.records import checked_kind, data_files, kind_of, of_one_kind, suffixes
from rm_gallery.data.sources.splits import Layout, choose_split, choose_subset, layout_of, matching_paths, report_choice
from rm_gallery.errors import UserError, one_line

log = logging.getLogger(__name__)

_NAME = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*)(?:/(?P<inside>[^\0]+))?")
_WAITS = (1.0, 4.0)
"""Seconds before each retry. The client of the hub retries downloads by itself, but not the look-up of a commit."""
_Result = TypeVar("_Result")


def is_hub_name(text: str) -> bool:
    """Whether a text can name a hub dataset, as `org/name` or `org/name/path`; `data/a.parquet` is a local path."""
    match = _NAME.fullmatch(text)
    return match is not None and (match["inside"] is not None or kind_of(match["repo"]) is None)


@dataclass(frozen=True, slots=True)
class HubFile:
    """A completely downloaded file of a hub dataset."""

    name: str
    """`org/name/path`."""
    path: Path
    commit: str


def download(entry: FileEntry, split: str | None, revision: str | None, role: Role, what: str) -> list[HubFile]:
    """The files that a hub name means, in order, downloaded if they are not cached.

    split, revision: None for the default split of `role` and the newest state.
    what: start of messages. Raises UserError for files that do not exist or cannot be downloaded.
    """
    match = _NAME.fullmatch(entry.path)
    assert match is not None
    inside = match["inside"] or ""
    if kind_of(inside) is not None or has_pattern(inside):
        refuse_keys(entry, what, "split")
    repo = _Repository(match["repo"], revision, what)
    chosen = choose_paths(repo.paths, repo.readme, inside, entry.subset, split, role, what)
    return [
        HubFile(f"{repo.name}/{path}", local, repo.commit)
        for path, local in zip(chosen, repo.fetch(chosen), strict=True)
    ]


def choose_paths(
    paths: Sequence[str], readme: str, inside: str, subset: str | None, split: str | None, role: Role, what: str
) -> list[str]:
    """The files of a repository that an entry names.

    inside: the part after `org/name/`: a file, a glob, a folder, or `SPLIT.parquet` if no such file exists.
    Raises UserError, naming the files that exist, if none fits.
    """
    if inside in paths:
        checked_kind(inside, what=what)
        return [inside]
    if has_pattern(inside):
        found = data_files(matching_paths(inside, paths))
        if not found:
            raise UserError(f"{what}: no data file of the repository matches the pattern; {_contents(paths)}")
        return of_one_kind(found, what=what, where=inside.rpartition("/")[0] + "/")
    layout = layout_of(paths, readme)
    if not layout.subsets:
        raise UserError(
            f"{what}: the repository has no data file that can be read ({_contents(paths)}); try the revision "
            "refs/convert/parquet, which the hub keeps for many datasets"
        )
    if not inside:
        splits = choose_subset(layout, subset, what)
        chosen = choose_split(splits, split, role, what)
        every = [path for each in splits.values() for path in each]
        report_choice(chosen, every, split, what, level=logging.INFO)  # that a repository has splits is usual
        return _one_kind_of(chosen, what)
    below = [path for path in paths if path.startswith(f"{inside.rstrip('/')}/")]
    if below:
        start = f"{inside.rstrip('/')}/"
        inner = layout_of([path.removeprefix(start) for path in below])
        if not inner.subsets:
            raise UserError(f"{what}: that folder of the repository has no data file; {_contents(paths)}")
        chosen = choose_split(choose_subset(inner, None, what), split, role, what)
        return _one_kind_of([start + path for path in chosen], what)
    return _one_kind_of(_split_file(layout, paths, inside, subset, role, what), what)


def _split_file(
    layout: Layout, paths: Sequence[str], inside: str, subset: str | None, role: Role, what: str
) -> list[str]:
    """Files of the split that `SPLIT.parquet` or `SUBSET/SPLIT.parquet` names."""
    folder, _, name = inside.rpartition("/")
    if kind_of(name) is None or (folder and folder not in layout.subsets):
        raise UserError(f"{what}: the repository has no such file or folder; {_contents(paths)}")
    splits = choose_subset(layout, folder or subset, what)
    return choose_split(splits, name.removesuffix("".join(suffixes(name))), role, what)


def _one_kind_of(paths: list[str], what: str) -> list[str]:
    repo = what.partition("=")[2]
    return of_one_kind(paths, what=what, where=f"{'/'.join(repo.split('/')[:2])}/**/")


def _contents(paths: Sequence[str]) -> str:
    names = data_files(paths) or sorted(path for path in paths if not path.startswith("."))
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"it holds {', '.join(names[:5])}{more}" if names else "it is empty"


class _Repository:
    """A dataset repository at one commit."""

    def __init__(self, name: str, revision: str | None, what: str) -> None:
        self.name = name
        self._what = what
        self._revision = revision
        # With the README, the client looks up the commit and caches the list of files.
        folder = Path(self._snapshot(revision, ["README.md", ".gitattributes"]))
        self.commit = folder.name
        self.paths = self._list(folder)
        readme = folder / "README.md"
        self.readme = readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else ""

    def fetch(self, paths: Sequence[str]) -> list[Path]:
        """Local paths of these files, downloaded if they are not cached."""
        folder = Path(self._snapshot(self.commit, [glob.escape(path) for path in paths]))
        return [folder / path for path in paths]

    def _list(self, folder: Path) -> list[str]:
        from huggingface_hub import HfApi, get_cached_repo_tree
        from huggingface_hub.errors import CachedRepoTreeNotFoundError

        try:
            tree = get_cached_repo_tree(self.name, repo_type="dataset", revision=self.commit)
            return [file.path for file in tree]
        except CachedRepoTreeNotFoundError:  # a read-only cache, or one of an older client
            api = HfApi(endpoint=endpoint())
            listed = self._tried(lambda: api.list_repo_files(self.name, repo_type="dataset", revision=self.commit))
            return list(listed)

    def _snapshot(self, revision: str | None, patterns: Sequence[str]) -> str:
        from huggingface_hub import snapshot_download

        return self._tried(
            lambda: snapshot_download(
                self.name,
                repo_type="dataset",
                revision=revision,
                allow_patterns=list(patterns),
                endpoint=endpoint(),
                # If one of several threads loses its connection, the client closes those of the others too.
                max_workers=1,
            )
        )

    def _tried(self, call: Callable[[], _Result]) -> _Result:
        """Result of the call, retried after transient errors; raises UserError if it fails."""
        go_offline_if_unreachable()
        try:
            return retry(self.name, call, waits=_WAITS, is_transient=_is_transient)
        except client_errors() as error:
            where = f"{self.name} at revision {self._revision!r}" if self._revision else self.name
            raise UserError(f"{self._what}: {hub_message(error, self.name, where)}") from error


def retry(
    name: str, call: Callable[[], _Result], *, waits: Sequence[float], is_transient: Callable[[Exception], bool]
) -> _Result:
    """Result of the call; after a transient error, calls again after each of the given waits in seconds.

    name: file or dataset, for the log. Raises what the last call raised.
    """
    for wait in waits:
        try:
            return call()
        except Exception as error:
            if not is_transient(error):
                raise
            log.warning("%s: the connection failed (%s); retrying", name, one_line(error))
            time.sleep(wait)
    return call()


def endpoint() -> str | None:
    """URL of the hub from the environment, read at each call; None for the default of the client."""
    return os.environ.get("HF_ENDPOINT") or None


_unreachable: dict[str, str] = {}  # URL of a hub -> why it cannot be reached
_CONNECT_S = 3.0


def go_offline_if_unreachable() -> None:
    """Set the client to offline mode if no connection to the hub can be made, with a warning.

    The client would try each file again for up to a minute. Behind a proxy nothing is checked.
    """
    from huggingface_hub import constants

    site = urlsplit(endpoint() or constants.ENDPOINT)
    if constants.HF_HUB_OFFLINE or site.scheme in getproxies():
        return
    reason = _why_unreachable(site.hostname or "", site.port or (80 if site.scheme == "http" else 443))
    if reason:
        constants.HF_HUB_OFFLINE = True
        _unreachable[site.geturl()] = reason
        log.warning("%s cannot be reached (%s): only models and datasets in the cache are used", site.geturl(), reason)


def _why_unreachable(host: str, port: int) -> str:
    """Why no connection can be made within `_CONNECT_S`; "" if it can."""
    reasons = [f"no answer within {_CONNECT_S:g} s"]

    def connect() -> None:
        try:
            socket.create_connection((host, port), timeout=_CONNECT_S).close()
        except OSError as error:
            reasons.append(one_line(error))
        else:
            reasons.append("")

    # In a thread: the timeout of a socket is for each address of a host, and the look-up of its name has none.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(_CONNECT_S)
    return reasons[-1]


def why_offline() -> str:
    """Why only the cache of the hub is used, for messages; "" if the hub is used."""
    from huggingface_hub import constants

    site = endpoint() or constants.ENDPOINT
    if not constants.HF_HUB_OFFLINE:
        return ""
    return f"{site} cannot be reached ({_unreachable[site]})" if site in _unreachable else "HF_HUB_OFFLINE is set"


def check_model_name(path: str, *, key: str) -> None:
    """Raise UserError for a path that does not exist, and for a name that is not cached if the hub cannot be reached.

    Loads neither torch nor transformers, which take longer than this check.
    """
    from huggingface_hub import try_to_load_from_cache

    folder = Path(path).expanduser()
    if folder.exists():
        return
    if folder.is_absolute() or path.startswith((".", "~")):
        raise UserError(f"{key}={path}: no such folder (working directory {Path.cwd()})")
    go_offline_if_unreachable()
    try:
        is_cached = isinstance(try_to_load_from_cache(path, "config.json"), str)
    except ValueError as error:  # not a name that the hub allows
        raise model_not_found(path, error, key=key) from error
    if why_offline() and not is_cached:
        raise model_not_found(path, key=key)


def model_not_found(path: str, error: Exception | None = None, *, key: str) -> UserError:
    """The error for a name that is neither a folder nor, as far as can be seen, a model of the hub."""
    here = f"working directory {Path.cwd()}"
    if offline := why_offline():
        return UserError(
            f"{key}={path}: no such folder ({here}), and no model of this name in the cache of the hub while "
            f"{offline}; give a model folder"
        )
    reason = f" ({one_line(error)})" if error is not None else ""
    return UserError(f"{key}={path}: neither a folder ({here}) nor a model on the hub{reason}; give a model folder")


def client_errors() -> tuple[type[Exception], ...]:
    """What calls to the hub raise.

    OSError is the base of the client's errors, ValueError means a name that the client does not allow, RecursionError
    too many retries of a download; errors of its HTTP library have a separate base class.
    """
    from huggingface_hub.errors import HfHubHTTPError

    http = [base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception)]
    return (OSError, ValueError, RecursionError, *http)


def _is_transient(error: Exception) -> bool:
    """Whether a retry can help: a dropped connection, or a server error (5xx)."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    if not isinstance(error, client_errors()):
        return False
    answer = next((each for each in _chain(error) if isinstance(each, HfHubHTTPError)), None)
    if answer is not None:
        return answer.response.status_code >= 500
    known = (LocalEntryNotFoundError, FileNotFoundError, PermissionError, ValueError)
    is_full_disk = isinstance(error, OSError) and error.errno is not None
    return not isinstance(error, known) and not is_full_disk


def hub_message(error: BaseException, repo: str, where: str) -> str:
    """What went wrong with a dataset of the hub and what to do, without its configuration key.

    where: the dataset with its revision.
    """
    from huggingface_hub import constants, errors

    chain = _chain(error)
    site = endpoint() or constants.ENDPOINT

    def find(*kinds: Any) -> Any:
        return next((each for each in chain if isinstance(each, kinds)), None)

    if find(errors.GatedRepoError):
        return f"{repo} is gated: accept its terms at {site}/datasets/{repo} and set HF_TOKEN to a token of yours"
    if find(errors.RevisionNotFoundError):
        return f"{repo} has no such revision; name a branch, a tag or a full commit hash"
    answer = find(errors.HfHubHTTPError)
    status = None if answer is None else answer.response.status_code
    if find(errors.RepositoryNotFoundError) or status == 401:  # the answer for missing and for private ones
        return (
            f"no local file or folder (working directory {Path.cwd()}), and {site} has no dataset {repo}; correct "
            "the name, or set HF_TOKEN to a token that may read it if it is private"
        )
    if find(errors.RemoteEntryNotFoundError):
        return f"{where} has no such file; check the path"
    if find(errors.DisabledRepoError):
        return f"access to {repo} is disabled by the hub; choose another dataset"
    if status == 403:
        return f"{site} denies access to {repo}; accept its terms and set HF_TOKEN to a token with read access"
    if site in _unreachable and (find(errors.OfflineModeIsEnabled) or find(errors.LocalEntryNotFoundError)):
        return (
            f"no local file or folder (working directory {Path.cwd()}), and {where} is not complete in the cache while "
            f"{why_offline()}; check the path and the network"
        )
    if find(errors.OfflineModeIsEnabled):
        return (
            f"no local file or folder, and {where} is not complete in the cache while HF_HUB_OFFLINE is set; unset it"
        )
    if isinstance(error, errors.LocalEntryNotFoundError):
        return (
            f"no local file or folder (working directory {Path.cwd()}), and {where} is not complete in the cache while "
            f"{site} cannot be reached ({one_line(chain[-1])}); check the path and the network"
        )
    if isinstance(error, OSError) and error.errno is not None:
        return f"{where} cannot be put into the cache {constants.HF_HUB_CACHE} ({error.strerror}); fix that"
    return f"{where} cannot be downloaded ({one_line(error)}); run the same command again"


def _chain(error: BaseException) -> list[BaseException]:
    """The error and its causes."""
    found = [error]
    while (cause := found[-1].__cause__ or found[-1].__context__) is not None and cause not in found:
        found.append(cause)
    return found
