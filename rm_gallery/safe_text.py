"""Text that leaves the process: secrets are redacted, control characters are escaped.

    redact(value)        credentials in URLs, tokens and secrets of the environment, in a text or nested plain values
    safe(text)           redact and visible
    visible(text)        control characters as escapes, for a terminal or a page
    visible_line(text)   the same, with line breaks and tabs escaped too

The log formatter, `UserError`, saved configurations and the trackers use them, so no other place has to.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

HIDDEN = "***"
"""What replaces a credential."""

_Value = TypeVar("_Value")

# ---------------------------------------------------------------------------------------------- secrets

# In `https://user:password@host` everything before the last @ of the authority. In other schemes a user without a
# password stays: it is the container of abfs://container@account, or the user of ssh://git@host.
_WEB_USER = re.compile(r"\b((?:git\+)?(?:https?|ftps?|wss?)://)[^\s/?#'\"]*@", re.IGNORECASE)
# A secret key of AWS may hold slashes; `host:8080/path@1` is a port.
_USER_AND_PASSWORD = re.compile(
    r"\b([a-z][a-z0-9+.-]*://)[^\s/:@?#'\"]*:(?!\d+/)(?:(?!://)[^\s@?#'\"])*@", re.IGNORECASE
)
_SECRET_NAME = (
    r"[\w.-]*(?:token|secret|passw(?:or)?d|pwd|signature|credentials?|api[_-]?key|apikey|access[_-]?key(?:[_-]?id)?|"
    r"account[_-]?key|private[_-]?key|subscription-key|sas)|sig|key|auth|code|pass|policy|key-pair-id"
)
_QUERY = re.compile(rf"([?&#;](?:{_SECRET_NAME})=)[^&#;\s'\"]*[^&#;\s'\":,.)\]]", re.IGNORECASE)
_LONG_VALUE = re.compile(r"([?&#][\w.-]+=)(?=[^&#\s'\"]*\d)(?=[^&#\s'\"]*[a-z])[\w.~%+/=-]{32,}", re.IGNORECASE)
_TOKENS = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{16,}|github_pat_\w{16,}|glpat-[\w-]{16,}|"
    r"xox[abprs]-[\w-]{10,}|A(?:KIA|SIA)[A-Z0-9]{16}|AIza[\w-]{30,}|eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]{10,})"
)
_BEARER = re.compile(r"\b(Bearer|Basic) +[A-Za-z0-9._~+/=-]{8,}")

# Variables of the environment that hold secrets by convention: HF_TOKEN, WANDB_API_KEY, AWS_SECRET_ACCESS_KEY.
_SECRET_VARIABLE = re.compile(
    r"(?:TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_KEY|ACCOUNT_KEY|PRIVATE_KEY|CREDENTIALS?)$"
)
# Of a variable that a configuration reads, these words are enough.
_SECRET_WORD = re.compile(r"TOKEN|SECRET|PASS|PWD|KEY|AUTH|CRED|PRIVATE|SIGNATURE", re.IGNORECASE)
_PLAIN_VALUE = re.compile(r"[-+]?[\d._]+(?:e[-+]?\d+)?|true|false|null|none|[a-z]{1,7}", re.IGNORECASE)
_MIN_SECRET = 4

_read_variables: set[str] = set()
_values: set[str] = set()


def register_variable(name: str) -> None:
    """A configuration reads this variable of the environment: from now on `redact` replaces its value."""
    if name.isidentifier():
        _read_variables.add(name)


def register_secret(value: str) -> None:
    """A secret that is not in the environment, e.g. a key that a program passes: from now on `redact` replaces it."""
    if len(value) >= 8:
        _values.add(value)


def redact(value: _Value) -> _Value:
    """The value without secrets: a text, or lists and mappings of plain values, whose keys stay.

    Replaced are the user and password of a URL, its query parameters that authorize (`token`, `sig`, `X-Amz-...`),
    well-known forms of tokens, and values of the environment: secrets by the name of their variable, and what a
    configuration reads with `${oc.env:NAME}`, which becomes that text again. Paths and numbers stay.
    """
    redacted: _Value = _redacted(value, _secrets())
    return redacted


def _redacted(value: Any, secrets: list[tuple[str, str]]) -> Any:
    if isinstance(value, str):
        return _redacted_text(value, secrets)
    if isinstance(value, Mapping):
        return {key: _redacted(item, secrets) for key, item in value.items()}
    if isinstance(value, list):
        return [_redacted(item, secrets) for item in value]
    if isinstance(value, tuple):
        return tuple(_redacted(item, secrets) for item in value)
    return value


def _redacted_text(text: str, secrets: list[tuple[str, str]]) -> str:
    for secret, shown in secrets:
        if len(secret) >= 12:  # inside a word as well
            text = text.replace(secret, shown)
        elif secret in text:
            pattern = rf"(?<![A-Za-z0-9]){re.escape(secret)}(?![A-Za-z0-9])"
            text = re.sub(pattern, shown, text)
    text = redact_urls(text)
    if "Bearer" in text or "Basic" in text:
        text = _BEARER.sub(rf"\1 {HIDDEN}", text)
    return _TOKENS.sub(HIDDEN, text)


def redact_urls(text: str) -> str:
    """The text without the credentials of the URLs in it."""
    if "://" not in text:
        return text
    text = _WEB_USER.sub(rf"\1{HIDDEN}@", text)
    text = _USER_AND_PASSWORD.sub(rf"\1{HIDDEN}@", text)
    return _LONG_VALUE.sub(rf"\1{HIDDEN}", _QUERY.sub(rf"\1{HIDDEN}", text))


def _secrets() -> list[tuple[str, str]]:
    """Secret values of the environment, the longest first, each with what replaces it."""
    found = dict.fromkeys(_values, HIDDEN)
    for name, value in _secret_variables():
        for form in (value, quote(value, safe="")):
            found.setdefault(form, f"${{oc.env:{name}}}" if name in _read_variables else HIDDEN)
    return sorted(found.items(), key=lambda item: -len(item[0]))


def _secret_variables() -> Iterator[tuple[str, str]]:
    for name in _read_variables:
        value = os.environ.get(name, "").strip()
        if len(value) >= _MIN_SECRET and (_SECRET_WORD.search(name) or _may_be_secret(value)) and not _is_path(value):
            yield name, value
    for name, value in os.environ.items():
        if len(value) >= 8 and _SECRET_VARIABLE.search(name) and not _is_path(value):
            yield name, value.strip()


def _may_be_secret(value: str) -> bool:
    return not _PLAIN_VALUE.fullmatch(value) and "/" not in value and value != "."


def _is_path(value: str) -> bool:
    try:
        return value.startswith(("/", "~", "./", "../")) and len(value) < 1000 and Path(value).expanduser().exists()
    except (OSError, ValueError, RuntimeError):
        return False


def scrub(error: BaseException) -> BaseException:
    """Redact the messages of an error of another package and of its causes in place, before it becomes a cause.

    A program that does not catch it prints them with its traceback.
    """
    each: BaseException | None = error
    seen = set[int]()
    while each is not None and id(each) not in seen:
        seen.add(id(each))
        each.args = redact(each.args)
        for name in ("message", "errno", "strerror", "filename", "filename2"):  # of openai; the others of OSError
            if isinstance(text := getattr(each, name, None), str) and redact(text) != text:
                with suppress(AttributeError):
                    setattr(each, name, redact(text))
        each = each.__cause__ or each.__context__
    return error


def safe(text: str) -> str:
    """Redacted and with control characters escaped, for output that people read; line breaks stay."""
    return visible(redact(text))


# ----------------------------------------------------------------------------------- control characters

# C0 and C1 controls (terminal escape sequences), lone surrogates, marks that change the reading direction, other line
# separators, and invisible tags.
_CONTROL = re.compile(
    "[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\ud800-\\udfff\\u061c\\u200e\\u200f\\u2028-\\u202e\\u2066-\\u2069\\ufeff"
    "\\ufff9-\\ufffb\\U000e0000-\\U000e007f]"
)


def visible(text: str) -> str:
    """The text with control characters escaped (`\\x1b`); tabs and line breaks stay."""
    return _CONTROL.sub(lambda found: _escape(found.group()), text)


def visible_line(text: str) -> str:
    """The same with tabs and line breaks escaped too."""
    return visible(text).replace("\n", "\\n").replace("\t", "\\t")


def _escape(character: str) -> str:
    code = ord(character)
    if unicodedata.category(character) == "Cc" and code < 256:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
