"""The tokenizer of a run: what a folder must hold, and where the chat template comes from."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from rm_gallery.data.tokenization.tokenizer import load_tokenizer
from rm_gallery.errors import UserError


def test_a_model_folder_without_tokenizer_files_is_named(qwen2_folder: Path, tmp_path: Path) -> None:
    shutil.copy(qwen2_folder / "config.json", tmp_path)  # transformers makes an empty Qwen2Tokenizer of this
    with pytest.raises(UserError, match=r": there is no tokenizer; copy tokenizer\.json and tokenizer_config\.json"):
        load_tokenizer(str(tmp_path))


def test_a_broken_tokenizer_file_is_named(qwen2_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"^model\.partial_pretrain=.*: no tokenizer can be loaded from there \("):
        load_tokenizer(str(tmp_path))


def test_the_folder_of_a_run_is_answered_with_its_newest_checkpoint(tmp_path: Path) -> None:
    for name in ("global_step_9", "global_step_10", "global_step_10-merged"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"the folder of a run; name one of its checkpoints, e\.g\. .*global_step_10$"):
        load_tokenizer(str(tmp_path))


def test_a_name_that_is_neither_folder_nor_hub_model_says_so(in_tmp: Path) -> None:
    with pytest.raises(UserError, match=r"^model\.partial_pretrain=models/nope: no such folder \(working directory "):
        load_tokenizer("models/nope")


def test_a_tilde_in_the_model_path_means_the_home_folder(
    tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tokenizer_folder.parent))
    assert load_tokenizer(f"~/{tokenizer_folder.name}").is_fast


def test_a_chat_template_comes_as_text_or_from_a_file(tokenizer_folder: Path, in_tmp: Path) -> None:
    Path("own.jinja").write_text("{{ 1 }}")
    assert load_tokenizer(str(tokenizer_folder), chat_template="{{ 2 }}").chat_template == "{{ 2 }}"
    assert load_tokenizer(str(tokenizer_folder), chat_template="own.jinja").chat_template == "{{ 1 }}"
    with pytest.raises(UserError, match=r"^data\.chat_template=nope: neither a Jinja template nor a file"):
        load_tokenizer(str(tokenizer_folder), chat_template="nope")
