"""Heads that are read at EOS (BART, T5) or in a summary (XLM): trained, exported and scored; each text has one EOS."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.small_models import config_of
from rm_gallery.data.tokenization.encoder import Encoder
from rm_gallery.data.tokenization.tokenizer import TokenizeConfig, fit_length, read_at
from rm_gallery.errors import BadRow, UserError
from rm_gallery.modeling.export import rescore, set_pad_token
from rm_gallery.modeling.model_folder import quiet_transformers
from rm_gallery.modeling.reward_model import load_reward_model
from rm_gallery.modeling.twin import draw_weights, shrink
from rm_gallery.schema import PreferenceGroup
from rm_gallery.scoring.scorer import RewardScorer
from rm_gallery.training.config import load_config
from rm_gallery.training.data_setup import load_sides
from tests.small import make_tokenizer, text_pairs, write_pairs

EOS = 5  # [SEP] of the tokenizer of encoders


def closing_tokenizer() -> Any:
    """A byte tokenizer that writes EOS at the end of each text."""
    tokenizer = make_tokenizer(encoder=True)
    tokenizer.eos_token = "[SEP]"
    return tokenizer


def save_backbone(kind: str, folder: Path) -> Path:
    """A small model of this type without a head, with a tokenizer that writes EOS."""
    from transformers import AutoModel

    config = shrink(config_of(kind))
    config.vocab_size, config.eos_token_id, config.pad_token_id = 264, EOS, 0
    torch.manual_seed(0)
    with quiet_transformers():
        network = AutoModel.from_config(config, dtype=torch.float32)
        draw_weights(network)
        network.save_pretrained(folder)
    closing_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bart", "t5", "mbart", "xlm"])
def test_other_heads_train_and_score(kind: str, in_tmp: Path) -> None:
    from rm_gallery import train

    folder = save_backbone(kind, in_tmp / "model")
    result = train(folder, text_pairs(24), **{
        "data.max_length": 128, "data.num_workers": 0, "trainer.total_training_steps": 2, "trainer.logger": [],
        "data.train_batch_size": 8, "model.fsdp_config.model_dtype": "fp32", "optim.lr": 1e-3,
    })  # fmt: skip
    pairs = [(row["chosen"], row["rejected"]) for row in text_pairs(5, seed=1)]
    found = RewardScorer.from_folder(result.checkpoint, device="cpu").score_pairs(pairs)
    ids = [closing_tokenizer()(text)["input_ids"] for pair in pairs for text in pair]
    wanted = [rescore(result.checkpoint, [each])[0] for each in ids]
    assert [each for pair in found for each in pair] == pytest.approx(wanted, abs=1e-4)
    assert len({round(each, 3) for each in wanted}) > 5


def test_a_text_with_two_eos_tokens_is_dropped_and_one_without_is_an_error(tmp_path: Path) -> None:
    model, tokenizer = load_reward_model(str(save_backbone("bart", tmp_path))).model, closing_tokenizer()
    set_pad_token(model, tokenizer)
    encoder = Encoder(tokenizer, TokenizeConfig())
    good, bad = encoder.encode_many([PreferenceGroup("", ["a", "b"]), PreferenceGroup("", ["a", "b[SEP]"])])
    assert not isinstance(good, BadRow) and [ids[-1] for ids in good] == [EOS, EOS]
    assert isinstance(bad, BadRow) and "not exactly one EOS token" in str(bad)
    tokenizer.eos_token = None  # truncation then does not keep it
    tokenizer.sep_token = None
    short = TokenizeConfig(max_length=8, filter_overlong_prompts=False, truncation="right")
    with pytest.raises(BadRow, match="not exactly one EOS token"):
        fit_length([[*range(10, 30), EOS]], PreferenceGroup("", ["a"]), tokenizer, short)
    with pytest.raises(UserError, match=r"reads the reward at its EOS token .id 5., and the tokenizer writes none"):
        read_at(make_tokenizer(), EOS, what="model")


def test_such_rows_are_dropped_and_counted(in_tmp: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, tokenizer = load_reward_model(str(save_backbone("bart", in_tmp / "model"))).model, closing_tokenizer()
    set_pad_token(model, tokenizer)
    write_pairs(in_tmp / "train.parquet", [{"chosen": "a[SEP]", "rejected": "b"}, {"chosen": "a", "rejected": "b"}])
    config = load_config(None, ["data.train_files=train.parquet", "model.partial_pretrain=model", "data.num_workers=0"])
    train, _ = load_sides(config.data, tokenizer)
    assert len(train.data) == 1
    assert train.store.dropped.counts == {"not exactly one EOS token, at which the model reads the reward": 1}
