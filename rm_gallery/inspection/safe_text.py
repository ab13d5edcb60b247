"""Safe text: what stands in data made visible, so that it can neither steer a terminal nor break a line."""

from __future__ import annotations

import re
import unicodedata

# C0 and C1 controls (escape sequences begin with them), half characters, and marks that change the reading direction.
_HARMFUL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]")


def visible(text: str) -> str:
    """The text with harmful characters written as their codes; tabs and newlines stay."""
    return _HARMFUL.sub(lambda found: _code(found.group()), text)


def one_line(text: str) -> str:
    """The same on one line."""
    return visible(text).replace("\n", "\\n").replace("\t", "\\t")


def _code(character: str) -> str:
    if unicodedata.category(character) == "Cc" and ord(character) < 256:
        return f"\\x{ord(character):02x}"
    return f"\\u{ord(character):04x}"
