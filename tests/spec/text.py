"""Reading the specification: code blocks by heading."""

from __future__ import annotations

import re


def code_blocks(spec: str, heading: str, language: str) -> list[str]:
    """Code blocks of one language under a heading, up to the next heading of the same or a higher level; dedented."""
    level = re.search(rf"^(#+) {re.escape(heading)}$", spec, re.MULTILINE)
    assert level, f"the specification has no heading {heading!r}"
    rest = spec[level.end() :]
    end = re.search(rf"^#{{1,{len(level.group(1))}}} ", _without_code(rest), re.MULTILINE)
    section = rest[: end.start()] if end else rest
    blocks = re.findall(rf"^( *)```{language}\n(.*?)^\1```", section, re.MULTILINE | re.DOTALL)
    return ["\n".join(line.removeprefix(indent) for line in body.splitlines()) + "\n" for indent, body in blocks]


def _without_code(text: str) -> str:
    """The same text with code blanked out at equal length, so that `# comments` are no headings."""
    return re.sub(
        r"^( *)```.*?^\1```", lambda m: re.sub(r"[^\n]", " ", m.group()), text, flags=re.MULTILINE | re.DOTALL
    )


def tab_blocks(spec: str, tab: str, language: str) -> list[str]:
    """Code blocks of one language in a content tab, `=== "Name"`."""
    start = spec.index(f'=== "{tab}"\n')
    rest = spec[start:].partition("\n")[2]
    end = re.search(r"^(?=\S)", rest, re.MULTILINE)
    body = rest[: end.start()] if end else rest
    return [
        "\n".join(line.removeprefix(indent) for line in block.splitlines()) + "\n"
        for indent, block in re.findall(rf"^( *)```{language}\n(.*?)^\1```", body, re.MULTILINE | re.DOTALL)
    ]
