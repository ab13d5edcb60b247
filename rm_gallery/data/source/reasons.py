"""What a library said when something failed, short enough to stand in the middle of our sentence."""

from __future__ import annotations

_LONGEST = 200


def reason_of(error: BaseException) -> str:
    """First line of the error, or of the error behind it when it says nothing; its type when none says anything."""
    seen: BaseException | None = error
    while seen is not None:
        lines = [line.strip() for line in str(seen).splitlines() if line.strip()]
        if lines:
            text = lines[0].rstrip(".:; ")
            return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."
        seen = seen.__cause__ or seen.__context__
    return type(error).__name__
