"""What a person can mend ends with status 2 and one sentence that says what, where, and what to do."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rm_gallery.cli import main
from tests.small import CHATML, chat_pairs, make_tokenizer, text_pairs, write_pairs

Run = Callable[..., tuple[int, list[str]]]
GOOD = text_pairs(6)


@pytest.fixture
def run(qwen2_folder: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Starts training; gives the exit status and the lines of errors. `train.parquet` holds six good pairs."""
    write_pairs(in_tmp / "train.parquet", GOOD)

    def start(*overrides: str) -> tuple[int, list[str]]:
        status = main([
            "train", f"model.partial_pretrain={qwen2_folder}", "model.fsdp_config.model_dtype=fp32",
            "data.train_files=train.parquet", "data.max_length=200", "data.train_batch_size=4",
            "trainer.total_training_steps=1", "trainer.default_local_dir=run", "trainer.experiment_name=run",
            "trainer.logger=[]", "trainer.device=cpu", *overrides,
        ])  # fmt: skip
        printed = capsys.readouterr().err
        assert "Traceback" not in printed
        return status, [line for line in printed.splitlines() if line.startswith("rm-gallery: error: ")]

    return start


def refused(run: Run, *overrides: str) -> str:
    """The one sentence with which a run is refused; nothing is written then."""
    status, lines = run(*overrides)
    assert status == 2
    assert len(lines) == 1
    assert not Path("run").exists()
    return lines[0].removeprefix("rm-gallery: error: ")


def write_table(**columns: Any) -> None:
    pq.write_table(pa.table(columns), "train.parquet")


TEXTS = ["one text", "another text"]


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        ({"chosen": TEXTS}, "train.parquet: no column 'rejected' (columns: chosen); rename it or set data."),
        ({"chosen": pa.array([], pa.string())}, "train.parquet: the file has no rows; remove it from "),
        ({"chosen": [1, 2], "rejected": TEXTS}, "train.parquet:0: column 'chosen' contains int, not text or messages"),
        ({"chosen": [None, 2], "rejected": TEXTS}, "train.parquet:1: column 'chosen' contains int, not text or "),
        ({"chosen": [[1], [2]], "rejected": TEXTS}, "train.parquet:0: column 'chosen' contains lists of int, not "),
        ({"chosen": TEXTS, "rejected": TEXTS},
         "data.train_files: none of 2 rows can be used: 2 chosen equal to rejected (first: train.parquet:0); "),
        ({"chosen": [None, None], "rejected": TEXTS},
         "data.train_files: none of 2 rows can be used: 2 null chosen (first: train.parquet:0); "),
    ],
)  # fmt: skip
def test_data_that_cannot_be_used_are_refused(run: Run, columns: dict[str, Any], sentence: str) -> None:
    write_table(**columns)
    assert refused(run).startswith(sentence)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["data.train_files=nope.parquet"], "data.train_files=nope.parquet: no such file or folder"),
        (["data.val_files=nope.parquet"], "data.val_files=nope.parquet: no such file or folder"),
        (["data.train_files=empty"], "data.train_files=empty: the folder has no data file (parquet, "),
        (["data.train_files=broken.parquet"], "broken.parquet: cannot be read as parquet ("),
        (["data.max_length=3"],
         "data.train_files: none of 6 rows can be used: 6 longer than data.max_length=3 (first: train.parquet:0); "),
        (["data.max_length=3", "data.filter_overlong_prompts=false"], "train.parquet:0: a text of "),
        (["data.train_batch_size=0"], "data.train_batch_size=0: must be at least 1"),
        (["data.train_batch_size=7", "data.drop_last=true"],
         "data.train_batch_size=7 with data.drop_last=true leaves no step: there are 6 pairs; lower it, or set "),
        (["optim.lr_scheduler=cosin"], "optim.lr_scheduler=cosin: must be one of cosine, wsd, constant. Did you mean"),
        (["data.chat_template=nope.jinja"], "data.chat_template=nope.jinja: neither a Jinja template nor a file"),
        (["data.input_style=chat", "data.chat_template={% for %}"], "the chat template is not valid Jinja (line 1: "),
    ],
)  # fmt: skip
def test_settings_that_cannot_work_are_refused(run: Run, overrides: list[str], sentence: str) -> None:
    Path("empty").mkdir()
    Path("broken.parquet").write_bytes(Path("train.parquet").read_bytes()[:-20])
    assert refused(run, *overrides).startswith(sentence)


@pytest.mark.parametrize(
    ("missing", "sentence"),
    [
        (r".*\.safetensors", "the folder has no weights; copy the model's *.safetensors files there"),
        (r"tokenizer.*|.*\.jinja", "there is no tokenizer; copy tokenizer.json and tokenizer_config.json there"),
        (r"tokenizer\.json", "there is no tokenizer; copy tokenizer.json and tokenizer_config.json there"),
        (r"config\.json", "no model found ("),
        (r".*", "no tokenizer can be loaded from there ("),
    ],
)
def test_a_model_folder_that_lacks_something_is_named(
    run: Run, qwen2_folder: Path, missing: str, sentence: str
) -> None:
    Path("model").mkdir()
    for file in qwen2_folder.iterdir():
        if not re.fullmatch(missing, file.name):
            shutil.copy(file, "model")
    assert refused(run, "model.partial_pretrain=./model").startswith(f"model.partial_pretrain=./model: {sentence}")


def test_weights_that_are_cut_off_are_named(run: Run, qwen2_folder: Path) -> None:
    shutil.copytree(qwen2_folder, "model")
    weights = Path("model/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    assert refused(run, "model.partial_pretrain=./model").startswith(
        "model.partial_pretrain=./model: model.safetensors cannot be read ("
    )


def test_chats_for_a_tokenizer_without_template_are_refused(run: Run, qwen2_folder: Path) -> None:
    shutil.copytree(qwen2_folder, "model")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    Path("model/chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained("model")
    write_pairs(Path("train.parquet"), chat_pairs(2))
    assert refused(run, "model.partial_pretrain=./model").startswith(
        "train.parquet:0: the data are chat messages but the tokenizer has no chat template; set data.chat_template"
    )


def test_validation_data_of_another_style_are_refused(run: Run) -> None:
    write_pairs(Path("val.parquet"), chat_pairs(2))
    assert refused(run, "data.val_files=val.parquet").startswith(
        "data.val_files hold chat but data.train_files hold text; set data.input_style"
    )


def odd_rows() -> list[dict[str, Any]]:
    return [
        *GOOD[:3],
        {"chosen": None, "rejected": "b"},
        {"chosen": "a", "rejected": " "},
        {"chosen": "a", "rejected": "a"},
        {"chosen": "long " * 100, "rejected": "a"},
        {"chosen": None, "rejected": "c"},
        *GOOD[3:],
    ]


def test_dropped_rows_are_counted_by_reason_with_an_example(run: Run) -> None:
    write_pairs(Path("train.parquet"), odd_rows())
    assert run() == (0, [])
    data = json.loads(Path("run/run.json").read_text())["data"]["train"]
    assert data["groups"] == 6
    assert data["dropped"] == {
        "null chosen": {"rows": 2, "first": "train.parquet:3"},
        "empty rejected": {"rows": 1, "first": "train.parquet:4"},
        "chosen equal to rejected": {"rows": 1, "first": "train.parquet:5"},
        "longer than data.max_length=200": {"rows": 1, "first": "train.parquet:6"},
    }


def test_bad_rows_error_stops_at_the_first(run: Run) -> None:
    write_pairs(Path("train.parquet"), odd_rows())
    assert refused(run, "data.bad_rows=error").startswith("train.parquet:3: null chosen; fix the row, or set ")


@pytest.mark.parametrize("truncation", ["left", "right"])
@pytest.mark.slow
def test_long_texts_are_cut_where_that_is_asked_for(run: Run, truncation: str) -> None:
    status, lines = run("data.filter_overlong_prompts=false", f"data.truncation={truncation}", "data.max_length=40")
    assert (status, lines) == (0, [])
    data = json.loads(Path("run/run.json").read_text())["data"]["train"]
    assert data["groups"] + sum(each["rows"] for each in data["dropped"].values()) == 6
    assert data["tokens"] <= 6 * 2 * 40


@pytest.mark.slow
def test_a_tilde_in_the_model_path_means_the_home_folder(
    run: Run, qwen2_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(qwen2_folder.parent))
    assert run(f"model.partial_pretrain=~/{qwen2_folder.name}") == (0, [])


@pytest.mark.slow
def test_a_batch_larger_than_the_data_trains_on_all_of_it(run: Run) -> None:
    assert run("data.train_batch_size=1000") == (0, [])


@pytest.mark.slow
def test_a_conversation_the_template_refuses_is_dropped(run: Run) -> None:
    refusing = "{% if messages|length == 2 and messages[0].content == 'odd' %}{{ raise_exception('no') }}{% endif %}"
    Path("own.jinja").write_text(refusing + CHATML)
    write_pairs(Path("train.parquet"), [{"prompt": "odd", "chosen": "a", "rejected": "b"}, *chat_pairs_as_text(3)])
    assert run("data.chat_template=own.jinja") == (0, [])
    dropped = json.loads(Path("run/run.json").read_text())["data"]["train"]["dropped"]
    assert dropped == {"chat template rejects the conversation: no": {"rows": 1, "first": "train.parquet:0"}}


def chat_pairs_as_text(count: int) -> list[dict[str, str]]:
    return [{**row, "prompt": row["prompt"][0]["content"]} for row in chat_pairs(count)]


@pytest.mark.slow
def test_an_earlier_run_is_kept_and_the_new_one_refused(run: Run) -> None:
    assert run() == (0, [])
    before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    status, lines = run("trainer.resume_mode=disable")
    assert status == 2
    sentence = "run: holds an earlier run (newest checkpoint global_step_1), which cannot be resumed ("
    assert lines[0].startswith(f"rm-gallery: error: {sentence}trainer.resume_mode=disable); set ")
    assert {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()} == before
