"""Rows and layouts: labels that say which side is better, columns that are not read, responses of other shapes."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.hostile.box import Box, Outcome, attempt, chat_checkpoint, check, text_checkpoint
from rm_gallery.data.formats import FormatConfig, RowCounts, RowReader, choose_format, read_groups
from rm_gallery.data.sources import read_rows, resolve_entries

GOOD, BAD = "good", "bad"


def read(path: str) -> tuple[list[tuple[str, str]], RowCounts]:
    """(better, worse) of every comparison, and the counts of dropped rows."""
    rows = list(read_rows(resolve_entries([path], key="data.train_files"), key="data.train_files"))
    config = FormatConfig()
    counts = RowCounts()
    reader = RowReader(config, choose_format(rows, config).name, has_chat_template=True)
    found = []
    for _, group, _ in read_groups(rows, reader, counts):
        texts = [each if isinstance(each, str) else str(each[-1]["content"]) for each in group.responses]
        found += [(texts[each.better], texts[each.worse]) for each in group.comparisons]
    return found, counts


def all_right(path: str, count: int) -> str:
    found, counts = read(path)
    wrong = [pair for pair in found if not (pair[0].startswith(GOOD) and pair[1].startswith(BAD))]
    check(not wrong, f"{len(wrong)} of {len(found)} pairs are reversed: {wrong[:1]}")
    check(len(found) == count, f"{len(found)} pairs, not {count}; dropped: {counts.dropped.describe()}")
    dropped = f"; dropped {counts.dropped.describe()}" if counts.dropped.total else ""
    return f"{len(found)} pairs, none reversed{dropped}"


def sides(number: int) -> tuple[str, str, bool]:
    """First and second response, and whether the second is better."""
    second = bool(number % 2)
    good, bad = f"{GOOD} {number}", f"{BAD} {number}"
    return (bad, good, True) if second else (good, bad, False)


@attempt("no pair is reversed")
def pku_safer_rlhf(box: Box) -> str:
    rows = [
        {"prompt": f"q{n}", "response_0": a, "response_1": b, "better_response_id": int(second), "safer_response_id": 0}
        for n in range(8) for a, b, second in [sides(n)]
    ]  # fmt: skip
    return all_right(box.write("a.jsonl", rows), 8)


@attempt("no pair is reversed, bad labels are dropped")
def pku_with_labels_out_of_range(box: Box) -> str:
    rows: list[dict[str, Any]] = []
    for n in range(12):
        a, b, second = sides(n)
        rows.append({"prompt": f"q{n}", "response_0": a, "response_1": b, "better_response_id": int(second)})
    for n, label in ((8, 2), (9, -1), (10, None), (11, "x")):
        rows[n]["better_response_id"] = label
    return all_right(box.write("a.jsonl", rows), 8)


@attempt("no pair is reversed: labels=1 prefers A")
def shp(box: Box) -> str:
    rows = [
        {"history": f"q{n}", "human_ref_A": a, "human_ref_B": b, "labels": int(not second), "score_A": 5}
        for n in range(8) for a, b, second in [sides(n)]
    ]  # fmt: skip
    return all_right(box.write("a.jsonl", rows), 8)


@attempt("no pair is reversed, ties are dropped")
def arena_with_ties(box: Box) -> str:
    def turns(n: int, text: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": text}]

    rows = []
    for n in range(12):
        a, b, second = sides(n)
        winner = "tie" if n % 3 == 2 else "tie (bothbad)" if n == 0 else ("model_b" if second else "model_a")
        rows.append({"winner": winner, "conversation_a": turns(n, a), "conversation_b": turns(n, b)})
    return all_right(box.write("a.jsonl", rows), 7)


@attempt("no pair is reversed: rank 1 is best")
def nectar(box: Box) -> str:
    rows = []
    for n in range(6):
        answers = [{"answer": f"{BAD} {n}", "rank": 7.0}, {"answer": f"{GOOD} {n}", "rank": 1.0}]
        rows.append({"prompt": f"q{n}", "answers": answers[:: 1 if n % 2 else -1]})
    return all_right(box.write("a.jsonl", rows), 6)


@attempt("no pair is reversed")
def summarize_from_feedback(box: Box) -> str:
    rows = [
        {"info": {"post": f"q{n}"}, "summaries": [{"text": a}, {"text": b}], "choice": int(second)}
        for n in range(6) for a, b, second in [sides(n)]
    ]  # fmt: skip
    return all_right(box.write("a.jsonl", rows), 6)


@attempt("no pair is reversed; the turns come from from/value")
def sharegpt_sides(box: Box) -> str:
    rows = [
        {"conversations": [{"from": "human", "value": f"q{n}"}], "chosen": {"from": "gpt", "value": f"{GOOD} {n}"},
         "rejected": {"from": "gpt", "value": f"{BAD} {n}"}} for n in range(4)
    ]  # fmt: skip
    return all_right(box.write("a.jsonl", rows), 4)


@attempt("refused with status 2, naming the label column; no advice to map it")
def unknown_label_column(box: Box) -> str:
    rows = [{"prompt": f"q{n}", "answer_a": a, "answer_b": b, "preferred": "ab"[second]} for n in range(8)
            for a, b, second in [sides(n)]]  # fmt: skip
    done = box.train(f"data.train_files={box.write('a.jsonl', rows)}")
    check("chosen_key=answer_a" not in done.err, f"advises a mapping: {done.last}")
    return done.refused("preferred", "custom-datasets.md")


@attempt("a warning names the columns and the key, in train, show-data and score")
def input_columns_that_nothing_reads(box: Box) -> str:
    rows = [{"prompt": f"q{n}", "passage": f"A long passage about {n} that matters.", "chosen": f"good {n}",
             "rejected": f"bad {n}"} for n in range(24)]  # fmt: skip
    path = box.write("a.jsonl", rows)
    commands: list[Outcome] = [box.train(f"data.train_files={path}"), box.run("show-data", f"data.train_files={path}"),
                               box.score(path)]  # fmt: skip
    happened = [done.done("passage", "data.") for done in commands]
    return happened[0]


@attempt("two prompts that differ in the input column get different rewards")
def input_beside_an_instruction(box: Box) -> str:
    rows = [{"instruction": "Translate.", "input": text, "response": "Yes."} for text in ("one", "two three")]
    box.score(box.write("a.jsonl", rows), model=chat_checkpoint()).done()
    first, second = box.rewards()
    check(first != second, f"both {first}")
    return f"{first:.4f} and {second:.4f}"


@attempt("the same reward as the plain string")
def response_as_one_message(box: Box) -> str:
    rows = [{"prompt": "q", "response": "yes"}, {"prompt": "q", "response": {"role": "assistant", "content": "yes"}}]
    names = [box.write(f"{n}.jsonl", [row]) for n, row in enumerate(rows)]
    found = []
    for number, name in enumerate(names):
        box.score(name, model=chat_checkpoint(), output=f"scored-{number}.jsonl").done()
        found.append(box.rewards(f"scored-{number}.jsonl")[0])
    check(found[0] == found[1], f"{found}")
    return f"both {found[0]:.4f}"


@attempt("refused with status 2")
def no_row_gets_a_reward(box: Box) -> str:
    return box.score(box.write("a.jsonl", [{"prompt": "q", "response": 3}] * 4)).refused("response")


@attempt("another reward with other tools; nulls are kept")
def tools_per_row(box: Box) -> str:
    folder = box.copy(chat_checkpoint(), "model")
    template = (
        "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    )
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))

    def tool(**extra: Any) -> list[Any]:
        return [{"type": "function", "function": {"name": "f", "parameters": extra}}]

    tools: list[Any] = [None, tool(), tool(default=None), json.dumps(tool(default=None))]
    rows = [{"prompt": "q", "response": "yes", **({"tools": each} if each else {})} for each in tools]
    box.score(box.write("a.jsonl", rows), model=folder).done()
    found = box.rewards()
    check(len(set(found[:3])) == 3 and found[2] == found[3], f"rewards {found}")
    return "three rewards, and the JSON text like the object"


@attempt("dropped with a reason; the other rows are read")
def rows_that_are_no_rows(box: Box) -> str:
    deep = '{"chosen": ' + "[" * 3000 + "]" * 3000 + ', "rejected": "b"}'
    lines = [
        deep,
        "[]",
        '"text"',
        "NaN",
        "{}",
        '{"chosen": 1e999, "rejected": "b"}',
        '{"chosen": "\\ud800", "rejected": ""}',
    ]
    good = [json.dumps({"chosen": f"good {n}", "rejected": f"bad {n}"}) for n in range(24)]
    done = box.train(f"data.train_files={box.write('a.jsonl', chr(10).join([*good, *lines]) + chr(10))}")
    return done.done("dropped")


@attempt("dropped or refused with a reason, never in a loss")
def weights_and_margins_that_are_not_finite(box: Box) -> str:
    rows = [{"chosen": f"good {n}", "rejected": f"bad {n}", "weight": 1.0} for n in range(24)]
    lines = [json.dumps(row) for row in rows]
    lines += ['{"chosen": "a", "rejected": "b", "weight": NaN}', '{"chosen": "a", "rejected": "b", "weight": 1e999}',
              '{"chosen": "a", "rejected": "b", "weight": -1}']  # fmt: skip
    done = box.train(f"data.train_files={box.write('a.jsonl', chr(10).join(lines) + chr(10))}")
    if done.status == 2:
        return done.refused("weight")
    happened = done.done("dropped 3", "weight")
    return happened


@attempt("read, or refused with status 2 and a sentence")
def columns_of_unusual_arrow_types(box: Box) -> str:
    table = pa.table({
        "chosen": pa.array([f"good {n}" for n in range(24)], pa.large_string()).dictionary_encode(),
        "rejected": pa.array([f"bad {n}".encode() for n in range(24)], pa.binary()),
        "extra": pa.array([{"a": [n]} for n in range(24)]),
    })  # fmt: skip
    pq.write_table(table, box.path("a.parquet"))
    done = box.train(f"data.train_files={box.path('a.parquet')}")
    return done.done() if done.status == 0 else done.refused("rejected")


@attempt("as many rewards as rows, in order, with reasons for the others")
def mixed_good_and_bad_rows_are_scored(box: Box) -> str:
    rows: list[Any] = [{"prompt": f"q{n}", "response": f"a{n}"} for n in range(20)]
    rows[3]["response"] = None
    rows[7] = {"prompt": "q7"}
    rows[9]["response"] = "x" * 5000
    rows[11]["prompt"] = {"role": 1}
    done = box.score(box.write("a.jsonl", rows), model=text_checkpoint())
    done.done("without a reward")
    found = box.rewards()
    check(len(found) == 20 and [found[n] is None for n in (3, 7)] == [True, True], f"{found}")
    check(sum(each is None for each in found) <= 4, f"{sum(each is None for each in found)} without a reward")
    return f"20 rows, {sum(each is None for each in found)} without a reward"
