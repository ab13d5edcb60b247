"""`rm_gallery.train`: data in memory, callbacks, errors, and the page docs/python.md."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import rm_gallery
from rm_gallery import UserError, train
from rm_gallery.data.sources import read_rows, resolve_entries, save_rows
from tests.small import text_pairs

SETTINGS: dict[str, Any] = {
    "data.max_length": 128, "data.train_batch_size": 8, "data.num_workers": 0, "trainer.total_training_steps": 4,
    "trainer.logger": [], "optim.lr": 1e-3, "model.fsdp_config.model_dtype": "fp32",
}  # fmt: skip
PAGE = Path(__file__).parents[1] / "docs/python.md"


@pytest.fixture(autouse=True)
def cache(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RM_GALLERY_CACHE", str(in_tmp / "cache"))


def test_every_kind_of_data_in_memory_is_written_as_the_rows_that_it_holds(in_tmp: Path) -> None:
    import datasets
    import pandas

    rows = [
        {"prompt": [{"role": "user", "content": f"Question {n}"}], "chosen": "a", "rejected": "b"} for n in range(5)
    ]
    kinds = [rows, iter(rows), pandas.DataFrame(rows), pa.Table.from_pylist(rows), datasets.Dataset.from_list(rows)]
    paths = [save_rows(data, in_tmp / "rows", "train_data") for data in kinds]
    for path in paths:
        [file] = resolve_entries(str(path), key="data.train_files")
        assert [row.values for row in read_rows([file], key="data.train_files")] == rows
    assert paths[0] == paths[1], "equal content is written once"
    assert [path.suffix for path in paths[1:]] == [".jsonl", ".parquet", ".parquet", ".parquet"]
    assert sorted({*paths}) == sorted((in_tmp / "rows").iterdir()), "no temporary file remains"


@pytest.mark.slow
def test_rows_in_memory_train_as_their_file_does(in_tmp: Path, qwen2_folder: Path) -> None:
    rows = text_pairs(24, seed=0)
    pq.write_table(pa.Table.from_pylist(rows), "rows.parquet")
    kinds: dict[str, Any] = {"path": Path("rows.parquet"), "list": rows, "table": pa.Table.from_pylist(rows)}
    losses = [
        train(qwen2_folder, data, **SETTINGS, **{"trainer.experiment_name": name}).metrics["train/loss"]
        for name, data in kinds.items()
    ]
    assert losses[0] == losses[1] == losses[2]


@pytest.mark.slow
def test_callbacks_get_the_steps_validations_and_checkpoints(in_tmp: Path, qwen2_folder: Path) -> None:
    rows, calls = text_pairs(24, seed=0), []
    result = train(
        qwen2_folder, rows, text_pairs(8, seed=1),
        on_step=lambda step, metrics: calls.append(("step", step, "train/loss" in metrics)),
        on_validation=lambda step, metrics: calls.append(("validation", step, "val/accuracy" in metrics)),
        on_save=lambda step, folder: calls.append(("save", step, (folder / "manifest.json").is_file())),
        **SETTINGS, **{"trainer.test_freq": 2, "trainer.save_freq": 3, "trainer.async_save": True},
    )  # fmt: skip
    assert [call for call in calls if call[0] == "step"] == [("step", step, True) for step in (1, 2, 3, 4)]
    assert [call for call in calls if call[0] == "validation"] == [("validation", 2, True), ("validation", 4, True)]
    assert [call for call in calls if call[0] == "save"] == [("save", 3, True), ("save", 4, True)]
    assert result.checkpoint.name == "global_step_4" and {"train/loss", "val/accuracy"} <= set(result.metrics)
    [(chosen, rejected)] = result.scorer.score_pairs(rows[:1])
    assert chosen != rejected


@pytest.mark.slow
def test_an_exception_of_a_callback_ends_the_run_and_the_same_call_resumes_it(in_tmp: Path, qwen2_folder: Path) -> None:
    rows = text_pairs(24, seed=0)

    def stop(step: int, folder: Path) -> None:
        raise ArithmeticError("stop here")

    with pytest.raises(ArithmeticError, match="stop here"):
        train(qwen2_folder, rows, on_save=stop, **SETTINGS, **{"trainer.save_freq": 2})
    resumed: list[int] = []
    result = train(
        qwen2_folder, rows, on_step=lambda step, _: resumed.append(step), **SETTINGS, **{"trainer.save_freq": 2}
    )
    assert resumed == [3, 4] and result.checkpoint.name == "global_step_4"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "train_data has no rows"),
        ([1], "train_data[0] is a int; each row must be a dict"),
        ([{"chosen": object(), "rejected": "b"}], "train_data[0]: cannot be written as JSON (a value is a object)"),
        ({"train": [], "test": []}, "train_data is a dict with train, test; pass one dataset or a list of rows"),
        (3, "train_data is a int; pass a path, a list of dicts, a pandas.DataFrame or a datasets.Dataset"),
    ],
)  # fmt: skip
def test_data_that_are_no_rows_are_named(data: Any, message: str, in_tmp: Path, qwen2_folder: Path) -> None:
    with pytest.raises(UserError) as error:
        train(qwen2_folder, data, **SETTINGS)
    assert str(error.value) == message
    assert not list((in_tmp / "cache/rows").glob("*"))


def test_unknown_settings_are_listed(in_tmp: Path, qwen2_folder: Path) -> None:
    with pytest.raises(UserError, match=r"data\.maxlength: unknown key. Did you mean 'data\.max_length'\?"):
        train(qwen2_folder, [{"chosen": "a", "rejected": "b"}], **{"data.maxlength": 3})


def test_importing_the_package_loads_no_torch() -> None:
    code = (
        "import sys, rm_gallery; rm_gallery.train; assert 'torch' not in sys.modules; print(sorted(rm_gallery.__all__))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PAGE.parents[1])
    assert done.stdout.strip() == str(sorted(rm_gallery.__all__)), done.stderr


@pytest.mark.slow
def test_the_page_runs_as_written(in_tmp: Path, qwen2_folder: Path) -> None:
    (in_tmp / "Qwen2.5-0.5B-Instruct").symlink_to(qwen2_folder)
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        exec(compile(block, str(PAGE), "exec"), names)
    assert names["result"].run_dir == Path("checkpoints/bt/sums")
    assert names["result"].checkpoint == Path("checkpoints/bt/sums/global_step_12")
    assert len(names["losses"]) == 10 and names["accuracies"][-1][0] == 10 and len(names["folders"]) == 2
