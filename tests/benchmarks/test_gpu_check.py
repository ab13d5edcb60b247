"""benchmarks/gpu_check: every part runs with --device cpu in its smallest size, and on a GPU where there is one."""

from __future__ import annotations

import importlib
import json
import math
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_check import __main__ as command
from benchmarks.gpu_check import emulate
from benchmarks.gpu_check.report import FAILED, MISSED, OK, SKIPPED, Report, Result, read_results, table
from benchmarks.gpu_check.small_model import TINY, make_folder, worst
from benchmarks.gpu_check.throughput import idle_share

SLOW = ("training", "throughput")


def part(name: str, device: str) -> list[Result]:
    report = Report(name, torch.device(device), tiny=True)
    importlib.import_module(f"benchmarks.gpu_check.{name}").run(report)
    return report.results


@pytest.mark.parametrize(
    "name", [pytest.param(each, marks=pytest.mark.slow if each in SLOW else ()) for each in command.PARTS]
)
def test_every_part_runs_on_a_cpu(name: str) -> None:
    found = part(name, "cpu")
    assert found
    assert [each for each in found if each.result in (FAILED, MISSED)] == []


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["facts", "kernels", "training", "scoring"])
def test_every_part_runs_on_a_gpu(name: str) -> None:
    assert [each for each in part(name, "cuda") if each.result == FAILED] == []


def ended(tmp_path: Path, script: str, seconds: float = 30.0) -> list[Result]:
    """The results of a part whose process runs a shell script; FILE in it is the file of results."""
    found: list[Result] = []
    file = tmp_path / "part.jsonl"
    command.run_part("kernels", ["sh", "-c", script.replace("FILE", str(file))], file, seconds, found.append)
    return found


START = 'echo \'{"started": "flex bf16"}\' >> FILE; '
ROW = json.dumps(vars(Result("kernels", "sdpa", OK)))


def test_a_part_that_hangs_is_ended_and_its_last_check_is_named(tmp_path: Path) -> None:
    begin = time.monotonic()
    found = ended(tmp_path, f"echo '{ROW}' >> FILE; {START} sleep 60 & echo $! > FILE.pid; wait", seconds=1.0)
    assert time.monotonic() - begin < 10
    assert [(each.what, each.result) for each in found] == [("sdpa", OK), ("whole part", FAILED)]
    assert found[1].figure == "ended after 1 s, in: flex bf16"
    child = int((tmp_path / "part.jsonl.pid").read_text())
    state = Path(f"/proc/{child}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z", (
        "the processes that the part started have ended too"
    )


def test_a_part_that_crashes_has_failed_and_its_results_stay(tmp_path: Path) -> None:
    found = ended(tmp_path, f"echo '{ROW}' >> FILE; {START} echo no memory >&2; kill -9 $$")
    assert [(each.what, each.result) for each in found] == [("sdpa", OK), ("whole part", FAILED)]
    assert found[1].figure == "exit status -9 in: flex bf16" and "no memory" in found[1].details["output"]


def test_a_check_that_raises_has_failed_and_the_next_one_runs(tmp_path: Path) -> None:
    report = Report("kernels", torch.device("cpu"), file=tmp_path / "part.jsonl")
    with report.check("first"):
        raise RuntimeError("no kernel\nimage")
    with report.check("second"):
        report.add("second", True, "1", "2")
    assert [(each.what, each.result, each.figure) for each in report.results] == [
        ("first", FAILED, "RuntimeError: no kernel image"), ("second", OK, "1"),
    ]  # fmt: skip
    assert read_results(tmp_path / "part.jsonl") == (report.results, "second")


def test_the_table_fits_a_terminal() -> None:
    rows = [
        Result("throughput", "1.5b auto", MISSED, "47.9/s, MFU 49%, 65.5 GiB", "50%"),
        Result("throughput", "liger, trl", SKIPPED, "not installed: " + "a long name, " * 9),
        Result("kernels", "a name that is longer than its column", FAILED, "9 of 24 cases: " + "x" * 99, "2e-05"),
    ]
    rows.append(Result("training", "bf16 = fp32", OK, "bf16 0.005, 0.01", "0.0001 0.001"))
    lines = table(rows).splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[2] == "throughput 1.5b auto               missed 47.9/s, MFU 49%, 65.5 GiB          50%"
    assert lines[5] == "training   bf16 = fp32             ok     bf16 0.005, 0.01          0.0001 0.001"
    assert lines[3].startswith("           liger, trl              skip   not installed: a long name")


@pytest.mark.parametrize(
    ("results", "status"), [([OK, SKIPPED, MISSED, ""], 0), ([OK, FAILED], 1)], ids=["nothing failed", "one failed"]
)
def test_exit_status(
    results: list[str], status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "check", lambda *_: [Result("facts", "device", each) for each in results])
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--device", "cpu"])
    assert command.main() == status
    assert capsys.readouterr().out.splitlines()[-1].endswith("failed, " + f"{MISSED in results:d} goals missed, "
                                                             f"{SKIPPED in results:d} skipped")  # fmt: skip


def test_idle_share_counts_overlapping_kernels_once() -> None:
    assert idle_share([(0, 4), (1, 3), (6, 10)]) == pytest.approx(0.2)
    assert idle_share([(0, 1)]) == 0


def test_curves_that_differ_in_length_or_are_not_finite_do_not_agree() -> None:
    assert worst([1.0, 2.0], [1.0, 2.5]) == 0.5
    assert worst([1.0], [1.0, 2.0]) == worst([math.nan], [1.0]) == worst([], []) == math.inf


def test_ranks_of_a_fake_process_group_hold_their_shards(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", TINY)
    rows = {}
    for strategy, group_size in (("ddp", -1), ("fsdp2", -1), ("fsdp2", 4)):
        with emulate.fake_group(8):
            shapes = emulate.step_of_rank(folder, strategy, 8, group_size)  # type: ignore[arg-type]
        rows[strategy, group_size] = shapes["network.model.layers.0.mlp.gate_proj.weight"]
    assert rows == {("ddp", -1): [64, 32], ("fsdp2", -1): [8, 32], ("fsdp2", 4): [16, 32]}
