"""Processes that are forked from one that has loaded everything: loading torch takes longer than a small run.

The standard library's fork server starts with the first process that is wanted, and ends with this one.
"""

from __future__ import annotations

import functools
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing import forkserver, get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_LOADED = "tests.loaded"
_NO_MORE: Mapping[str, str] = {}


class Forked:
    """A forked process; to be handled as a subprocess.Popen."""

    def __init__(self, act: Callable[..., Any], arguments: Sequence[Any], log: Path, more: Mapping[str, str]) -> None:
        self.log = log
        self._process = server().Process(target=_be, args=(act, arguments, log, {**os.environ, **more}))
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Exit status. Raises subprocess.TimeoutExpired."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(f"a forked process; its log is {self.log}", timeout or 0.0)
        return self._process.exitcode

    def terminate(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()


def start(act: Callable[..., Any], *arguments: Any, log: Path, variables: Mapping[str, str] = _NO_MORE) -> Forked:
    """Call a function of a module in a process of its own, with the working directory and environment of this one.

    What it returns is the exit status (None is 0), what it says is added to the log, and `variables` are set besides.
    """
    return Forked(act, arguments, log, variables)


def ranks(count: int, act: Callable[..., Any], *arguments: Any, log: Path) -> list[Forked]:
    """The same in so many processes, with the variables of torchrun by which they meet."""
    common = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
    common.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    own = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    return [start(act, *arguments, log=log, variables={**common, **each}) for each in own]


def torchrun(*arguments: str, log: Path, variables: Mapping[str, str] = _NO_MORE) -> Forked:
    """torchrun itself, which forks its workers: they run the script by its path.

    arguments: options, the path of the script, and what that takes.
    """
    options = ("--start-method=fork", "--run-path")
    return start(_torchrun, *options, *arguments, log=log, variables={"OMP_NUM_THREADS": "1", **variables})


def finish(processes: Sequence[Forked], seconds: float = 280.0) -> list[int]:
    """Wait for all of them, at most so long altogether, and end those that remain; exit statuses, in order."""
    deadline = time.monotonic() + seconds
    try:
        return [process.wait(max(0.0, deadline - time.monotonic())) for process in processes]
    finally:
        for process in processes:
            process.kill()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@functools.cache
def server() -> Any:
    """The context of the fork server, started.

    It must find our modules, and what it loads reads some variables only then.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload([_LOADED])
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with _variables(PYTHONPATH=path, OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE"):
        forkserver.ensure_running()
    return context


@contextmanager
def _variables(**values: str) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _be(act: Callable[..., Any], arguments: Sequence[Any], log: Path, environment: Mapping[str, str]) -> None:
    """What a forked process does."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    # The server says nothing when it cannot load a module; each process would then load all of it, unnoticed.
    assert _LOADED in sys.modules, f"the fork server could not import {_LOADED}"
    os.environ.clear()
    os.environ.update(environment)
    sys.exit(act(*arguments))


def _torchrun(*arguments: str) -> None:
    from torch.distributed.run import main

    os.register_at_fork(after_in_child=_with_signals_of_its_own)
    main(arguments)


def _with_signals_of_its_own() -> None:
    """A worker that is forked would have torchrun's handlers, which answer only once a collective ended."""
    for name in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(name, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
