"""Chat templates that write today's date: frozen exactly, in tokens, checkpoints and scoring."""

from __future__ import annotations

import datetime
import shutil
from pathlib import Path
from typing import Any

import pytest

from rm_gallery import RewardScorer, train
from rm_gallery.data.tokenization.template_date import freeze_date
from rm_gallery.errors import UserError
from tests.small import chat_pairs, make_tokenizer

TEMPLATE = (
    "{{- '<|im_start|>system\\nToday is ' + strftime_now('%A, %-d %b %Y (100%%)') + '<|im_end|>\\n' -}}"
    "{%- for m in messages -%}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' -}}{%- endfor -%}"
)
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
SETTINGS: dict[str, Any] = {
    "data.max_length": 256, "data.train_batch_size": 8, "data.num_workers": 0, "trainer.logger": [],
    "trainer.total_training_steps": 4, "trainer.save_freq": 2, "model.fsdp_config.model_dtype": "fp32",
    "optim.lr": 1e-3, "data.chat_template": TEMPLATE,
}  # fmt: skip


def on_day(monkeypatch: pytest.MonkeyPatch, day: str) -> None:
    """Chat templates see this day."""
    import transformers.utils.chat_template_utils as library

    class Then(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime.datetime:
            return datetime.datetime.fromisoformat(day)

    monkeypatch.setattr(library, "datetime", Then)


def tokenizer_with(template: str) -> Any:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    "form", ["%d %b %Y", "%A, %-d %B %Y %H:%M", "100%% %j %%d", "%c %x %X %p %G-W%V-%u %e|%^a", "%Y-%m-%d", "no date"]
)
def test_the_frozen_date_is_that_of_strftime(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tokenizer_with(f"{{{{- strftime_now('{form}') -}}}}!")
    assert freeze_date(tokenizer, "2026-11-07", key="k") == "2026-11-07"
    on_day(monkeypatch, "2031-01-01")
    found = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert found == datetime.datetime(2026, 11, 7).strftime(form) + "!"


def test_only_a_template_that_writes_the_date_is_changed(caplog: pytest.LogCaptureFixture) -> None:
    plain = tokenizer_with("{# strftime_now #}{% set strftime_now = 1 %}{{ strftime_now }}")
    before = plain.chat_template
    assert freeze_date(plain, "2026-11-07", key="k") is None and plain.chat_template == before
    optional = tokenizer_with("{% if strftime_now is defined and tools %}{{ strftime_now('%Y') }}{% endif %}")
    assert freeze_date(optional, "2026-11-07", key="k") == "2026-11-07"
    frozen = optional.chat_template
    assert freeze_date(optional, "2030-01-01", key="k") is None and optional.chat_template == frozen, "frozen once"
    assert [record.message for record in caplog.records] == [
        "the chat template writes the current date, which is frozen at 2026-11-07; set k to change it"
    ]


@pytest.mark.parametrize("large", ["'a' * 10**10", "'a' | center(10000000000)", "['a' * 9999999999]"])
def test_no_expression_is_computed_while_the_date_is_looked_for(large: str) -> None:
    tokenizer = tokenizer_with(f"{{{{ strftime_now('%Y') }}}}{{{{ {large} }}}}")
    assert freeze_date(tokenizer, "2026-11-07", key="k") == "2026-11-07"


@pytest.mark.parametrize("text", ["tomorrow", "2026-13-01", "2026-02-30", "20261107", "2026-11-07T10:00"])
def test_a_date_of_another_form_is_an_error(text: str) -> None:
    with pytest.raises(UserError, match=f"^data.template_date={text}: must be a date as YYYY-MM-DD"):
        freeze_date(tokenizer_with(TEMPLATE), text, key="data.template_date")


@pytest.mark.slow
def test_a_checkpoint_scores_the_same_on_every_day_and_a_resumed_run_keeps_its_date(
    in_tmp: Path, qwen2_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoTokenizer

    monkeypatch.setenv("RM_GALLERY_CACHE", str(in_tmp / "cache"))
    rows = chat_pairs(24)

    def stop(step: int, folder: Path) -> None:
        raise ArithmeticError

    on_day(monkeypatch, "2026-11-27")
    whole = train(qwen2_folder, rows, **SETTINGS, **{"trainer.experiment_name": "whole"})
    with pytest.raises(ArithmeticError):
        train(qwen2_folder, rows, on_save=stop, **SETTINGS, **{"trainer.experiment_name": "resumed"})
    reward = whole.scorer.score_messages([CHAT])
    on_day(monkeypatch, "2027-03-01")
    resumed = train(qwen2_folder, rows, **SETTINGS, **{"trainer.experiment_name": "resumed"})
    weights = [result.checkpoint / "model.safetensors" for result in (whole, resumed)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert RewardScorer.from_folder(whole.checkpoint).score_messages([CHAT]) == reward
    text = AutoTokenizer.from_pretrained(whole.checkpoint).apply_chat_template(CHAT, tokenize=False)
    assert "Today is Friday, 27 Nov 2026 (100%)" in text
    later = train(qwen2_folder, rows, **SETTINGS, **{"trainer.experiment_name": "later"})
    assert weights[0].read_bytes() != (later.checkpoint / "model.safetensors").read_bytes(), "other tokens"


@pytest.mark.slow
def test_a_foreign_folder_is_scored_with_the_date_of_the_call_or_the_given_one(
    in_tmp: Path, qwen2_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_date = TEMPLATE.partition("{%- for")
    result = train(qwen2_folder, chat_pairs(24), **{**SETTINGS, "data.chat_template": "".join(no_date[1:])})
    folder = Path(shutil.copytree(result.checkpoint, in_tmp / "foreign"))
    tokenizer = tokenizer_with(TEMPLATE)
    tokenizer.save_pretrained(folder, save_jinja_files=False)
    rewards = []
    for day, date in (("2026-11-27", None), ("2027-03-01", None), ("2027-03-01", "2026-11-27")):
        on_day(monkeypatch, day)
        rewards += RewardScorer.from_folder(folder, template_date=date).score_messages([CHAT])
    assert rewards[0] == rewards[2] != rewards[1]
