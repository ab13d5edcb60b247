"""Loading: from a configuration to the sides, the encoder and the options of a report.

The only file here that knows how training reads its data.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from rm_gallery.data.custom import CustomReader
from rm_gallery.data.formats import RowReader, prompt_key
from rm_gallery.data.sources import entries_of, resolve_files
from rm_gallery.data.token_cache.prepare import tasks_of
from rm_gallery.data.token_cache.row_processor import Reader, Task, is_wanted
from rm_gallery.data.tokenization.token_group import hash_prompt
from rm_gallery.data.tokenization.tokenizer import load_tokenizer
from rm_gallery.errors import BadRow, Dropped, UserError
from rm_gallery.inspection.encoders import Encoder, TokenEncoder, WordEncoder
from rm_gallery.inspection.lengths import LongTexts
from rm_gallery.inspection.report import Report, ReportOptions, build_report
from rm_gallery.inspection.survey import Side, Survey, survey
from rm_gallery.schema import PreferenceGroup
from rm_gallery.training.config import DataConfig, TrainConfig
from rm_gallery.training.data_setup import Side as DataSide
from rm_gallery.training.data_setup import sides_of

log = logging.getLogger(__name__)


def inspect_data(config: TrainConfig, *, num_samples: int) -> Report:
    """Read the data that a run would read and work the report out.

    Without `model.partial_pretrain`, words stand in for tokens and nothing is rendered by a chat template.
    Raises UserError when a side holds no usable row.
    """
    data, path = config.data, config.model.partial_pretrain
    tokenizer: Any = None
    if path:
        if config.model.trust_remote_code:
            log.warning("model.trust_remote_code=true: Python code of the model folder may run")
        tokenizer = load_tokenizer(
            path, trust_remote_code=config.model.trust_remote_code, chat_template=data.chat_template
        )
    custom = None
    if data.custom_cls.path is not None:
        if tokenizer is None:
            raise UserError("data.custom_cls renders with a tokenizer: set model.partial_pretrain as well")
        custom = CustomReader.from_config(data, tokenizer)
    encoder: Encoder = WordEncoder()
    if tokenizer is not None:
        encoder = TokenEncoder(tokenizer, data, render=None if custom is None else custom.render)
    options = ReportOptions(
        packing=data,
        token_budget=data.budget if path else None,
        seed=config.trainer.seed,
        pads=bool(path) and _pads(path, config.model.trust_remote_code),
        tokenizer=path,
        long_texts=_long_texts(data),
    )
    surveys = []
    for name, wanted in zip(("training", "validation"), sides_of(data), strict=False):
        has_template = tokenizer is None or tokenizer.chat_template is not None
        side = _side(name, wanted, data, custom, has_template)
        surveys.append(survey(side, encoder, prompt_key=prompt_key, num_samples=num_samples, seed=config.trainer.seed))
        _check(surveys[-1], wanted.key)
    return build_report(surveys, encoder, options)


def _side(name: str, wanted: DataSide, config: DataConfig, custom: CustomReader | None, has_template: bool) -> Side:
    files, entries = resolve_files(config, key=wanted.key), entries_of(config, wanted.key)
    dropped = Dropped()
    groups = _read(tasks_of(files, entries, config, wanted.key, set()), wanted, config, custom, has_template, dropped)
    return Side(name, tuple(file.name for file in files), groups, dropped)


def _read(
    tasks: Iterable[Task],
    wanted: DataSide,
    config: DataConfig,
    custom: CustomReader | None,
    has_template: bool,
    dropped: Dropped,
) -> Iterator[PreferenceGroup]:
    """Bad rows are counted whatever `data.bad_rows` says: this is how people find them."""
    readers: dict[str, Reader] = {}
    for task in tasks:
        reader = custom or readers.setdefault(
            task.format_name, RowReader(config, task.format_name, has_chat_template=has_template)
        )
        for row in task.chunk.rows():
            try:
                group = reader.read(row)
            except BadRow as error:
                dropped.add(str(error), row.where)
                continue
            if wanted.share is None or is_wanted(hash_prompt(prompt_key(group)), wanted.share):
                yield group if group.source else replace(group, source=task.source)


def _check(found: Survey, key: str) -> None:
    if found.table.num_groups:
        return
    dropped = found.side.dropped
    raise UserError(
        f"{key}: none of {dropped.total} rows can be used: {dropped.describe()}; mend the data, or raise "
        "data.max_length where texts are too long"
    )


def _long_texts(config: DataConfig) -> LongTexts:
    if config.filter_overlong_prompts:
        return "left out"
    return "refused" if config.truncation == "error" else "cut"


def _pads(path: str, trust_remote_code: bool) -> bool:
    """Whether the model is an encoder, whose texts are padded. A folder with a tokenizer alone is none."""
    from transformers import AutoConfig

    from rm_gallery.modeling.reward_model import ENCODERS

    try:
        model = AutoConfig.from_pretrained(os.path.expanduser(path), trust_remote_code=trust_remote_code)
    except (OSError, ValueError):
        return False
    return model.model_type in ENCODERS
