"""What the attempts of `python -m benchmarks.hostile` share: their list, a working folder, and checked outcomes."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import pickle
import resource
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rm_gallery.cli import main
from rm_gallery.log import safe_traceback
from tests.scoring.models import make_checkpoint, make_classifier
from tests.small import chat_pairs, make_model, text_pairs, write_pairs

CONTROL = set(map(chr, (*range(9), *range(11, 32), *range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A))))


class Held(AssertionError):
    """The outcome is not the expected one."""


@dataclass(frozen=True)
class Attempt:
    area: str
    name: str
    expected: str
    run: Callable[[Box], str]
    """What happened, in a few words; raises when it is not what is expected."""


ATTEMPTS: list[Attempt] = []


def attempt(expected: str) -> Callable[[Callable[[Box], str]], Callable[[Box], str]]:
    """Register a function as an attempt; its module names the area."""

    def add(function: Callable[[Box], str]) -> Callable[[Box], str]:
        area = function.__module__.rpartition(".")[2]
        ATTEMPTS.append(Attempt(area, function.__name__, expected, function))
        return function

    return add


def check(holds: object, happened: str) -> None:
    """Fail with what happened instead."""
    if not holds:
        raise Held(happened)


@dataclass(frozen=True)
class Outcome:
    """Of one command."""

    status: int
    out: str
    err: str

    @property
    def text(self) -> str:
        return self.out + self.err

    @property
    def last(self) -> str:
        lines = [line for line in self.err.splitlines() if line.strip()] or [""]
        errors = [line for line in lines if "error:" in line] or lines
        return errors[-1].removeprefix("rm-gallery: error: ")

    def refused(self, *words: str) -> str:
        """Status 2 and a sentence with these words, not a traceback."""
        check("Traceback" not in self.err, f"traceback: {self.last}")
        check(self.status == 2, f"status {self.status}: {self.last}")
        return self._names(*words)

    def done(self, *words: str) -> str:
        """Status 0, and these words in what was printed."""
        check(self.status == 0, f"status {self.status}: {self.last}")
        return self._names(*words, where=self.text)

    def _names(self, *words: str, where: str = "") -> str:
        missing = [word for word in words if word.lower() not in (where or self.err).lower()]
        check(not missing, f"{missing} not named: {self.last}")
        named = [line for line in self.text.splitlines() if words and words[0].lower() in line.lower()]
        return (named or [self.last])[-1]

    def plain(self) -> str:
        """No control characters in anything that was printed."""
        found = sorted(CONTROL & set(self.text))
        check(not found, f"raw {found!r} printed")
        return "no control character"


class _Evil:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


class Box:
    """A working folder with small models and data, and the commands, run in this process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, name: str) -> Path:
        return self.folder / name

    def write(self, name: str, content: str | bytes | Sequence[Any]) -> str:
        """A file: bytes, text, or rows as JSON lines."""
        path = self.path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        if not isinstance(content, str | bytes):
            content = "".join(json.dumps(row) + "\n" for row in content)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    def pairs(self, name: str = "pairs.parquet", count: int = 24, *, chat: bool = False) -> str:
        return str(write_pairs(self.path(name), (chat_pairs if chat else text_pairs)(count)))

    def evil_pickle(self) -> bytes:
        """Creates the file `pwned` when it is loaded."""
        return pickle.dumps(_Evil(str(self.path("pwned"))))

    def responses(self, name: str = "in.jsonl", count: int = 60) -> str:
        return self.write(name, [{"prompt": f"q{n}", "response": "so " * (n % 7) + f"a{n}"} for n in range(count)])

    def copy(self, folder: Path, name: str) -> Path:
        return Path(shutil.copytree(folder, self.path(name)))

    def run(self, *arguments: str) -> Outcome:
        """A command of rm-gallery; anything that it raises counts as status 1 with its traceback."""
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                status = main(list(arguments))
            except SystemExit as ended:
                status = int(ended.code or 0)
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                status = 1
                err.write(safe_traceback(error))
        return Outcome(status, out.getvalue(), err.getvalue())

    def arguments(self, *overrides: str, name: str = "run") -> list[str]:
        values = {
            "model.partial_pretrain": str(base_model()),
            "model.fsdp_config.model_dtype": "fp32",
            "data.train_files": str(self.path("pairs.parquet")),
            "data.cache_dir": str(self.path("cache")),
            "data.max_length": "128",
            "data.train_batch_size": "8",
            "data.num_workers": "0",
            "optim.lr": "1e-3",
            "trainer.default_local_dir": str(self.path("runs")),
            "trainer.experiment_name": name,
            "trainer.logger": "[]",
            "trainer.device": "cpu",
        }
        for override in overrides:
            key, _, value = override.partition("=")
            values[key] = value
        return ["train", *(f"{key}={value}" for key, value in values.items())]

    def train(self, *overrides: str, name: str = "run") -> Outcome:
        if not self.path("pairs.parquet").exists():
            self.pairs()
        return self.run(*self.arguments(*overrides, name=name))

    def in_time(self, *arguments: str, seconds: float = 60) -> Outcome:
        """A command in a forked process, which is killed and counts as a failure if it does not end in time."""
        outcome = self.path("outcome.json")

        def call() -> int:
            resource.setrlimit(resource.RLIMIT_AS, (16 << 30, resource.RLIM_INFINITY))  # what grows without bound fails
            done = self.run(*arguments)
            outcome.write_text(json.dumps([done.status, done.out, done.err]))
            return 0

        Child(call, self.path("log.txt")).wait(seconds)
        return Outcome(*json.loads(outcome.read_text()))

    def names(self, folder: str) -> list[str]:
        """Every path below a folder that another process may be writing."""
        return [
            os.path.join(root, name) for root, some, files in os.walk(self.path(folder)) for name in (*some, *files)
        ]

    def weights(self, name: str = "run", step: int = 3) -> bytes:
        return (self.path("runs") / name / f"global_step_{step}" / "model.safetensors").read_bytes()

    def score(self, *inputs: str, model: Path | None = None, output: str = "out.jsonl") -> Outcome:
        model = model or text_checkpoint()
        device = ["--device", "cpu"]
        return self.run("score", "--model", str(model), *inputs, "--output", str(self.path(output)), *device)

    def rewards(self, output: str = "out.jsonl", column: str = "reward") -> list[Any]:
        return [json.loads(line).get(column) for line in self.path(output).read_text().splitlines()]


@functools.cache
def _shared() -> Path:
    return Path(tempfile.mkdtemp(prefix="hostile-models-"))


@functools.cache
def base_model() -> Path:
    return make_model("qwen2", _shared() / "base")


@functools.cache
def text_checkpoint() -> Path:
    return make_checkpoint("qwen2", _shared() / "text")[0]


@functools.cache
def chat_checkpoint() -> Path:
    return make_checkpoint("qwen2", _shared() / "chat", style="chat", seed=1)[0]


@functools.cache
def classifier() -> Path:
    return make_classifier("qwen2", _shared() / "classifier", num_key_value_heads=2)


def remove_models() -> None:
    shutil.rmtree(_shared(), ignore_errors=True)


class Child:
    """A call in a forked process, whose output goes to a file; killed and waited for by its id."""

    def __init__(self, call: Callable[[], Any], log: Path) -> None:
        self.log = log
        self.pid = os.fork()
        if not self.pid:
            status = 99
            try:
                signal.alarm(120)
                with log.open("w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
                    status = int(call() or 0)
            finally:
                os._exit(status)

    def ended(self) -> bool:
        found, status = os.waitpid(self.pid, os.WNOHANG)
        if found:
            self.status = os.waitstatus_to_exitcode(status)
        return bool(found)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        self.wait()

    def wait(self, seconds: float = 90) -> int:
        end = time.monotonic() + seconds
        while not self.ended():
            if time.monotonic() > end:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                raise Held(f"still running after {seconds:g} s: {self.log.read_text()[-200:]}")
            time.sleep(0.002)
        return self.status

    def kill_when(self, ready: Callable[[], object]) -> bool:
        """Kill it as soon as something is there; False if it ended before."""
        while not ready():
            if self.ended():
                return False
            time.sleep(0.0005)
        self.kill()
        return True


@contextlib.contextmanager
def patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
