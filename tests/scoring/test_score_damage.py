"""Commands at once, kills, changed inputs and models, damaged parts: the output is right, or the user is told."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rm_gallery import files
from rm_gallery.cli import main
from rm_gallery.errors import UserError
from rm_gallery.schema import PreferenceGroup
from rm_gallery.scoring import RewardScorer
from rm_gallery.scoring import score_files as score_files_module
from rm_gallery.scoring.inputs import InputBuilder
from rm_gallery.scoring.score_files import ScoreOptions, score_files
from tests import forks
from tests.small import text_pairs, write_pairs


class Killed(BaseException):
    """Stands for SIGKILL."""


class FakeScorer:
    """Rewards that depend on the text and, as the last bits of real ones do, on all texts of the call."""

    inputs = InputBuilder("text")

    def score_each(self, groups: Sequence[PreferenceGroup], *, attributes: bool = False) -> list[list[float]]:
        total = sum(len(text) for group in groups for text in group.responses)
        return [[zlib.crc32(str(text).encode()) / 2**32 + total for text in group.responses] for group in groups]

    def close(self) -> None:
        pass


@pytest.fixture
def options(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> ScoreOptions:
    """100 pairs to score into `out.jsonl`, in parts of 32, 32, 32 and 4 rows, with a model that costs no time."""
    monkeypatch.setattr(score_files_module, "_MAX_ROWS", 32)
    monkeypatch.setattr(RewardScorer, "from_folder", lambda *_, **__: FakeScorer())
    monkeypatch.setattr(score_files_module, "check_models", lambda _: None)
    Path("model").mkdir()
    for name in ("config.json", "model.safetensors"):
        (Path("model") / name).write_bytes(b"{       }")
    write_pairs(in_tmp / "pairs.parquet", text_pairs(100))
    return ScoreOptions(("model",), ("pairs.parquet",), "out.jsonl", device="cpu")


def with_output(options: ScoreOptions, output: str) -> ScoreOptions:
    return ScoreOptions(**{**vars(options), "output": output})


def kill_after(parts: int) -> Callable[[int], None]:
    left = iter(range(parts - 1))

    def hook(_: int) -> None:
        if next(left, None) is None:
            raise Killed

    return hook


def parts_of(output: str = "out.jsonl") -> list[Path]:
    return sorted(Path().glob(f".{output}.parts/*/[0-9]*.parquet"))


def start_and_kill(options: ScoreOptions, parts: int = 2) -> list[Path]:
    with pytest.raises(Killed):
        score_files(options, on_part=kill_after(parts))
    assert not Path(options.output).exists()
    return parts_of()


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_killed_run_ends_with_the_bytes_of_an_undisturbed_one(
    options: ScoreOptions, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    score_files(with_output(options, f"whole.{suffix}"))
    expected = Path(f"whole.{suffix}").read_bytes()
    at: list[Callable[[], None]] = [
        *(lambda parts=parts: score_files(resumed, on_part=kill_after(parts)) for parts in (1, 3)),
        lambda: raise_in(score_files_module, "write_output"),
        lambda: raise_in(files, "replace"),  # after the marker
    ]

    def raise_in(module: Any, name: str) -> None:
        def kill(*_: Any, **__: Any) -> None:
            raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(module, name, kill)
            score_files(resumed)

    for number, kill in enumerate(at):
        resumed = with_output(options, f"out{number}.{suffix}")
        with pytest.raises(Killed):
            kill()
        score_files(resumed)
        assert Path(resumed.output).read_bytes() == expected, number
        assert not list(Path().glob(f".out{number}.*.parts"))


def test_the_output_is_held_by_one_command(options: ScoreOptions, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["score", "--model", "model", "pairs.parquet", "--output", "out.jsonl", "--device", "cpu"]
    Path("link.jsonl").symlink_to("out.jsonl")
    with files.lock(Path(".out.jsonl.lock")):
        for arguments in (command, [*command, "data.bad_rows=error"], [*command, "--output", "link.jsonl"]):
            assert main(arguments) == 2
            printed = capsys.readouterr().err
            assert f"out.jsonl: another command is writing it (process {os.getpid()} on " in printed
        assert main([*command, "--output", "other.jsonl"]) == 0
    Path(".out.jsonl.lock").write_text("process 1 on a machine that is gone")
    assert main(command) == 0
    assert main([*command, "--output", "link.jsonl"]) == 0
    assert "already scored" in capsys.readouterr().out


def test_a_file_system_without_locks_is_named(
    options: ScoreOptions, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    score_files(options)
    assert "the file system has no locks (No locks available); make sure that no other" in caplog.text


@pytest.mark.parametrize("damage", ["flip", "cut", "swap", "shift", "foreign", "reward", "overlap"])
def test_a_part_that_is_not_what_was_written_is_scored_again(
    options: ScoreOptions, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    score_files(with_output(options, "whole.jsonl"))
    first, second, third = start_and_kill(options, 3)
    expected = [32, 4]
    if damage == "flip":
        content = bytearray(first.read_bytes())
        content[20] ^= 1
        first.write_bytes(content)
    elif damage == "cut":
        first.write_bytes(first.read_bytes()[:-9])
    elif damage == "swap":
        content, expected = first.read_bytes(), [32, 32, 4]
        first.write_bytes(second.read_bytes())
        second.write_bytes(content)
    elif damage == "shift":
        first.rename(first.with_stem("000000000001"))
    elif damage == "foreign":
        first.write_bytes(whole_part(options))
    elif damage == "reward":
        table = pq.read_table(first, partitioning=None)
        changed = pa.array([1.0] * 32, pa.float32())
        pq.write_table(table.set_column(0, "reward_chosen", changed), first)
    else:
        shutil.copy(third, third.with_stem("000000000080"))
        expected = [4]
    done: list[int] = []
    score_files(options, on_part=done.append)
    assert done == expected
    assert Path("out.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()
    assert ("rows are scored again" in caplog.text) == (damage not in ("shift", "overlap"))


def whole_part(options: ScoreOptions) -> bytes:
    """The first part of the same input under other settings."""
    with pytest.raises(Killed):
        score_files(
            ScoreOptions(**{**vars(options), "output": "else.jsonl", "token_budget": 77}), on_part=kill_after(1)
        )
    return parts_of("else.jsonl")[0].read_bytes()


def rewrite(rows: list[dict[str, Any]]) -> None:
    """Replace the input, with its size and times as before where the rows are as long."""
    before = Path("pairs.parquet").stat()
    write_pairs(Path("pairs.parquet"), rows)
    os.utime("pairs.parquet", ns=(before.st_atime_ns, before.st_mtime_ns))


def test_an_input_that_changes_between_kill_and_restart_is_scored_as_it_is_now(
    options: ScoreOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rm_gallery.data.sources.resolve.identity_of", lambda path: "the same")
    start_and_kill(options, 3)
    rows = text_pairs(90)
    rows[40]["chosen"] = "another answer"
    rewrite(rows)
    done: list[int] = []
    score_files(options, on_part=done.append)
    assert done == [32, 26], "the second part, and the third, which is shorter now"
    score_files(with_output(options, "whole.jsonl"))
    assert Path("out.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()


@pytest.mark.parametrize("rows", [text_pairs(100, seed=3), text_pairs(101), text_pairs(99)])
def test_an_input_that_changes_while_it_is_scored_is_an_error(
    options: ScoreOptions, rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rm_gallery.data.sources.resolve.identity_of", lambda path: "the same")
    monkeypatch.setattr("rm_gallery.data.sources.read.check_unchanged", lambda file: None)
    done: list[int] = []

    def hook(count: int) -> None:
        done.append(count)
        if sum(done) == 100:
            rewrite(rows)

    with pytest.raises(UserError, match=r"pairs.parquet:\d+: the file changed while it was scored; rerun the command"):
        score_files(options, on_part=hook)
    assert not Path("out.jsonl").exists()
    score_files(options)
    assert len(Path("out.jsonl").read_text().splitlines()) == len(rows)


def change_model(name: str = "model.safetensors") -> None:
    path = Path("model") / name
    before, content = path.stat(), bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_model_that_changes_never_shares_an_output(options: ScoreOptions) -> None:
    start_and_kill(options, 2)
    change_model()
    done: list[int] = []
    score_files(options, on_part=done.append)
    assert sum(done) == 100, "no part of the other weights is used"
    change_model()
    with pytest.raises(UserError, match=r"out\.jsonl: exists, and was not made of this input, these models"):
        score_files(options)
    Path("out.jsonl").unlink()
    changes = iter([change_model])
    with pytest.raises(UserError, match="model=model: the folder changed while it was used; rerun the command"):
        score_files(options, on_part=lambda _: next(changes, bool)())
    assert not Path("out.jsonl").exists()


def test_a_copy_of_a_model_is_the_same_model(options: ScoreOptions) -> None:
    score_files(options)
    for path in Path("model").iterdir():
        os.utime(path, (1e9, 1e9))
    (Path("model") / "optimizer.pt").write_text("of a trainer")
    assert score_files(options)[0].was_there


def test_an_output_that_was_changed_is_not_called_finished(options: ScoreOptions) -> None:
    score_files(options)
    with Path("out.jsonl").open("a") as file:
        file.write("{}\n")
    with pytest.raises(UserError, match=r"out\.jsonl: was changed after it was written; move it away"):
        score_files(options)


def test_an_output_without_any_reward_ends_with_status_2_after_the_others(
    options: ScoreOptions, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("bad.jsonl").write_text('{"response": null}\n{"response": null}\nno JSON\n')
    Path("good.jsonl").write_text('{"response": "a"}\n{"response": null}\n')
    command = ["score", "--model", "model", "bad.jsonl", "good.jsonl", "--output", "out", "--device", "cpu"]
    logged = ""
    for _ in range(2):
        assert main(command) == 2
        printed = capsys.readouterr()
        logged += printed.err
        assert "out/bad.jsonl: no row has a reward: 2 null response (first: bad.jsonl:0), 1 for 1 other" in printed.err
        assert "out/good.jsonl: 2 rows" in printed.out
    assert "good.jsonl: 1 of 2 rows have no reward: 1 null response (first: good.jsonl:1)" in logged
    assert json.loads(Path("out/good.jsonl").read_text().splitlines()[0])["reward"] is not None


def test_a_row_without_responses_has_no_reward(options: ScoreOptions, capsys: pytest.CaptureFixture[str]) -> None:
    Path("none.jsonl").write_text('{"prompt": "a", "responses": []}\n')
    assert main(["score", "--model", "model", "none.jsonl", "--output", "out.jsonl", "--device", "cpu"]) == 2
    assert "out.jsonl: no row has a reward: 1 no responses (first: none.jsonl:0)" in capsys.readouterr().err


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_what_cannot_be_written_ends_in_one_sentence(
    options: ScoreOptions, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(code, os.strerror(code))

    hint = "free disk space" if code == errno.ENOSPC else "choose another --output"
    for module, name in ((files, "lock"), (Path, "mkdir"), (pq, "write_table"), (score_files_module, "write_output")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, fail)
            with pytest.raises(UserError, match=rf"cannot be written to \({os.strerror(code)}\); {hint}"):
                score_files(options)
    score_files(options)


def score_again(options: ScoreOptions) -> int:
    score_files_module._MAX_ROWS = 32
    score_files_module.check_models = lambda _: None  # type: ignore[assignment]
    RewardScorer.from_folder = lambda *_, **__: FakeScorer()  # type: ignore[method-assign,assignment]
    try:
        score_files(options, on_part=lambda _: time.sleep(0.05))
    except UserError as error:
        print(error)
        return 2
    return 0


@pytest.mark.slow
def test_20_commands_at_once_give_the_output_of_one(options: ScoreOptions, in_tmp: Path) -> None:
    score_files(with_output(options, "whole.jsonl"))
    chance = random.Random(7)
    running = []
    for number in range(20):
        running.append(forks.start(score_again, options, log=in_tmp / f"log{number}"))
        time.sleep(chance.uniform(0.0, 0.15))
        if number == 9:
            holder = next(process for process in running if process.poll() is None)
            holder.kill()
            assert holder.wait() == -signal.SIGKILL
    statuses = forks.finish(running, 120.0)
    assert statuses.count(-signal.SIGKILL) <= 1 and set(statuses) <= {0, 2, -signal.SIGKILL}, statuses
    score_files(options)
    assert Path("out.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()
    refused = [number for number, status in enumerate(statuses) if status == 2]
    assert refused and all("another command is writing it" in (in_tmp / f"log{n}").read_text() for n in refused)


def test_a_job_is_bound_to_all_of_its_settings(options: ScoreOptions) -> None:
    """Parts of other settings live in other folders."""
    start_and_kill(options, 1)
    [folder] = {path.parent.name for path in parts_of()}
    for change in ({"token_budget": 9}, {"dtype": "bf16"}):
        with pytest.raises(Killed):
            score_files(ScoreOptions(**{**vars(options), **change}), on_part=kill_after(1))
    assert len({path.parent.name for path in parts_of()} - {folder}) == 2
