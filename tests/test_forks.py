"""The fork server that the tests of several processes share."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests import forks


def tell(path: Path, status: int) -> int:
    """Write what a process finds, and end with a status."""
    print("told")
    found = {"modules": sorted(sys.modules), "directory": os.getcwd(), "variables": dict(os.environ)}
    (path / f"{os.environ.get('RANK', 'none')}.json").write_text(json.dumps(found))
    return status


def wait_long() -> None:
    signal.pause()


@pytest.mark.slow
def test_a_process_has_all_modules_and_the_place_and_environment_of_its_caller(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (in_tmp / "before").mkdir()
    log = in_tmp / "log"
    assert forks.start(tell, in_tmp, 0, log=log).wait(60) == 0  # the server runs at the latest from here on
    monkeypatch.chdir(in_tmp / "before")
    monkeypatch.setenv("SET_LATER", "yes")
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert forks.start(tell, in_tmp, 3, log=log, variables={"RANK": "7"}).wait(60) == 3
    found = json.loads((in_tmp / "7.json").read_text())
    assert {"torch", "hydra", "matplotlib.figure", "transformers", "torch.distributed.run"} <= set(found["modules"])
    assert found["directory"] == str(in_tmp / "before")
    assert found["variables"] == {**os.environ, "RANK": "7"}
    assert log.read_text() == "told\ntold\n"


@pytest.mark.slow
def test_ranks_have_the_variables_of_a_launcher(in_tmp: Path) -> None:
    started = forks.ranks(2, tell, in_tmp, 0, log=in_tmp / "log")
    assert forks.finish(started, 60) == [0, 0]
    found = [json.loads((in_tmp / f"{rank}.json").read_text())["variables"] for rank in range(2)]
    for rank, variables in enumerate(found):
        assert variables["LOCAL_RANK"] == str(rank)
        assert variables["WORLD_SIZE"] == variables["LOCAL_WORLD_SIZE"] == "2"
        assert variables["MASTER_PORT"] == found[0]["MASTER_PORT"]


@pytest.mark.slow
def test_who_does_not_end_in_time_is_ended(in_tmp: Path) -> None:
    started = [forks.start(wait_long, log=in_tmp / "log")]
    with pytest.raises(subprocess.TimeoutExpired):
        forks.finish(started, 0.1)
    assert started[0].wait(60) == -signal.SIGKILL


SCRIPT = """
import json, os, signal, sys
assert __name__ == "__main__"
handlers = [signal.getsignal(each) is signal.SIG_DFL for each in (signal.SIGTERM, signal.SIGHUP)]
found = {"variables": dict(os.environ), "handlers": handlers, "arguments": sys.argv}
open(f"{os.environ['RANK']}.{os.environ['TORCHELASTIC_RESTART_COUNT']}", "w").write(json.dumps(found))
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == "1":
    os.kill(os.getpid(), signal.SIGKILL)
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    signal.pause()
sys.exit(0)
"""


@pytest.mark.slow
def test_torchrun_starts_forked_workers_as_it_starts_others(in_tmp: Path) -> None:
    """And starts them again when one was killed; the other one, which waits, is ended at once."""
    (in_tmp / "script.py").write_text(SCRIPT)
    options = ("--standalone", "--nproc_per_node=2", "--max_restarts=1")
    process = forks.torchrun(*options, str(in_tmp / "script.py"), "a=b", log=in_tmp / "log")
    assert forks.finish([process], 25) == [0], (in_tmp / "log").read_text()
    for rank in range(2):
        found = json.loads((in_tmp / f"{rank}.1").read_text())
        assert found["handlers"] == [True, True]
        assert found["arguments"] == [str(in_tmp / "script.py"), "a=b"]
        variables = found["variables"]
        expected = {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0",
            "TORCHELASTIC_RESTART_COUNT": "1", "TORCHELASTIC_MAX_RESTARTS": "1",
        }  # fmt: skip
        assert expected.items() <= variables.items()
        assert {"MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_USE_AGENT_STORE"} <= set(variables)
    assert not (in_tmp / "0.2").exists()


@pytest.mark.slow
def test_torchrun_fails_with_its_worker(in_tmp: Path) -> None:
    (in_tmp / "script.py").write_text("import sys\nprint('out of here')\nsys.exit(5)\n")
    process = forks.torchrun("--standalone", str(in_tmp / "script.py"), log=in_tmp / "log")
    assert forks.finish([process], 60) == [1]
    output = (in_tmp / "log").read_text()
    assert "out of here" in output
    assert "exitcode  : 5" in output
