"""Data sets of the Hugging Face hub: list a repository, choose the files, download them into the hub's cache.

A commit decides what is read, so the newest state is looked up at every start; without a network the cache serves.
What goes wrong with the hub is put in words here: what its client raises, what passes by itself, what to do.
"""

from __future__ import annotations

import glob
import logging
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rm_gallery.data.sources.config import FileEntry, Role, refuse_keys
from rm_gallery.data.sources.local import Layout, choose_split, choose_subset, has_pattern, layout_of, matching_paths
from rm_gallery.data.sources.records import checked_kind, data_files, kind_of, of_one_kind, suffixes
from rm_gallery.errors import UserError, one_line

log = logging.getLogger(__name__)

_NAME = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*)(?:/(?P<inside>[^\0]+))?")
_WAITS = (1.0, 4.0)
"""Seconds before each further try when a connection broke off; the hub's client tries several times by itself."""
_Result = TypeVar("_Result")


def is_hub_name(text: str) -> bool:
    """Whether a text can name a hub data set, as `org/name` or `org/name/path`; `data/a.parquet` is a local path."""
    match = _NAME.fullmatch(text)
    return match is not None and (match["inside"] is not None or kind_of(match["repo"]) is None)


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of a hub data set that lies whole in the cache."""

    name: str
    """`org/name/path`."""
    path: Path
    commit: str


def download(entry: FileEntry, split: str | None, revision: str | None, role: Role, what: str) -> list[HubFile]:
    """The files that a hub name means, in order.

    split, revision: those wanted, or None for the split that fits `role` and for the newest state.
    what: begins each sentence. Raises UserError for whatever keeps the files from being there whole.
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
    """Which files of a repository are meant.

    inside: what follows `org/name/`: a file, a glob, a folder, or `SPLIT.parquet` where no such file exists.
    Raises UserError that says what there is when nothing fits.
    """
    if inside in paths:
        checked_kind(inside, what=what)
        return [inside]
    if has_pattern(inside):
        found = data_files(matching_paths(inside, paths))
        if not found:
            raise UserError(f"{what}: no data file of the repository matches the pattern; {_what_there_is(paths)}")
        return of_one_kind(found, what=what, where=inside.rpartition("/")[0] + "/")
    layout = layout_of(paths, readme)
    if not layout.subsets:
        raise UserError(
            f"{what}: the repository holds no data file that can be read ({_what_there_is(paths)}); try the revision "
            "refs/convert/parquet, which the hub keeps for many data sets"
        )
    if not inside:
        return _one_kind_of(choose_split(choose_subset(layout, subset, what), split, role, what), what)
    below = [path for path in paths if path.startswith(f"{inside.rstrip('/')}/")]
    if below:
        start = f"{inside.rstrip('/')}/"
        inner = layout_of([path.removeprefix(start) for path in below])
        if not inner.subsets:
            raise UserError(f"{what}: that folder of the repository holds no data file; {_what_there_is(paths)}")
        chosen = choose_split(choose_subset(inner, None, what), split, role, what)
        return _one_kind_of([start + path for path in chosen], what)
    return _one_kind_of(_split_file(layout, paths, inside, subset, role, what), what)


def _split_file(
    layout: Layout, paths: Sequence[str], inside: str, subset: str | None, role: Role, what: str
) -> list[str]:
    """Files of the split that `SPLIT.parquet` or `SUBSET/SPLIT.parquet` means."""
    folder, _, name = inside.rpartition("/")
    if kind_of(name) is None or (folder and folder not in layout.subsets):
        raise UserError(f"{what}: the repository has no such file or folder; {_what_there_is(paths)}")
    splits = choose_subset(layout, folder or subset, what)
    return choose_split(splits, name.removesuffix("".join(suffixes(name))), role, what)


def _one_kind_of(paths: list[str], what: str) -> list[str]:
    repo = what.partition("=")[2]
    return of_one_kind(paths, what=what, where=f"{'/'.join(repo.split('/')[:2])}/**/")


def _what_there_is(paths: Sequence[str]) -> str:
    names = data_files(paths) or sorted(path for path in paths if not path.startswith("."))
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"it holds {', '.join(names[:5])}{more}" if names else "it is empty"


class _Repository:
    """One data set repository at one commit; what it lists and what it fetches belong together."""

    def __init__(self, name: str, revision: str | None, what: str) -> None:
        self.name = name
        self._what = what
        self._revision = revision
        # The README goes first: with it the client looks the commit up and keeps the list of files in its cache.
        folder = Path(self._snapshot(revision, ["README.md", ".gitattributes"]))
        self.commit = folder.name
        self.paths = self._list(folder)
        readme = folder / "README.md"
        self.readme = readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else ""

    def fetch(self, paths: Sequence[str]) -> list[Path]:
        """Local paths of these files, whole; those that the cache lacks are downloaded."""
        folder = Path(self._snapshot(self.commit, [glob.escape(path) for path in paths]))
        return [folder / path for path in paths]

    def _list(self, folder: Path) -> list[str]:
        from huggingface_hub import HfApi, get_cached_repo_tree
        from huggingface_hub.errors import CachedRepoTreeNotFoundError

        try:
            tree = get_cached_repo_tree(self.name, repo_type="dataset", revision=self.commit)
            return [file.path for file in tree]
        except CachedRepoTreeNotFoundError:  # a cache that cannot be written to, or that an older client filled
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
                # When one of several threads loses its connection, the client closes those of the others too.
                max_workers=1,
            )
        )

    def _tried(self, call: Callable[[], _Result]) -> _Result:
        """What the call gives; tried again when the connection broke off, and refused in words when it fails."""
        for wait in (*_WAITS, None):
            try:
                return call()
            except failures() as error:
                if wait is None or not is_passing(error):
                    where = f"{self.name} at revision {self._revision!r}" if self._revision else self.name
                    raise UserError(f"{self._what}: {hub_sentence(error, self.name, where)}") from error
                log.warning("%s: %s; trying again", self.name, one_line(error))
                time.sleep(wait)
        raise AssertionError("the last try returns or raises")


def endpoint() -> str | None:
    """The hub to ask, read when it is asked; None for the client's default."""
    return os.environ.get("HF_ENDPOINT") or None


def failures() -> tuple[type[Exception], ...]:
    """What calls to the hub raise: the client's errors are OSErrors, those of its HTTP library share one base class,
    a name that the client does not allow is a ValueError, and it tries broken downloads again by recursion."""
    from huggingface_hub.errors import HfHubHTTPError

    return (
        OSError,
        ValueError,
        RecursionError,
        *(base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception)),
    )


def is_passing(error: BaseException) -> bool:
    """Whether another try may help: the connection broke off, or the server had a bad moment."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    answer = next((each for each in _chain(error) if isinstance(each, HfHubHTTPError)), None)
    if answer is not None:
        return answer.response.status_code >= 500
    known = (LocalEntryNotFoundError, FileNotFoundError, PermissionError, ValueError)
    is_full_disk = isinstance(error, OSError) and error.errno is not None
    return not isinstance(error, known) and not is_full_disk


def hub_sentence(error: BaseException, repo: str, where: str) -> str:
    """What went wrong with a data set of the hub and what to do, without the key that it stands under.

    where: the data set with its revision.
    """
    from huggingface_hub import constants, errors

    chain = _chain(error)
    site = endpoint() or constants.ENDPOINT

    def met(*kinds: Any) -> Any:
        return next((each for each in chain if isinstance(each, kinds)), None)

    if met(errors.GatedRepoError):
        return f"{repo} is gated: accept its terms at {site}/datasets/{repo} and set HF_TOKEN to a token of yours"
    if met(errors.RevisionNotFoundError):
        return f"{repo} has no such revision; name a branch, a tag or a full commit hash"
    answer = met(errors.HfHubHTTPError)
    status = None if answer is None else answer.response.status_code
    if met(errors.RepositoryNotFoundError) or status == 401:  # which a hub says of both
        return (
            f"no local file or folder (working directory {Path.cwd()}), and {site} has no data set {repo}; correct "
            "the name, or set HF_TOKEN to a token that may read it if it is private"
        )
    if met(errors.RemoteEntryNotFoundError):
        return f"{where} has no such file; check the path"
    if met(errors.DisabledRepoError):
        return f"access to {repo} is disabled by the hub; name another data set"
    if status == 403:
        return f"{site} refuses access to {repo}; set HF_TOKEN to a token that may read it and accept its terms"
    if met(errors.OfflineModeIsEnabled):
        return (
            f"no local file or folder, and {where} is not whole in the cache while HF_HUB_OFFLINE is set; unset it once"
        )
    if isinstance(error, errors.LocalEntryNotFoundError):
        return (
            f"no local file or folder (working directory {Path.cwd()}), and {where} is not whole in the cache while "
            f"{site} cannot be reached ({one_line(chain[-1])}); check the path and the network"
        )
    if isinstance(error, OSError) and error.errno is not None:
        return f"{where} cannot be put into the cache {constants.HF_HUB_CACHE} ({error.strerror}); mend that"
    return f"{where} cannot be downloaded ({one_line(error)}); run the same command again"


def _chain(error: BaseException) -> list[BaseException]:
    """The error and those behind it."""
    found = [error]
    while (behind := found[-1].__cause__ or found[-1].__context__) is not None and behind not in found:
        found.append(behind)
    return found
