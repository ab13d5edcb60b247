"""Loading a class from a file: from anywhere, with the modules beside it, in any process; and its fingerprint."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

from rm_gallery.data.custom import load_custom_class, source_fingerprint
from rm_gallery.data.formats import CustomClassConfig, FormatConfig
from rm_gallery.errors import UserError
from tests.data.custom.worker import in_worker
from tests.small import make_tokenizer

ROOT = Path(__file__).parents[3]
BASED = """
from tutorials.cookbooks.training_reward_model.base import BaseTrainDataset

class Mine(BaseTrainDataset):
    def _build_messages(self, example):
        return [{"role": "user", "content": example["query"]}]
"""


def write(text: str, path: str = "mine.py") -> CustomClassConfig:
    """A file with this text, and the configuration that names the class Mine in it."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text)
    return CustomClassConfig(path, "Mine")


def with_constant(name: str, text: str = "") -> str:
    """The text of a class that keeps `VALUE` of a module of this name."""
    return f"from {name} import VALUE\nclass Mine:\n    value = VALUE\n    def build_group(self, row): ...\n{text}"


def refused(config: CustomClassConfig) -> str:
    with pytest.raises(UserError) as error:
        load_custom_class(config)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("path", ["./mine.py", "mine.py", "sub/../mine.py", "~/mine.py"])
def test_the_path_starts_where_the_user_stands(path: str, in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(in_tmp))
    Path("sub").mkdir()
    write(BASED)
    assert load_custom_class(CustomClassConfig(path, "Mine")).__name__ == "Mine"
    assert load_custom_class(CustomClassConfig(str(in_tmp / "mine.py"), "Mine")).__name__ == "Mine"


def test_a_file_may_have_the_name_of_any_module(in_tmp: Path) -> None:
    import json

    for name in ("json", "torch", "tutorials", "utils", "my-data.v2"):
        assert load_custom_class(write(BASED, f"{name}.py")).__name__ == "Mine"
    assert json is sys.modules["json"]
    assert json.loads("1") == 1


def test_dataclasses_and_type_hints_work_in_the_file(in_tmp: Path) -> None:
    from typing import get_type_hints

    loaded = load_custom_class(
        write(
            "from __future__ import annotations\nfrom dataclasses import dataclass\n\n@dataclass\nclass Mine:\n"
            "    a: Other\n    def build_group(self, row): ...\n\nclass Other: ...\n"
        )
    )
    assert get_type_hints(loaded)["a"].__name__ == "Other"


def test_modules_beside_the_file_are_found_and_leave_no_trace_on_the_path(in_tmp: Path) -> None:
    write("VALUE = 1", "sub/helper_of_mine.py")
    write("from .deeper import VALUE", "sub/package_of_mine/__init__.py")
    write("VALUE = 2", "sub/package_of_mine/deeper.py")
    write("VALUE = 3", "sub/folder_of_mine/part.py")  # without __init__.py
    before = list(sys.path), list(sys.meta_path)
    for number, name in enumerate(("helper_of_mine", "package_of_mine", "folder_of_mine.part"), start=1):
        assert load_custom_class(write(with_constant(name), f"sub/{name}_user.py")).value == number  # type: ignore[attr-defined]
    assert (list(sys.path), list(sys.meta_path)) == before


def test_modules_of_one_name_in_two_folders_are_kept_apart(in_tmp: Path) -> None:
    for number in (1, 2):
        write(f"VALUE = {number}", f"of{number}/same_name.py")
    configs = [write(with_constant("same_name"), f"of{number}/mine.py") for number in (1, 2)]
    assert [load_custom_class(config).value for config in configs] == [1, 2]  # type: ignore[attr-defined]


def test_a_module_that_other_code_had_imported_stays_where_it_was(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("VALUE = 1", "theirs/seen_before.py")
    monkeypatch.syspath_prepend(in_tmp / "theirs")
    import seen_before  # type: ignore[import-not-found]

    write("VALUE = 2", "mine/seen_before.py")
    assert load_custom_class(write(with_constant("seen_before"), "mine/mine.py")).value == 2  # type: ignore[attr-defined]
    assert sys.modules["seen_before"] is seen_before
    del sys.modules["seen_before"]


def test_folders_of_data_and_of_tutorials_hide_no_package(in_tmp: Path) -> None:
    for name in ("pyarrow", "tutorials", "rm_gallery"):
        Path(name).mkdir()
    write("", "tutorials/__init__.py")
    write("raise RuntimeError('hidden')", "json.py")
    assert load_custom_class(write("import json, pyarrow.parquet, rm_gallery.errors\n" + BASED)).__name__ == "Mine"


def test_a_file_is_run_once_and_again_after_a_change_of_it_or_beside_it(in_tmp: Path) -> None:
    write("VALUE = 1", "changing.py")
    config = write(with_constant("changing"))
    first = load_custom_class(config)
    assert load_custom_class(config) is first
    write("VALUE = 11", "changing.py")
    second = load_custom_class(config)
    assert (first.value, second.value) == (1, 11)  # type: ignore[attr-defined]
    assert load_custom_class(write(with_constant("changing", "# longer"))) is not second


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("class Mine(:\n", "mine.py: cannot be imported, SyntaxError: invalid syntax (mine.py:1); fix it"),
        ("\nclass Mine(Missing): ...",
         "mine.py: cannot be imported, NameError: name 'Missing' is not defined (mine.py:2); fix it"),
        ("import nothing_of_this_name", "mine.py: cannot be imported, ModuleNotFoundError: No module named "),
        ("from . import other", "mine.py: cannot be imported, ImportError: attempted relative import"),
        ("import sys\nsys.exit(3)", "mine.py: cannot be imported, SystemExit: 3 (mine.py:2); fix it"),
        ("x = '\0'", "mine.py: cannot be imported, "),
        ("raise RuntimeError", "mine.py: cannot be imported, RuntimeError (mine.py:1); fix it"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_imported_names_the_line(text: str, sentence: str, in_tmp: Path) -> None:
    assert refused(write(text)).startswith(f"data.custom_cls.path={sentence}")


def test_a_mistake_in_a_module_beside_it_names_that_line(in_tmp: Path) -> None:
    write("\n\n1 / 0", "wrong.py")
    assert "ZeroDivisionError: division by zero (wrong.py:3)" in refused(write("import wrong"))
    assert "wrong" not in sys.modules


def test_files_that_are_not_there_and_halves_of_the_setting_are_named(in_tmp: Path) -> None:
    here = f"(working directory {in_tmp})"
    assert refused(CustomClassConfig("nope.py", "A")) == f"data.custom_cls.path=nope.py: no such file {here}"
    assert refused(CustomClassConfig(".", "A")) == (
        f"data.custom_cls.path=.: is a folder; name the Python file in it {here}"
    )
    for half in (CustomClassConfig("nope.py"), CustomClassConfig(name="A"), CustomClassConfig("", "A")):
        assert refused(half) == "data.custom_cls needs both path (a Python file) and name (the class in it)"


def test_a_class_that_is_not_there_names_those_that_are(in_tmp: Path) -> None:
    write(BASED + "class Other: ...\ndef function(): ...\n")
    where = "in mine.py (classes there: Mine, Other)."
    assert refused(CustomClassConfig("mine.py", "Mien")) == (
        f"data.custom_cls.name=Mien: no class of that name {where} Did you mean 'Mine'?"
    )
    assert refused(CustomClassConfig("mine.py", "function")) == (
        f"data.custom_cls.name=function: that is a function, not a class, {where}"
    )
    assert refused(CustomClassConfig("mine.py", "Other")) == (
        "data.custom_cls.name=Other: the class has neither _build_messages nor build_group; derive it from "
        "tutorials.cookbooks.training_reward_model.base.BaseTrainDataset"
    )


def test_the_fingerprint_tells_changes_of_the_file_and_of_what_it_imports(in_tmp: Path) -> None:
    write("VALUE = 1", "deep.py")
    write("def use():\n    from deep import VALUE\n    return VALUE\nuse()\nVALUE = 1", "used.py")
    write("VALUE = 1", "unused.py")
    config = write(with_constant("used"))
    seen = [source_fingerprint(config)]
    assert source_fingerprint(config) == seen[0]
    assert source_fingerprint(CustomClassConfig("mine.py", "Other")) != seen[0]
    write("VALUE = 2", "unused.py")
    assert source_fingerprint(config) == seen[0]
    for path, text in (("deep.py", "VALUE = 22"), ("mine.py", with_constant("used", "# changed"))):
        write(text, path)
        assert source_fingerprint(config) not in seen
        seen.append(source_fingerprint(config))


def test_the_fingerprint_depends_neither_on_the_folder_nor_on_what_is_loaded(in_tmp: Path) -> None:
    for folder in ("one", "two"):
        write("VALUE = 1", f"{folder}/shared_part.py")
        write(with_constant("shared_part", BASED.replace("Mine", "Based")), f"{folder}/mine.py")
    here = [source_fingerprint(CustomClassConfig(f"{folder}/mine.py", "Mine")) for folder in ("one", "two")]
    code = (
        "from rm_gallery.data.custom import source_fingerprint\nfrom rm_gallery.data.formats import CustomClassConfig\n"
        "print(source_fingerprint(CustomClassConfig('one/mine.py', 'Mine')))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert {*here, ran.stdout.strip()} == {here[0]}, ran.stderr


@pytest.mark.slow
def test_a_worker_process_reads_as_this_one_does(in_tmp: Path) -> None:
    write("def ask(row):\n    return row['query']", "sub/asking.py")
    write("from asking import ask\n" + BASED.replace('example["query"]', "ask(example)"), "sub/mine.py")
    config = FormatConfig(custom_cls=CustomClassConfig("sub/mine.py", "Mine"))
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        assert pool.submit(in_worker, config, make_tokenizer()).result() == in_worker(config, make_tokenizer())
