"""Hostile input, damage and concurrency against tiny models: what is refused, what is named, what stays the same.

    python -m benchmarks.hostile                       # all attempts: 6 to 8 minutes on two cores
    python -m benchmarks.hostile --only rows kill      # of an area, or with this part in their name
    python -m benchmarks.hostile --list                # names and expected outcomes

Each attempt is a function with an expected outcome, which it checks. At the end a table shows what happened; the exit
status is 0 only if every outcome was the expected one. `python -m benchmarks.faults` kills distributed runs at random.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

# Before a library reads them: no attempt may ask a hub.
os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")

import torch

from benchmarks.hostile.box import ATTEMPTS, Attempt, Box, Held, patched, remove_models
from rm_gallery.safe_text import visible_line
from rm_gallery.training import setup

AREAS = ("texts", "rows", "sources", "scoring", "models", "checkpoints", "messages")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME")
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args(arguments)
    for area in AREAS:
        import_module(f"benchmarks.hostile.{area}")
    chosen = [each for each in ATTEMPTS if not options.only or _matches(each.area, each.name, options.only)]
    if not chosen:
        print(f"no attempt is named {' or '.join(options.only)}; --list prints the names", file=sys.stderr)
        return 2
    if options.list:
        for each in chosen:
            print(f"{each.area}.{each.name}: {each.expected}")
        return 0
    torch.set_num_threads(1)  # forked processes compute too
    rows: list[tuple[Attempt, str, bool, float]] = []
    for each in chosen:
        start = time.monotonic()
        happened, ok = _try(each)
        rows.append((each, happened, ok, time.monotonic() - start))
        print(f"{'ok  ' if ok else 'FAIL'} {rows[-1][3]:5.1f} s  {each.area}.{each.name}: {happened}", flush=True)
    remove_models()
    print("\n| attempt | expected | what happened | ok |\n|---|---|---|---|")
    for each, happened, ok, _ in rows:
        print(f"| {each.area}.{each.name} | {each.expected} | {happened.replace('|', '/')} | {'yes' if ok else 'NO'} |")
    failed = [each.name for each, _, ok, _ in rows if not ok]
    print(f"\n{len(rows) - len(failed)} of {len(rows)} attempts held, {sum(row[3] for row in rows):.0f} s")
    return 1 if failed else 0


def _matches(area: str, name: str, only: list[str]) -> bool:
    return any(part == area or part in f"{area}.{name}" for part in only)


def _try(each: Attempt) -> tuple[str, bool]:
    """What happened, and whether it is what is expected."""
    before, environment = os.getcwd(), dict(os.environ)
    with tempfile.TemporaryDirectory(prefix="hostile-") as name:
        os.chdir(name)
        try:
            with patched(setup, "draw_curves", lambda run_dir: None):
                return _short(each.run(Box(Path(name)))), True
        except Held as error:
            return _short(str(error)), False
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            return _short(f"{type(error).__name__} at {Path(place.filename).name}:{place.lineno}: {error}"), False
        finally:
            os.chdir(before)
            os.environ.clear()
            os.environ.update(environment)


def _short(text: str) -> str:
    text = visible_line(text)
    return text if len(text) <= 200 else f"{text[:197]}..."


if __name__ == "__main__":
    sys.exit(main())
