"""Find out on a GPU what works, how exactly and how fast: docs/gpu.md explains each part.

    python -m benchmarks.gpu_check [--minutes 9] [--only PART ...] [--output FILE.json] [--device cuda|cpu]

Each part runs in a process of its own, which is ended when its time is up; the others run in any case. Results are
printed, and written to the JSON file, as they come. The last lines are one table. The exit status is 0 if nothing
failed; what cannot run here is skipped and named. `--minutes` scales repetitions and the number of systems that are
timed, never what is checked. Needs torch, transformers, numpy, safetensors and tokenizers, and no network.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.gpu_check.report import FAILED, MISSED, SKIPPED, Report, Result, read_results, table

_ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Limit:
    """Seconds that a part may take: for what it checks, and at nine minutes for what it measures."""

    checks: float
    measures: float = 0.0

    def seconds(self, minutes: float) -> float:
        return self.checks + self.measures * minutes / 9


PARTS = {
    "facts": Limit(15, 5),
    "kernels": Limit(120, 10),
    "training": Limit(215),
    "scoring": Limit(30),
    "throughput": Limit(40, 90),
    "estimate": Limit(15),
    "emulate": Limit(60),
}
"""In order of importance. A part runs `benchmarks.gpu_check.PART.run`; `emulate` is for --device cpu only."""
_ON_CPU = 4.0
"""Limits are longer by this factor with --device cpu, where compiling and training take longer."""


def run_part(part: str, command: Sequence[str], file: Path, seconds: float, show: Callable[[Result], None]) -> None:
    """Run a part in a process, show its results as they come, and end the process when its time is up."""
    log = file.with_suffix(".log")
    with log.open("wb") as out:
        child = subprocess.Popen(
            command, cwd=_ROOT, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
    deadline, shown, started, problem = time.monotonic() + seconds, 0, "", ""
    try:
        while True:
            ended = child.poll() is not None  # before the results are read, so that none is missed
            results, started = read_results(file)
            for each in results[shown:]:
                show(each)
            shown = len(results)
            if ended:
                break
            if time.monotonic() > deadline:
                problem = f"ended after {seconds:.0f} s, in: {started or 'start'}"
                break
            time.sleep(0.2)
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)  # its own children too: they are in its process group
        child.wait()
    if not problem and child.returncode:
        problem = f"exit status {child.returncode} in: {started or 'start'}"
    if problem:
        tail = log.read_text(errors="replace")[-4000:]
        show(Result(part, "whole part", FAILED, problem, "", {"output": tail}))


def child(part: str, file: Path, device: str, minutes: float, seconds: float, earlier: Path) -> None:
    """Run a part in this process."""
    import torch

    done = json.loads(earlier.read_text())["results"] if earlier.is_file() else []
    report = Report(
        part, torch.device(device, 0) if device == "cuda" else torch.device(device),
        deadline=time.monotonic() + 0.9 * seconds, minutes=minutes, file=file,
        earlier=[Result(**each) for each in done],
    )  # fmt: skip
    importlib.import_module(f"benchmarks.gpu_check.{part}").run(report)


def check(parts: Sequence[str], device: str, minutes: float, output: Path) -> list[Result]:
    """Run the parts one after the other; the results are in the JSON file after each."""
    results: list[Result] = []
    start = time.monotonic()

    def show(result: Result) -> None:
        results.append(result)
        print(
            f"{time.monotonic() - start:5.0f} s  {result.part}: {result.what}: {result.result} {result.figure}",
            flush=True,
        )
        write(results, output)

    write(results, output)
    with tempfile.TemporaryDirectory() as folder:
        for part in parts:
            file = Path(folder) / f"{part}.jsonl"
            seconds = PARTS[part].seconds(minutes) * (_ON_CPU if device == "cpu" else 1)
            values = [part, str(file), device, str(minutes), str(seconds), str(output.resolve())]
            run_part(part, [sys.executable, "-m", "benchmarks.gpu_check", "--child", *values], file, seconds, show)
    return results


def write(results: Sequence[Result], output: Path) -> None:
    """Replace the JSON file by one with these results."""
    partial = output.with_name(f".{output.name}.partial")
    partial.write_text(json.dumps({"results": [asdict(each) for each in results]}, indent=1, default=str) + "\n")
    partial.replace(output)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--minutes", type=float, default=9.0, help="for all parts; scales what is measured (default: 9)"
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help="of: " + " ".join(PARTS))
    parser.add_argument("--output", type=Path, help="JSON file with all details (default: a temporary one)")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--child", nargs=6, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        part, file, device, minutes, seconds, earlier = options.child
        child(part, Path(file), device, float(minutes), float(seconds), Path(earlier))
        return 0
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no GPU; --device cpu runs the same code on small sizes")
    parts = [
        part for part in PARTS if part in (options.only or PARTS) and (part, options.device) != ("emulate", "cuda")
    ]
    with tempfile.TemporaryDirectory() as folder:
        results = check(parts, options.device, options.minutes, options.output or Path(folder) / "gpu_check.json")
    counts = {name: sum(each.result == name for each in results) for name in (FAILED, MISSED, SKIPPED)}
    print()
    print(table(results))
    print(f"{counts[FAILED]} failed, {counts[MISSED]} goals missed, {counts[SKIPPED]} skipped")
    return 1 if counts[FAILED] else 0


if __name__ == "__main__":
    sys.exit(main())
