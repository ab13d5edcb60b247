"""What a run reads: tokenizer, model and data, each checked against the others."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from rm_gallery.data.custom import CustomReader
from rm_gallery.data.dropped import BadRow, Dropped
from rm_gallery.data.formats import read_groups
from rm_gallery.data.packing import check_budget
from rm_gallery.data.source import Row, find_files, read_rows
from rm_gallery.data.token_data import TokenData
from rm_gallery.data.tokenize import load_tokenizer, tokenize_groups
from rm_gallery.errors import UserError
from rm_gallery.modeling.export import InputRecord, settle_pad_token
from rm_gallery.modeling.reward_model import ENCODERS, RewardModel, load_model_config, load_reward_model, max_positions
from rm_gallery.schema import PreferenceGroup
from rm_gallery.training.checkpoint import refuse_earlier_run
from rm_gallery.training.config import DataConfig, TrainConfig

log = logging.getLogger(__name__)

_PEEK_ROWS = 8


@dataclass(frozen=True)
class Loaded:
    """One side of the data as tokens, and what was left out."""

    data: TokenData
    dropped: Dropped
    files: list[Path]
    custom: CustomReader | None = None
    """What read the rows under `data.custom_cls`."""

    def input_record(self, config: DataConfig) -> InputRecord:
        """How the model is given these texts, for the checkpoint."""
        if self.custom is not None and self.data.style == "chat":
            return InputRecord(
                self.custom.style,
                self.custom.append_eos,
                config.max_length,
                separator=self.custom.separator,
                own_rendering=not self.custom.matches_template,
            )
        separator = "" if self.data.has_text_prompts else "\n\n"
        return InputRecord(self.data.style, config.append_eos, config.max_length, separator=separator)

    def facts(self) -> dict[str, Any]:
        """For run.json."""
        return {
            "files": [str(file) for file in self.files],
            "groups": len(self.data),
            "comparisons": int(self.data.sizes.num_comparisons.sum()),
            "tokens": len(self.data.tokens),
            "style": self.data.style,
            "fingerprint": self.data.fingerprint(),
            "dropped": {
                reason: {"rows": count, "first": self.dropped.examples[reason]}
                for reason, count in self.dropped.counts.items()
            },
        }


def check_inputs(config: TrainConfig) -> None:
    """Look at what a run would read, without reading all of it: run folder, tokenizer, model folder, first rows.

    Raises UserError as `run_training` would.
    """
    model = config.model
    refuse_earlier_run(config.trainer.run_dir)
    tokenizer = load_tokenizer(
        model.partial_pretrain, trust_remote_code=model.trust_remote_code, chat_template=config.data.chat_template
    )
    custom = CustomReader.from_config(config.data, tokenizer) if config.data.custom_cls.name else None
    load_model_config(model.partial_pretrain, trust_remote_code=model.trust_remote_code)
    for key, paths in (("data.train_files", config.data.train_files), ("data.val_files", config.data.val_files)):
        for file in find_files(paths, key=key) if paths else []:
            rows = islice(read_rows([file], key=key), _PEEK_ROWS)
            if custom is None:
                list(read_groups(rows, config.data, has_chat_template=True, dropped=Dropped()))
            else:
                groups = _read_custom(rows, custom, Dropped(), config.data.bad_rows)
                tokenize_groups(groups, tokenizer, config.data, dropped=Dropped(), render_chat=custom.render)
    for warning in custom.facts.warnings() if custom is not None else ():
        log.warning(warning)


def load_data(config: DataConfig, paths: str | Sequence[str], key: str, tokenizer: Any) -> Loaded:
    """Rows of the files that `key` names as tokens; says what was dropped and why.

    Raises UserError when no usable row is left.
    """
    files = find_files(paths, key=key)
    dropped = Dropped()
    rows = read_rows(files, key=key)
    custom, render_chat = None, None
    if config.custom_cls.name:
        custom = CustomReader.from_config(config, tokenizer)
        render_chat = custom.render
        groups = _read_custom(rows, custom, dropped, config.bad_rows)
    else:
        has_template = tokenizer.chat_template is not None
        groups = read_groups(rows, config, has_chat_template=has_template, dropped=dropped)
    data = tokenize_groups(
        groups, tokenizer, config, dropped=dropped, bad_rows=config.bad_rows, render_chat=render_chat
    )
    total = len(data) + dropped.total
    if dropped.total:
        log.warning("%s: left out %d of %d rows: %s", key, dropped.total, total, dropped.describe())
    if not len(data):
        raise UserError(
            f"{key}: none of {total} rows can be used: {dropped.describe()}; mend the data, or raise "
            "data.max_length where texts are too long"
        )
    log.info("%s: %d pairs as %s, %d tokens with shared prompts once", key, len(data), data.style, len(data.tokens))
    for warning in custom.facts.warnings() if custom is not None else ():
        log.warning("%s: %s", key, warning)
    return Loaded(data, dropped, files, custom)


def _read_custom(
    rows: Iterable[Row], custom: CustomReader, dropped: Dropped, bad_rows: str
) -> Iterator[PreferenceGroup]:
    for row in rows:
        try:
            yield custom.read(row)
        except BadRow as error:
            if bad_rows == "error":
                raise UserError(
                    f"{row.where}: {error}; mend the row, or set data.bad_rows=drop to leave it out"
                ) from None
            dropped.add(str(error), row.where)


def build_model(config: TrainConfig, tokenizer: Any) -> RewardModel:
    """The model in float32 on the CPU, with a pad token that is not EOS; says where its head comes from."""
    loaded = load_reward_model(
        config.model.partial_pretrain,
        trust_remote_code=config.model.trust_remote_code,
        dropout=config.model.dropout,
    )
    if config.model.trust_remote_code:
        log.warning("model.trust_remote_code=true: Python code of the model folder may run")
    if loaded.has_own_head:
        log.info("reward head: kept from %s", config.model.partial_pretrain)
    else:
        log.info("reward head: new, initialised with trainer.seed=%d", config.trainer.seed)
    settle_pad_token(loaded.model, tokenizer)
    return loaded.model


def check_data(config: TrainConfig, model: RewardModel, train: Loaded, val: Loaded | None) -> None:
    """Raise UserError for data that do not fit the model, the budget or each other."""
    if val is not None and val.data.style != train.data.style:
        raise UserError(
            f"data.val_files hold {val.data.style} but data.train_files hold {train.data.style}; "
            "set data.input_style to read both the same way"
        )
    limit = max_positions(model)
    for key, side in (("data.train_files", train), ("data.val_files", val)):
        if side is None:
            continue
        longest = int(side.data.sizes.longest_text.max())
        if limit is not None and longest > limit:
            what = f"{key}: the longest text has {longest} tokens, but the model has positions for {limit}"
            if model.network.config.model_type in ENCODERS:
                raise UserError(f"{what}; set data.max_length={limit}")
            log.warning("%s; set data.max_length=%d unless that is meant", what, limit)
        problem = check_budget(
            side.data.sizes,
            side.data.where,
            token_budget=config.data.budget,
            key="data.max_tokens_per_micro_batch",
            padded=model.padded,
        )
        if problem:
            raise UserError(f"{key}: {problem}")
