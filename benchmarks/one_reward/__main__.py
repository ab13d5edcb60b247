"""One text, one reward: the same conversations over every route, against plain transformers, one text at a time.

Run it:  python -m benchmarks.one_reward FOLDER [--output FILE.json]

FOLDER is a checkpoint of a model that was trained on chats. The conversations are of very different lengths, some share
a prompt, and they have an empty response, Unicode, several turns, tools, and control tokens in a content. Each route
gets all of them at once, so that long and short ones are neighbors, and most get each alone too. The table has the
largest difference of a reward, in float32 on the CPU; the command ends with status 1 if one is above 1e-4. A route
whose package is missing is skipped with the reason.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.one_reward.routes import ROUTES, Route
from benchmarks.one_reward.setting import Setting, make_cases, plain_rewards, serving

TOLERANCE = 1e-4


@dataclass(frozen=True)
class Line:
    """What a route gave."""

    route: str
    call: str
    conversations: int = 0
    difference: float | None = None
    """The largest one; None if the route did not run."""
    skipped: str = ""


def compare(setting: Setting, routes: Sequence[Route] = ROUTES) -> list[Line]:
    """A line for each route."""
    setting.expected = setting.expected or plain_rewards(setting)
    lines = []
    for route in routes:
        if route.needs and importlib.util.find_spec(route.needs) is None:
            lines.append(Line(route.name, route.call, skipped=f"{route.needs} is not installed"))
            continue
        seen: set[int] = set()
        worst = 0.0
        for found in route.run(setting):
            seen |= set(found)
            worst = max([worst, *(abs(reward - setting.expected[number]) for number, reward in found.items())])
        lines.append(Line(route.name, route.call, len(seen), worst))
    return lines


def show(lines: Sequence[Line], setting: Setting) -> str:
    """The table."""
    rewards = setting.expected
    text = (
        f"{len(rewards)} conversations, rewards from {min(rewards):.3f} to {max(rewards):.3f} by plain transformers\n\n"
    )
    rows = [("route", "how it is called", "conversations", "largest difference"), ("---",) * 4]
    for line in lines:
        value = line.skipped or f"{line.difference:.1e}"
        rows.append((line.route, line.call, "" if line.skipped else str(line.conversations), value))
    return text + "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main() -> int:
    """Command line; the exit status."""
    parser = argparse.ArgumentParser(description="Compare the rewards of every route with plain transformers.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--output", type=Path, help="JSON file with the table")
    arguments = parser.parse_args()
    from transformers import AutoTokenizer

    cases = make_cases(tools="tools" in str(AutoTokenizer.from_pretrained(arguments.folder).chat_template))
    with tempfile.TemporaryDirectory() as scratch, serving(arguments.folder) as url:
        setting = Setting(arguments.folder, url, cases, Path(scratch))
        lines = compare(setting)
        setting.close()
    print(show(lines, setting))
    if arguments.output:
        arguments.output.write_text(json.dumps([asdict(line) for line in lines], indent=1) + "\n")
    return int(any((line.difference or 0.0) > TOLERANCE for line in lines))


if __name__ == "__main__":
    sys.exit(main())
