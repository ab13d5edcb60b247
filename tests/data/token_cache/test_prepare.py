"""Preparing: built once, used again only for the same data and settings, by one process or several."""

from __future__ import annotations

import logging
import multiprocessing
import os
import resource
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rm_gallery.data.formats import CustomClassConfig, hash_prompt, is_wanted
from rm_gallery.data.sources import SourceConfig, entries_of, resolve_files
from rm_gallery.data.token_cache import prepare as module
from rm_gallery.data.token_cache import row_processor, store
from rm_gallery.data.token_cache.prepare import PrepareConfig, prepare
from rm_gallery.data.token_cache.store import Store
from rm_gallery.errors import UserError
from tests import forks
from tests.data.groups import texts_of
from tests.small import CHATML, chat_pairs, make_tokenizer, text_pairs, write_pairs

pytestmark = pytest.mark.slow

KEY = "data.train_files"


@pytest.fixture
def files(in_tmp: Path) -> Path:
    write_pairs(in_tmp / "a.parquet", chat_pairs(40))
    return in_tmp


def run(tokenizer: Any, files: Any = "a.parquet", *, share: Any = None, **options: Any) -> Store:
    config = PrepareConfig(cache_dir="cache", **options)
    source = SourceConfig(train_files=files)
    return prepare(resolve_files(source, key=KEY), entries_of(source, KEY), config, tokenizer, key=KEY, share=share)


def stores() -> list[str]:
    return sorted(path.name for path in Path("cache").iterdir() if path.is_dir())


def test_the_second_time_nothing_is_read_again(files: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(tokenizer)
    assert len(first.data) == 40
    monkeypatch.setattr(module, "_build", lambda *_: pytest.fail("built again"))
    second = run(tokenizer)
    assert second.data.fingerprint() == first.data.fingerprint()
    assert second.facts == first.facts and second.dropped == first.dropped
    assert second.data.where(39) == "a.parquet:39"


def test_where_the_cache_lies_and_who_tokenizes_decide_nothing(files: Path, tokenizer: Any) -> None:
    run(tokenizer)
    run(tokenizer, num_workers=0)
    assert len(stores()) == 1


@pytest.mark.parametrize(
    "change",
    [{"max_length": 100}, {"filter_overlong_prompts": False, "truncation": "left"}, {"append_eos": True},
     {"text_special_tokens": "plain"}, {"input_style": "chat"}, {"bad_rows": "error"}, {"share": ("train", 0.5)}],
)  # fmt: skip
def test_another_setting_is_another_store(files: Path, tokenizer: Any, change: dict[str, Any]) -> None:
    run(tokenizer)
    run(tokenizer, **change)
    assert len(stores()) == 2


def test_another_tokenizer_or_template_is_another_store(files: Path, tokenizer: Any) -> None:
    run(tokenizer)
    other = make_tokenizer()
    other.chat_template = CHATML.replace("\n", " ")
    run(other)
    other.chat_template = CHATML
    other.add_tokens(["good"])
    run(other)
    assert len(stores()) == 3


def test_changed_data_are_read_again(files: Path, tokenizer: Any) -> None:
    first = run(tokenizer)
    write_pairs(files / "a.parquet", chat_pairs(40, seed=1))
    assert run(tokenizer).data.fingerprint() != first.data.fingerprint()


@pytest.mark.parametrize("name", ["tokens.bin", "weight.bin", "store.json"])
@pytest.mark.parametrize("damage", ["flipped", "missing"])
def test_a_damaged_store_is_built_again_with_a_warning(
    files: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture, name: str, damage: str
) -> None:
    tokens = run(tokenizer).data.tokens.tolist()
    [folder] = stores()
    file = Path("cache") / folder / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.unlink()  # not changed in place, where a running process may have it mapped
    if damage == "flipped":
        file.write_bytes(content)
    missing = "is missing" if name == "store.json" else "No such file or directory"
    reason = "is not what was written" if damage == "flipped" else missing
    assert run(tokenizer).data.tokens.tolist() == tokens
    [warning] = [each.getMessage() for each in caplog.records if each.levelno == logging.WARNING]
    assert warning.startswith(f"data.train_files: the token cache cache/{folder} is damaged ({name}")
    assert reason in warning and warning.endswith("; tokenizing the data again")
    caplog.clear()
    assert run(tokenizer).data.tokens.tolist() == tokens
    assert "damaged" not in caplog.text


def test_workers_give_the_same_store_as_one_process(
    files: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [*text_pairs(3000), {"chosen": None, "rejected": "b"}, *text_pairs(200, seed=1)]
    for name in ("b.parquet", "c.parquet"):
        write_pairs(files / name, rows)
    alone = run(tokenizer, ("b.parquet", "c.parquet"), num_workers=0)
    monkeypatch.setattr(row_processor, "_SINGLE_PROCESS_S", 0.0)
    monkeypatch.setattr(module, "_STORE_VERSION", -1)
    several = run(tokenizer, ("b.parquet", "c.parquet"), num_workers=2)
    assert len(stores()) == 2
    assert several.data.fingerprint() == alone.data.fingerprint()
    assert [several.data.where(index) for index in (0, 3000, 6399)] == [
        "b.parquet:0",
        "b.parquet:3001",
        "c.parquet:3200",
    ]
    assert several.dropped == alone.dropped and several.facts == alone.facts


def test_an_error_in_a_worker_arrives_as_its_sentence(
    files: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pairs(files / "b.parquet", [*text_pairs(2500), {"chosen": None, "rejected": "b"}])
    monkeypatch.setattr(row_processor, "_SINGLE_PROCESS_S", 0.0)
    with pytest.raises(UserError, match=r"^b\.parquet:2500: null chosen; fix the row, or set data\.bad_rows=drop"):
        run(tokenizer, "b.parquet", num_workers=1, bad_rows="error")
    assert stores() == []


DYING = """
import os
class Dying:
    def __init__(self, *arguments): pass
    def _build_messages(self, row): os._exit(3)
"""


def test_a_worker_that_dies_is_said(files: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("dying.py").write_text(DYING)
    monkeypatch.setattr(row_processor, "_SINGLE_PROCESS_S", 0.0)
    with pytest.raises(UserError, match=r"^a process that tokenizes died .* set data\.num_workers=0"):
        run(tokenizer, num_workers=1, custom_cls=CustomClassConfig("dying.py", "Dying"))


def test_processes_that_start_together_build_once(
    files: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    build, built, waiting = module._build, [], threading.Event()

    class Watch(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "which tokenizes the same data" in record.getMessage():
                waiting.set()

    def slow_build(*arguments: Any) -> Store:
        built.append(1)
        assert waiting.wait(20), "the other one waits meanwhile"
        return build(*arguments)

    monkeypatch.setattr(module, "_build", slow_build)
    watch = Watch()
    module.log.addHandler(watch)
    try:
        with caplog.at_level(logging.INFO):
            found: list[Store] = []
            threads = [threading.Thread(target=lambda: found.append(run(make_tokenizer()))) for _ in range(2)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    finally:
        module.log.removeHandler(watch)
    assert len(built) == 1
    assert found[0].data.fingerprint() == found[1].data.fingerprint()


def test_a_script_that_its_own_workers_start_again_is_told(
    files: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would wait for ever for the process that waits for them."""
    build = module._build

    def start_again(*arguments: Any) -> Store:
        monkeypatch.setattr(multiprocessing.current_process(), "_inheriting", True, raising=False)
        with pytest.raises(UserError, match=r"without `if __name__ == '__main__':`"):
            run(tokenizer)
        return build(*arguments)

    monkeypatch.setattr(module, "_build", start_again)
    assert len(run(tokenizer).data) == 40


def die_before_the_end() -> None:
    store.StoreWriter.finish = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]
    run(make_tokenizer())


@pytest.mark.slow
def test_a_killed_build_leaves_nothing_that_is_used(files: Path, tokenizer: Any) -> None:
    log = files / "log"
    assert forks.start(die_before_the_end, log=log).wait(120) == -signal.SIGKILL, log.read_text()
    assert len(stores()) == 1 and ".tmp-" in stores()[0]
    assert len(run(tokenizer).data) == 40
    assert len(stores()) == 1 and ".tmp-" not in stores()[0]


def build_on_a_full_disk() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    with pytest.raises(UserError, match=r"^cache: the cache of tokenized data cannot be used \(File too large\)"):
        run(make_tokenizer())


@pytest.mark.slow
def test_a_full_disk_is_one_sentence_and_leaves_nothing(files: Path) -> None:
    log = files / "log"
    assert forks.start(build_on_a_full_disk, log=log).wait(120) == 0, log.read_text()
    assert stores() == []


def test_a_cache_folder_that_cannot_be_made_is_named(files: Path, tokenizer: Any) -> None:
    Path("cache").write_text("a file")
    with pytest.raises(UserError, match=r"^cache: the cache of tokenized data cannot be used \(.*set data\.cache_dir"):
        run(tokenizer)


def test_chats_mixed_with_bare_texts_stop_the_run_with_both_places(files: Path, tokenizer: Any) -> None:
    write_pairs(files / "b.parquet", text_pairs(3))
    with pytest.raises(UserError, match=r"mix chat messages \(a\.parquet:0\) with raw texts \(b\.parquet:0\)"):
        run(tokenizer, ("a.parquet", "b.parquet"))


def test_the_hold_out_takes_whole_prompts_whatever_their_order(files: Path, tokenizer: Any) -> None:
    rows = [{**row, "prompt": [{"role": "user", "content": f"question {number % 60}"}]}
            for number, row in enumerate(chat_pairs(300))]  # fmt: skip
    write_pairs(files / "b.parquet", rows)
    write_pairs(files / "c.parquet", rows[::-1])

    def prompts(name: str, side: str) -> list[str]:
        store = run(tokenizer, name, share=(side, 0.3))
        return sorted(
            text.partition("<|im_end|>")[0] for texts in texts_of(tokenizer, store.data) for text in texts[:1]
        )

    train, val = prompts("b.parquet", "train"), prompts("b.parquet", "val")
    assert len(train) + len(val) == 300
    assert not set(train) & set(val)
    assert 0.15 < len(val) / 300 < 0.45
    assert (train, val) == (prompts("c.parquet", "train"), prompts("c.parquet", "val"))
    assert run(tokenizer, "b.parquet", share=("train", 0.3)).facts.held_out == len(val)


def test_a_larger_fraction_holds_out_more_and_keeps_what_was_held_out() -> None:
    hashes = [hash_prompt(f"prompt {number}") for number in range(4000)]
    small = {each for each in hashes if is_wanted(each, ("val", 0.1))}
    large = {each for each in hashes if is_wanted(each, ("val", 0.2))}
    assert small < large
    assert np.isclose(len(small) / 4000, 0.1, atol=0.02) and np.isclose(len(large) / 4000, 0.2, atol=0.02)
