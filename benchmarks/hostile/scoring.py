"""Scoring: several commands at once, kills, forks, pickles, weights that are not finite."""

from __future__ import annotations

import json
import os
import pickle
import random
import threading
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from benchmarks.hostile.box import Box, Child, Held, attempt, chat_checkpoint, check, patched, text_checkpoint
from rm_gallery.errors import UserError
from rm_gallery.schema import Message
from rm_gallery.scoring import RewardScorer, score_files


def reference(box: Box, path: str) -> bytes:
    with patched(score_files, "_MAX_ROWS", 16):
        box.score(path, output="calm/out.jsonl").done()
    return box.path("calm/out.jsonl").read_bytes()


def parts(box: Box) -> int:
    """Number of finished parts; hidden names are being written."""
    names = [os.path.basename(name) for name in box.names("two")]
    return sum(name.endswith(".parquet") and not name.startswith(".") for name in names)


def child(box: Box, path: str, number: int, model: Path | None = None) -> Child:
    def call() -> int:
        with patched(score_files, "_MAX_ROWS", 16):
            done = box.score(path, model=model, output="two/out.jsonl")
        print(done.text)
        return done.status

    return Child(call, box.path(f"log-{number}.txt"))


@attempt("each ends with 0 or 2, and the output has the bytes of an undisturbed run")
def four_at_once_at_random_offsets(box: Box) -> str:
    path = box.responses(count=400)
    calm = reference(box, path)
    box.path("two").mkdir()
    draw, statuses = random.Random(0), []
    children = []
    for number in range(4):
        children.append(child(box, path, number))
        time.sleep(draw.random() * 0.3)
    statuses = sorted(each.wait() for each in children)
    check(set(statuses) <= {0, 2}, f"statuses {statuses}")
    check(box.path("two/out.jsonl").read_bytes() == calm, "other rewards")
    return f"statuses {statuses}, the same bytes"


@attempt("the output has the bytes of an undisturbed run")
def one_of_two_is_killed(box: Box) -> str:
    path = box.responses(count=300)
    calm = reference(box, path)
    box.path("two").mkdir()
    first, second = child(box, path, 0), child(box, path, 1)
    time.sleep(0.2)
    first.kill()
    status = second.wait()
    check(status in (0, 2), f"status {status}")
    if status == 2:
        check(child(box, path, 2).wait() == 0, "the rerun failed")
    check(box.path("two/out.jsonl").read_bytes() == calm, "other rewards")
    return f"status {status}, the same bytes"


@attempt("the output has the bytes of an undisturbed run")
def killed_after_each_part(box: Box) -> str:
    path = box.responses(count=200)
    calm = reference(box, path)
    box.path("two").mkdir()
    kills = 0
    for number in range(8):
        before = parts(box)
        one = child(box, path, number)
        kills += one.kill_when(lambda n=before: parts(box) > n)  # type: ignore[misc]
    child(box, path, 99).wait()
    check(box.path("two/out.jsonl").read_bytes() == calm, "other bytes")
    return f"{kills} kills, the same bytes"


@attempt("the rewards of the new rows; no part of the old ones")
def rows_change_after_a_kill(box: Box) -> str:
    path = box.responses(count=200)
    box.path("two").mkdir()
    child(box, path, 0).kill_when(lambda: parts(box) > 3)
    rows = Path(path).read_text().replace('"q1"', '"another question"')
    box.write("in.jsonl", rows)
    calm = reference(box, path)
    status = child(box, path, 1).wait()
    if status == 2:
        return f"refused: {box.path('log-1.txt').read_text().strip()[-120:]}"
    check(box.path("two/out.jsonl").read_bytes() == calm, "rewards of other rows")
    return "the bytes of a new run"


@attempt("the rewards of the second model, or refused")
def another_model_finishes_the_output(box: Box) -> str:
    path = box.responses(count=200)
    box.path("two").mkdir()
    child(box, path, 0, chat_checkpoint()).kill_when(lambda: parts(box) > 3)
    calm = reference(box, path)
    status = child(box, path, 1).wait()
    if status == 2:
        return "refused"
    check(box.path("two/out.jsonl").read_bytes() == calm, "rewards of another model")
    return "the bytes of a new run"


@attempt("the bytes of an undisturbed run: a damaged or foreign part is scored again")
def parts_edited_renamed_and_swapped(box: Box) -> str:
    path = box.responses(count=200)
    calm = reference(box, path)
    box.path("two").mkdir()
    child(box, path, 0).kill_when(lambda: parts(box) > 5)
    saved = sorted(box.path("two").rglob("*.parquet"))
    contents = [part.read_bytes() for part in saved]
    saved[0].write_bytes(contents[1])
    saved[1].write_bytes(contents[0])
    saved[2].write_bytes(contents[2][:-50])
    saved[3].write_bytes(b"")
    child(box, path, 1).wait()
    check(box.path("two/out.jsonl").read_bytes() == calm, "other bytes")
    return "the same bytes"


@attempt("refused with status 2; the input keeps its bytes")
def output_is_the_input(box: Box) -> str:
    path = box.responses()
    before = Path(path).read_bytes()
    done = box.score(path, output="in.jsonl")
    check(Path(path).read_bytes() == before, "the input was overwritten")
    return done.refused("in.jsonl")


@attempt("refused with status 2, or the file of another command is kept")
def output_is_a_file_of_another_kind(box: Box) -> str:
    box.write("out.jsonl", "my notes\n")
    done = box.score(box.responses())
    check(box.path("out.jsonl").read_text() == "my notes\n" or done.status == 0, "the file is gone")
    if done.status == 0:
        check(len(box.rewards()) == 60, "not as many rows")
        return "replaced by 60 rewards"
    return done.refused("out.jsonl")


def conversation(number: int) -> list[Message]:
    return [{"role": "user", "content": f"What is {number}?"}, {"role": "assistant", "content": "so " * 9}]


@attempt("the child answers with the same reward, or raises a sentence, within 20 s")
def fork_while_a_thread_scores(box: Box) -> str:
    with RewardScorer.from_folder(chat_checkpoint(), device="cpu") as scorer:
        expected = scorer.score_messages([conversation(1)])[0]
        stop = threading.Event()

        def work() -> None:
            while not stop.is_set():
                scorer.score_messages([conversation(n) for n in range(200)])

        thread = threading.Thread(target=work)
        thread.start()
        outcomes = []
        try:
            for number in range(5):
                time.sleep(0.05 * number)

                def call() -> int:
                    try:
                        return 0 if abs(scorer.score_messages([conversation(1)])[0] - expected) < 1e-5 else 5
                    except UserError:
                        return 2

                outcomes.append(Child(call, box.path("log.txt")).wait(20))
        finally:
            stop.set()
            thread.join()
    check(set(outcomes) <= {0, 2}, f"outcomes {outcomes}")
    return f"outcomes {outcomes} (0: the same reward, 2: a sentence)"


@attempt("the same reward, or a sentence")
def pickled_scorer(box: Box) -> str:
    with RewardScorer.from_folder(chat_checkpoint(), device="cpu") as scorer:
        expected = scorer.score_messages([conversation(1)])
        try:
            copy = pickle.loads(pickle.dumps(scorer))
        except (TypeError, UserError) as error:
            return f"refused: {error}"
        with copy:
            check(copy.score_messages([conversation(1)]) == expected, "another reward")
    return "the same reward"


@attempt("refused: the weights have changed since")
def pickle_of_a_folder_that_has_changed(box: Box) -> str:
    folder = box.copy(chat_checkpoint(), "model")
    with RewardScorer.from_folder(folder, device="cpu") as scorer:
        text = pickle.dumps(scorer)
    change_weights(folder, lambda name, value: value * 2 if "score" in name else value)
    os.utime(folder / "model.safetensors", (1, 1))
    try:
        with pickle.loads(text):
            raise Held("loaded another model")
    except UserError as error:
        return f"refused: {error}"


def change_weights(folder: Path, change: object) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file({n: change(n, v) for n, v in weights.items()}, folder / "model.safetensors", {"format": "pt"})  # type: ignore[operator]


@attempt("refused: weights that are not finite")
def one_weight_is_not_a_number(box: Box) -> str:
    folder = box.copy(text_checkpoint(), "model")

    def spoil(name: str, value: torch.Tensor) -> torch.Tensor:
        if "layers.1.mlp.down_proj" in name:
            value.view(-1)[7] = torch.nan
        return value

    change_weights(folder, spoil)
    try:
        RewardScorer.from_folder(folder, device="cpu")
    except UserError as error:
        return box.score(box.responses(), model=folder).refused("finite") or str(error)
    raise Held("the scorer loaded it")


@attempt("an exception, never a reward that is not finite")
def weights_spoiled_in_memory(box: Box) -> str:
    with RewardScorer.from_folder(text_checkpoint(), device="cpu") as scorer:
        for module in scorer.engine.model.modules():
            for parameter in module.parameters(recurse=False):
                parameter.data.fill_(torch.inf)
        try:
            found = scorer.score([scorer.build_group(None, ["a", "b"])])
        except UserError as error:
            return f"refused: {error}"
    raise Held(f"rewards {found}")


@attempt("refused, or a warning that every reward is the same")
def every_weight_is_zero(box: Box) -> str:
    folder = box.copy(text_checkpoint(), "model")
    change_weights(folder, lambda name, value: torch.zeros_like(value))
    done = box.score(box.responses(), model=folder)
    return done.refused("zero") if done.status == 2 else done.done("zero")


@attempt("status 0 and as many rewards as rows, or refused")
def input_grows_while_it_is_scored(box: Box) -> str:
    path = box.responses(count=300)
    one = child(box, path, 0)
    box.path("two").mkdir(exist_ok=True)
    while not parts(box) and not one.ended():
        time.sleep(0.001)
    with open(path, "a") as file:
        file.write('{"prompt": "q", "response": "late"}\n' * 50)
    try:
        status = one.wait()
    except ChildProcessError:
        status = one.status
    check(status in (0, 2), f"status {status}")
    if status == 2:
        return f"refused: {box.path('log-0.txt').read_text().strip()[-150:]}"
    rows = [json.loads(line) for line in box.path("two/out.jsonl").read_text().splitlines()]
    check(len(rows) in (300, 350) and all("reward" in row for row in rows), f"{len(rows)} rows")
    return f"{len(rows)} rows, each with its reward"
