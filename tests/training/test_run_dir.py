"""The run folder: one process at a time, and every start told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rm_gallery.errors import UserError
from rm_gallery.training.run_dir import draw_curves, lock_run_dir, write_run_facts

HOLDER = """
import fcntl, sys
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
file.write("process 7 on here")
file.flush()
print("taken", flush=True)
sys.stdin.read()
"""


def test_a_folder_that_another_process_trains_in_is_refused_until_it_ends(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / ".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == b"taken\n"
        with pytest.raises(UserError, match="process 7 on here is training in this directory; stop it first"):
            with lock_run_dir(tmp_path, timeout=0):
                pass
    finally:
        holder.communicate()
    with lock_run_dir(tmp_path, timeout=0):
        assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")


def test_each_start_is_told(tmp_path: Path) -> None:
    for step in (0, 4, 6):
        write_run_facts(tmp_path, "config: 1\n", {"total_steps": 9}, start_step=step)
    facts = json.loads((tmp_path / "run.json").read_text())
    assert facts["start_step"] == 6 and facts["total_steps"] == 9
    assert [start["start_step"] for start in facts["earlier_starts"]] == [0, 4]
    assert {"command", "commit", "versions", "started"} <= facts["earlier_starts"][0].keys()


def test_a_run_json_that_cannot_be_read_is_written_anew(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"half')
    write_run_facts(tmp_path, "", {})
    assert json.loads((tmp_path / "run.json").read_text())["earlier_starts"] == []


def test_metrics_stay_on_resume_and_keep_another_name_otherwise(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    write_run_facts(tmp_path, "", {}, start_step=3)
    assert (tmp_path / "metrics.jsonl").exists()
    write_run_facts(tmp_path, "", {})
    assert not (tmp_path / "metrics.jsonl").exists() and len(list(tmp_path.glob("metrics-*.jsonl"))) == 1


@pytest.mark.slow
@pytest.mark.parametrize("metrics", [{"train/loss": 0.5}, {"val/accuracy": 0.5}, {"train/lr": 0.1}])
def test_curves_are_drawn_without_a_warning_where_metrics_are_missing(
    metrics: dict[str, float], tmp_path: Path
) -> None:
    """As of regression on single responses, which has no accuracy."""
    pytest.importorskip("matplotlib")
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps({'step': n, **metrics})}\n" for n in range(3)))
    path = draw_curves(tmp_path)
    assert path is not None and path.read_bytes()[1:4] == b"PNG"
