"""benchmarks/gpu_check: every part runs with --device cpu in its smallest size, and on a GPU where there is one."""

from __future__ import annotations

import importlib
import json
import math
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.gpu_check import __main__ as command
from benchmarks.gpu_check import emulate, estimate, throughput
from benchmarks.gpu_check.report import FAILED, MISSED, OK, SKIPPED, Report, Result, read_results, table
from benchmarks.gpu_check.small_model import TINY, make_folder, worst
from benchmarks.gpu_check.throughput import Timed, idle_share
from rm_gallery.planning.devices import GPUS

pytestmark = pytest.mark.slow

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


def has_ended(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_a_part_that_hangs_is_ended_and_its_last_check_is_named(tmp_path: Path) -> None:
    found = ended(tmp_path, f"echo '{ROW}' >> FILE; {START} sleep 600 & echo $! > FILE.pid; wait", seconds=1.0)
    assert [(each.what, each.result) for each in found] == [("sdpa", OK), ("whole part", FAILED)]
    assert found[1].figure == "ended after 1 s, in: flex bf16"
    child = int((tmp_path / "part.jsonl.pid").read_text())
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not has_ended(child):  # a signal takes effect a little later
        time.sleep(0.05)
    assert has_ended(child), "the processes that the part started have ended too"


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


def timed(system: str = "auto", **values: Any) -> Timed:
    """A measurement of the tiny shape as on a GPU."""
    sizes = {"layers": 2, "seconds": 0.1, "pairs_per_second": 40.0, "tokens_per_second": 1e4, "mfu": 0.45}
    return Timed(**{"shape": "tiny", "system": system, "peak_bytes": 1, "checkpointing": False, **sizes, **values})


def test_the_goals_of_throughput() -> None:
    report = Report("throughput", torch.device("cuda"))
    throughput._add_auto(report, timed(shape="1.5b", layers=28, peak_bytes=65 * 2**30))
    throughput._add_auto(report, timed(shape="7b", layers=11, mfu=0.56, peak_bytes=57 * 2**30))
    systems = {name: timed(name, pairs_per_second=rate) for name, rate in
               (("auto", 40.0), ("padded", 16.0), ("trl", 20.0), ("compile", 48.0), ("flex", 36.0))}  # fmt: skip
    throughput._add_ratios(report, "1.5b", systems)
    assert [(each.what, each.result, each.figure, each.bound) for each in report.results] == [
        ("1.5b auto", MISSED, "40/s, MFU 45%, 65.0 GiB", "50%"),
        ("7b auto, 11 layers", OK, "40/s, MFU 56%, 57.0 GiB", "50%"),
        ("1.5b baselines", MISSED, "2.50x padded, 2.00x trl", "2.5x trl"),
        ("1.5b settings/auto", "", "compile 1.20 flex .90", ""),
    ]


def test_an_estimate_of_memory_that_is_off_fails_and_one_of_time_misses_its_goal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    report = Report("estimate", torch.device("cuda"), tiny=True)
    monkeypatch.setattr(estimate, "device_rate", lambda _: 1e12)
    estimate._compare(report, timed())
    exact = report.results[0].details
    for memory, seconds in ((1.0, 1.0), (1.1, 0.9), (1.0, 2.0), (0.8, 1.0)):
        peak = round(exact["memory"] * memory)
        estimate._compare(report, timed(peak_bytes=peak, seconds=exact["time"] * seconds))
    assert [(each.result, each.figure) for each in report.results[1:]] == [
        (OK, "memory +0.0%, time +0.0%"), (OK, "memory -9.1%, time +11.1%"), (MISSED, "memory +0.0%, time -50.0%"),
        (FAILED, "memory +25.0%, time +0.0%"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "gib", "kind"),
    [
        ("NVIDIA H100 80GB HBM3", 79.2, "h100"), ("NVIDIA H200", 139.8, "h200"), ("NVIDIA L40S", 44.4, "l40s"),
        ("NVIDIA A100-SXM4-40GB", 39.4, "a100-40"), ("NVIDIA A100-SXM4-80GB", 79.1, "a100-80"), ("NVIDIA X1", 8, None),
    ],
)  # fmt: skip
def test_the_published_rate_of_a_gpu(name: str, gib: float, kind: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=int(gib * 2**30)))
    assert estimate.device_rate(torch.device("cuda")) == (kind and GPUS[kind].bf16_flops)


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
