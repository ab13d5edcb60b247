"""Checkpoints: pickles, values of wrong types, damage, kills at other moments, runs that diverge."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.hostile.box import Box, Child, Outcome, attempt, check


def run_of(box: Box, name: str = "a") -> Path:
    """A run of three steps with a checkpoint at each; the folder of the second."""
    box.train("trainer.save_freq=1", name=name).done()
    return box.path("runs") / name / "global_step_2"


def forge(folder: Path) -> None:
    """Write the hashes of the files as they are now into the manifest, as somebody with access would."""
    for path in folder.rglob("*.json"):
        if path.name not in ("manifest.json", "complete.json"):
            continue
        content = json.loads(path.read_text())
        if isinstance(content.get("sha256"), dict):
            for name in content["sha256"]:
                if (folder / name).is_file():
                    content["sha256"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
            path.write_text(json.dumps(content))


def resume(box: Box, folder: Path, name: str = "b") -> Outcome:
    return box.train(f"trainer.resume_mode={folder}", name=name)


@attempt("refused, and nothing of a pickle runs")
def every_state_file_is_a_pickle(box: Box) -> str:
    whole = run_of(box)
    names = sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file())
    happened = ""
    for number, name in enumerate(names):
        if name.name in ("manifest.json", "complete.json"):
            continue
        copy = box.path(f"copies/{number}/global_step_2")
        box.copy(whole, str(copy.relative_to(box.folder)))
        (copy / name).write_bytes(box.evil_pickle())
        forge(copy)
        done = resume(box, copy, f"b{number}")
        check(not box.path("pwned").exists(), f"{name} was unpickled")
        check("Traceback" not in done.err, f"{name}: {done.last}")
        happened = done.last if done.status == 2 else happened
    return f"{len(names)} files; {happened}"


@attempt("refused, and nothing of a pickle runs")
def pickled_metadata_is_added(box: Box) -> str:
    whole = run_of(box)
    for name in (".metadata", "optimizer.pt", "rng.pkl", "__0_0.distcp"):
        (whole / "training_state" / name).write_bytes(box.evil_pickle())
    forge(whole)
    done = resume(box, whole)
    check(not box.path("pwned").exists(), "it was unpickled")
    check("Traceback" not in done.err, done.last)
    return done.last


STATES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "list": lambda state: [1, 2],
    "step_text": lambda state: state["progress"].update(step="2"),
    "step_negative": lambda state: state["progress"].update(step=-1),
    "step_huge": lambda state: state["progress"].update(step=10**30),
    "step_fraction": lambda state: state["progress"].update(step=1.5),
    "unknown_progress": lambda state: state["progress"].update(invented=1),
    "no_progress": lambda state: {key: value for key, value in state.items() if key != "progress"},
    "world_size_text": lambda state: state.update(world_size="1"),
    "world_size_huge": lambda state: state.update(world_size=10**6),
    "fixed_list": lambda state: state.update(fixed=[1]),
    "config_null": lambda state: state.update(config=None),
    "total_steps_null": lambda state: state.update(total_steps=None),
}


@attempt("refused with status 2 and a sentence for each of 12 changes of state.json")
def state_with_wrong_types(box: Box) -> str:
    whole = run_of(box)
    original = (whole / "training_state/state.json").read_text()
    happened = ""
    for name, change in STATES.items():
        content = json.loads(original)
        changed = change(content)
        (whole / "training_state/state.json").write_text(json.dumps(content if changed is None else changed))
        forge(whole)
        done = resume(box, whole, name)
        check("Traceback" not in done.err, f"{name}: traceback: {done.last}")
        check(done.status == 2, f"{name}: status {done.status}: {done.last}")
        happened = done.last
    return f"12 sentences; {happened}"


@attempt("refused with status 2 and a sentence")
def random_states_with_wrong_types(box: Box) -> str:
    whole = run_of(box)
    path = whole / "training_state/rank_0.json"
    original = path.read_text()
    happened = ""
    for key, value in (
        ("random", None), ("sums", [1]), ("random", {"python": [3, [1], None]}), ("sums", {"loss": "x"}),
        ("random", {"torch": "AAAA"}), ("random", []),
    ):  # fmt: skip
        content = json.loads(original)
        if isinstance(value, dict) and key == "random":
            content["random"].update(value)
        else:
            content[key] = value
        path.write_text(json.dumps(content))
        forge(whole)
        done = resume(box, whole, f"b-{len(happened)}-{key}")
        check("Traceback" not in done.err, f"{key}={value}: traceback: {done.last}")
        check(done.status == 2, f"{key}={value}: status {done.status}")
        happened = done.last
    return happened


def damaged(box: Box, change: Callable[[bytes], bytes]) -> str:
    """Damage each file of the newest checkpoint: the run repeats the step before it and ends with the same weights."""
    box.train("trainer.save_freq=1", name="calm").done()
    calm = box.weights("calm")
    count = 0
    for name in sorted(p.relative_to(box.path("runs/calm/global_step_2")) for p in
                       box.path("runs/calm/global_step_2").rglob("*") if p.is_file()):  # fmt: skip
        run = f"b{count}"
        box.copy(box.path("runs/calm"), f"runs/{run}")
        for path in box.path(f"runs/{run}").glob("global_step_3"):
            path.rename(path.with_name(".gone"))
        target = box.path(f"runs/{run}/global_step_2") / name
        target.write_bytes(change(target.read_bytes()))
        done = box.train("trainer.save_freq=1", name=run)
        check("Traceback" not in done.err and done.status == 0, f"{name}: status {done.status}: {done.last}")
        check(box.weights(run) == calm, f"{name}: other weights")
        count += 1
    return f"{count} files, the same weights each time"


@attempt("the same weights: the checkpoint before it is used")
def flipped_bit_in_each_file(box: Box) -> str:
    def flip(content: bytes) -> bytes:
        middle = len(content) // 2
        return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :] if content else b"\1"

    return damaged(box, flip)


@attempt("the same weights: the checkpoint before it is used")
def half_of_each_file(box: Box) -> str:
    return damaged(box, lambda content: content[: len(content) // 2])


@attempt("refused, or the files outside are untouched")
def manifest_that_leaves_the_folder(box: Box) -> str:
    whole = run_of(box)
    outside = box.write("outside.txt", "mine")
    path = whole / "manifest.json"
    content = json.loads(path.read_text())
    content["sha256"]["../../../outside.txt"] = "0" * 64
    content["sha256"]["/etc/hostname"] = "0" * 64
    path.write_text(json.dumps(content))
    done = resume(box, whole)
    check(Path(outside).read_text() == "mine", "a file outside was changed")
    return done.refused()


@attempt("the same weights bit by bit")
def killed_while_a_checkpoint_is_written(box: Box) -> str:
    box.train("trainer.save_freq=1", name="calm").done()
    kills = 0
    for number in range(6):
        wanted = [".global_step_1", "global_step_1", ".global_step_2", "global_step_2", ".global_step_3", "manifest"][
            number
        ]
        child = Child(lambda: box.train("trainer.save_freq=1", name="b").status, box.path("log.txt"))
        kills += child.kill_when(lambda w=wanted: any(w in name for name in box.names("runs/b")))  # type: ignore[misc]
    box.train("trainer.save_freq=1", name="b").done()
    check(box.weights("b") == box.weights("calm"), "other weights")
    return f"{kills} kills, the same weights"


@attempt("the same weights bit by bit, one line per step")
def killed_in_the_background_save_and_between(box: Box) -> str:
    extra = ("trainer.save_freq=1", "trainer.async_save=true", "trainer.total_epochs=2", "model.dropout=0.2")
    box.train(*extra, name="calm").done()
    kills = 0
    for number in range(5):
        child = Child(lambda: box.train(*extra, name="b").status, box.path("log.txt"))
        kills += child.kill_when(lambda n=number: lines(box, "b") > n)  # type: ignore[misc]
    box.train(*extra, name="b").done()
    check(box.weights("b", 6) == box.weights("calm", 6), "other weights")
    check(lines(box, "b") == lines(box, "calm"), f"{lines(box, 'b')} lines, not {lines(box, 'calm')}")
    return f"{kills} kills, the same weights and lines"


def lines(box: Box, name: str) -> int:
    path = box.path(f"runs/{name}/metrics.jsonl")
    return path.read_text().count("\n") if path.exists() else 0


@attempt("one trains, the other is refused with status 2")
def two_runs_in_one_directory(box: Box) -> str:
    from rm_gallery.training import run_dir, setup

    box.pairs(count=48)

    def call() -> int:
        setup.lock_run_dir = partial(run_dir.lock_run_dir, timeout=0.2)
        return box.train("trainer.total_epochs=6", name="b").status

    children = [Child(call, box.path(f"log-{number}.txt")) for number in range(2)]
    statuses = sorted(child.wait() for child in children)
    check(statuses in ([0, 2], [0, 0]), f"statuses {statuses}")
    return f"statuses {statuses}"


@attempt("refused with status 2: no step was finite")
def every_step_is_skipped(box: Box) -> str:
    rows = [{"prompt": f"q{n}", "chosen": f"g{n}", "rejected": f"b{n}", "weight": 1e38} for n in range(24)]
    done = box.train(f"data.train_files={box.write('a.jsonl', rows)}")
    return done.refused("step")


@attempt("refused with status 2, naming the checkpoint from before; no checkpoint holds weights that are not finite")
def learning_rate_that_diverges(box: Box) -> str:
    from safetensors.torch import load_file

    good = run_of(box).with_name("global_step_1")
    settings = ("optim.lr=1e20", "trainer.save_freq=1", "trainer.max_bad_steps=1")
    done = box.train(*settings, f"trainer.resume_mode={good}", name="b")
    for folder in box.path("runs/b").glob("global_step_*"):
        finite = all(bool(value.isfinite().all()) for value in load_file(folder / "model.safetensors").values())
        check(finite, f"{folder.name} holds weights that are not finite")
    return done.refused("not finite", str(good))


@attempt("refused, or resumed with status 0: never a traceback")
def other_files_of_the_run_are_damaged(box: Box) -> str:
    run_of(box)
    run = box.path("runs/a")
    for name, content in (
        ("run.json", b"[1]"), ("metrics.jsonl", b'{"step": "x"}\n[\n\xff'), ("config.yaml", b"a: [\x00"),
        ("best.json", b"[]"), ("tracker_ids.json", b"[]"), (".lock", b"\xff" * 10),
    ):  # fmt: skip
        (run / name).write_bytes(content)
        box.path("runs/a/global_step_3").rename(box.path(f"gone-{name}"))
        done = box.train("trainer.save_freq=1", "trainer.logger=[console]", name="a")
        check("Traceback" not in done.err and done.status in (0, 2), f"{name}: status {done.status}: {done.last}")
    return "6 files, no traceback"


@attempt("refused with status 2, naming what differs")
def checkpoint_of_another_run(box: Box) -> str:
    whole = run_of(box)
    box.pairs("other.parquet", 32)
    done = box.train(f"trainer.resume_mode={whole}", f"data.train_files={box.path('other.parquet')}", name="b")
    return done.refused("training data")


@attempt("the checkpoint is intact: a full disk ends the run with status 2")
def disk_that_fills_up(box: Box) -> str:
    import resource

    box.train("trainer.save_freq=1", name="calm").done()

    def call() -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))  # SIGXFSZ is ignored by Python: EFBIG
        return box.train("trainer.save_freq=1", name="b").status

    status = Child(call, box.path("log.txt")).wait()
    check(status == 2, f"status {status}")
    check(not list(box.path("runs/b").glob("global_step_*")), "an incomplete checkpoint is there")
    box.train("trainer.save_freq=1", name="b").done()
    check(box.weights("b") == box.weights("calm"), "other weights")
    os.sync()
    return "status 2, then the same weights"
