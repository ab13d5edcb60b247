"""Sources and the token cache: what is no file, long rows, edits in place, damage."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import socket
import tracemalloc
from pathlib import Path

from benchmarks.hostile.box import Box, Child, attempt, check
from tests.small import text_pairs

PAIRS = "".join(json.dumps(row) + "\n" for row in text_pairs(24))


def in_time(box: Box, *overrides: str, words: tuple[str, ...], refused: bool = False) -> str:
    """Train in a child, which is killed if it hangs."""
    done = box.in_time(*box.arguments(*overrides), seconds=40)
    return done.refused(*words) if refused else done.done(*words)


@attempt("skipped with a warning that names it")
def fifo_in_a_folder(box: Box) -> str:
    box.write("data/a.jsonl", PAIRS)
    os.mkfifo(box.path("data/b.jsonl"))
    return in_time(box, f"data.train_files={box.path('data')}", words=("b.jsonl",))


@attempt("refused with status 2 and a sentence that names it")
def fifo_named_itself(box: Box) -> str:
    os.mkfifo(box.path("b.jsonl"))
    return in_time(box, f"data.train_files={box.path('b.jsonl')}", words=("b.jsonl",), refused=True)


@attempt("skipped with a warning that names it")
def socket_and_link_to_a_device(box: Box) -> str:
    box.write("data/a.jsonl", PAIRS)
    with socket.socket(socket.AF_UNIX) as server:
        os.chdir(box.path("data"))
        server.bind("s.jsonl")
        os.symlink("/dev/zero", box.path("data/z.jsonl"))
        return in_time(box, f"data.train_files={box.path('data')}", words=("s.jsonl", "z.jsonl"))


@attempt("refused or read with status 0, never a hang")
def links_in_a_circle(box: Box) -> str:
    box.write("data/a.jsonl", PAIRS)
    os.symlink(box.path("data"), box.path("data/again"))
    os.symlink(box.path("data/l2.jsonl"), box.path("data/l1.jsonl"))
    os.symlink(box.path("data/l1.jsonl"), box.path("data/l2.jsonl"))
    try:
        return in_time(box, f"data.train_files={box.path('data')}", words=())
    except AssertionError:
        return in_time(box, f"data.train_files={box.path('data')}", words=("l1.jsonl",), refused=True)


@attempt("dropped with a reason; memory stays below 10 times the row")
def row_of_sixteen_megabytes(box: Box) -> str:
    size = 16 << 20  # far above the blocks in which checkpoints are hashed
    long = json.dumps({"chosen": "word " * (size // 5), "rejected": "b"})
    path = box.write("a.jsonl", f"{long}\n{PAIRS}")
    box.train("trainer.total_training_steps=1", name="before")  # what is loaded once
    tracemalloc.start()
    done = box.train(f"data.train_files={path}", "data.max_row_bytes=1000000", name="long")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    check(peak < 10 * size, f"{peak / size:.1f} times the row")
    return f"{done.done('dropped', 'max_row_bytes')[-120:]} ({peak / size:.1f} times the row)"


@attempt("refused with status 2, or dropped with a reason; memory bounded")
def nesting_that_expands_and_a_file_without_line_ends(box: Box) -> str:
    path = box.write("a.jsonl", PAIRS + '{"chosen": ' + '{"a": ' * 5000)
    done = box.train(f"data.train_files={path}")
    return done.done("dropped") if done.status == 0 else done.refused("a.jsonl")


@attempt("the edit is noticed: other tokens than before")
def edit_in_place_with_equal_size_and_time(box: Box) -> str:
    path = Path(box.write("a.jsonl", PAIRS))
    box.train(f"data.train_files={path}", name="a").done()
    stamp = path.stat()
    path.write_text(PAIRS.replace("Question 11.", "Question 99."))
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    check(path.stat().st_size == stamp.st_size, "another size")
    box.train(f"data.train_files={path}", name="b").done()
    check(box.weights("a") != box.weights("b"), "the old tokens were used")
    return "tokenized again"


@attempt("the edit is noticed: other tokens than before")
def parquet_page_edited_in_place(box: Box) -> str:
    path = Path(box.pairs("a.parquet"))
    box.train(f"data.train_files={path}", name="a").done()
    stamp, content = path.stat(), path.read_bytes()
    place = content.index(b"good good")
    path.write_bytes(content[:place] + b"nice good" + content[place + 9 :])
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    done = box.train(f"data.train_files={path}", name="b")
    if done.status == 2:
        return done.refused("a.parquet")
    check(box.weights("a") != box.weights("b"), "the old tokens were used")
    return "tokenized again"


def damage(box: Box, *changes: str) -> str:
    """Damage every file of the cache, in turn in these ways; the next run must give the same weights and say why."""
    box.train(name="a").done()
    [store] = [path for path in box.path("cache").iterdir() if path.is_dir()]
    names = sorted(path.name for path in store.iterdir() if path.is_file() and path.stat().st_size)
    said = ""
    for name, change in zip(names, itertools.cycle(changes), strict=False):
        content = (store / name).read_bytes()
        middle = len(content) // 2
        damaged = {
            "flip": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
            "truncate": content[:middle],
            "append": content + b"\0" * 64,
            "zero": bytes(len(content)),
        }[change]
        if damaged == content:  # zeros
            damaged += b"\0"
        (store / name).write_bytes(damaged)
        done = box.train(name=f"b-{name}")
        done.done()
        check(box.weights("a") == box.weights(f"b-{name}"), f"{name}: trained on other tokens")
        loud = [line for line in done.err.splitlines() if "damaged" in line or "again" in line or "rebuil" in line]
        check(loud, f"{name}: the same weights, but nothing was said")
        said = loud[0]
    return f"{len(names)} files, the same weights; {said[:100]}"


@attempt("the same weights; the damage is reported")
def cache_with_a_flipped_bit_in_each_file(box: Box) -> str:
    return damage(box, "flip")


@attempt("the same weights; the damage is reported")
def cache_with_files_truncated_zeroed_and_lengthened(box: Box) -> str:
    return damage(box, "truncate", "zero", "append")


@attempt("refused, or the same weights as without the kill")
def tokenization_killed_at_several_moments(box: Box) -> str:
    box.pairs(count=4000)
    box.train("trainer.total_training_steps=2", "data.cache_dir=" + str(box.path("calm")), name="a").done()
    kills = 0
    for number in range(3):
        child = Child(lambda: box.train("trainer.total_training_steps=2", name="b").status, box.path("log.txt"))
        wanted = number * 2
        kills += child.kill_when(lambda w=wanted: len(box.names("cache")) > w)  # type: ignore[misc]
    box.train("trainer.total_training_steps=2", name="b").done()
    check(box.weights("a", 2) == box.weights("b", 2), "other weights")
    return f"{kills} kills, the same weights"


@attempt("refused with status 2 and a sentence that names the file, or the rows before are read")
def truncated_and_mislabelled_files(box: Box) -> str:
    whole = Path(box.pairs("a.parquet")).read_bytes()
    zipped = gzip.compress(PAIRS.encode())
    for name, content in (
        ("cut.parquet", whole[:-100]), ("cut.jsonl.gz", zipped[:-20]), ("text.parquet", PAIRS.encode()),
        ("zip.jsonl", zipped), ("utf16.jsonl", PAIRS.encode("utf-16")), ("empty.jsonl", b""), ("nul.jsonl", b"\0" * 99),
    ):  # fmt: skip
        done = box.train(f"data.train_files={box.write(name, content)}")
        happened = done.refused(name)
    return happened


@attempt("the same weights as without the byte-order mark and with other line ends")
def byte_order_mark_and_line_ends(box: Box) -> str:
    box.train(f"data.train_files={box.write('a.jsonl', PAIRS)}", name="a").done()
    other = b"\xef\xbb\xbf" + PAIRS.replace("\n", "\r\n\r\n").encode().rstrip()
    box.train(f"data.train_files={box.write('b.jsonl', other)}", name="b").done()
    check(box.weights("a") == box.weights("b"), "other weights")
    return "the same weights"
