"""What goes wrong with the hub, in words: which errors its client raises, which pass by themselves, what to do."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from rm_gallery.data.source.reasons import reason_of


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
            f"{site} cannot be reached ({reason_of(chain[-1])}); check the path and the network"
        )
    if isinstance(error, OSError) and error.errno is not None:
        return f"{where} cannot be put into the cache {constants.HF_HUB_CACHE} ({error.strerror}); mend that"
    return f"{where} cannot be downloaded ({reason_of(error)}); run the same command again"


def _chain(error: BaseException) -> list[BaseException]:
    """The error and those behind it."""
    found = [error]
    while (behind := found[-1].__cause__ or found[-1].__context__) is not None and behind not in found:
        found.append(behind)
    return found
