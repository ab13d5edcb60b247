"""How long the torch-free part takes to import, and which package the time goes to.

    python benchmarks/imports.py [--repeats 5] [--output FILE.json]

Imports rm_gallery.core.graders, .runner and .models in fresh processes with the import timer of Python. Prints the
median of the whole in milliseconds and the share of each top-level package by self time, largest first.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
from collections import Counter
from pathlib import Path

STATEMENT = "import rm_gallery.core.graders, rm_gallery.core.runner, rm_gallery.core.models"
HEAVY = ("torch", "transformers", "openai", "pandas", "numpy")


def time_imports() -> tuple[float, Counter[str]]:
    """(milliseconds in all, milliseconds of self time by top-level package) of one fresh process."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", STATEMENT], capture_output=True, text=True, check=True
    )
    shares: Counter[str] = Counter()
    for line in done.stderr.splitlines():
        found = re.match(r"import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)$", line)
        if found:
            package = found[2].partition(".")[0]
            owner = package if package not in sys.stdlib_module_names else "standard library"
            shares[owner] += int(found[1]) / 1000
    return shares.total(), shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    arguments = parser.parse_args()
    time_imports()  # fills the file cache; not counted
    runs = [time_imports() for _ in range(arguments.repeats)]
    total = statistics.median(whole for whole, _ in runs)
    packages = {package for _, shares in runs for package in shares}
    medians = {package: statistics.median(shares[package] for _, shares in runs) for package in packages}
    print(f"{STATEMENT}\nmedian of {len(runs)} runs: {total:.0f} ms")
    for package, each in sorted(medians.items(), key=lambda item: -item[1])[:10]:
        print(f"  {package:<20} {each:>7.1f} ms  {each / total:>6.1%}")
    loaded = sorted(packages & set(HEAVY))
    print(f"of {', '.join(HEAVY)}: {', '.join(loaded) if loaded else 'none'} loaded")
    if arguments.output:
        arguments.output.write_text(json.dumps({"milliseconds": total, "packages": medians}, indent=2) + "\n")


if __name__ == "__main__":
    main()
