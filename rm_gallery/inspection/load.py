"""Loading: from a configuration to the sides, the encoder and the options of a report.

The only file here that knows how training reads its data.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rm_gallery.data.dropped import Dropped
from rm_gallery.data.formats import read_groups
from rm_gallery.data.source import find_files, read_rows
from rm_gallery.data.tokenize import load_tokenizer
from rm_gallery.errors import UserError
from rm_gallery.inspection.encoders import Encoder, TokenEncoder, WordEncoder
from rm_gallery.inspection.lengths import LongTexts
from rm_gallery.inspection.report import Report, ReportOptions, build_report
from rm_gallery.inspection.survey import Side, Survey, survey
from rm_gallery.schema import PreferenceGroup
from rm_gallery.training.config import DataConfig, TrainConfig

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
    encoder: Encoder = TokenEncoder(tokenizer, data) if path else WordEncoder()
    has_template = tokenizer is None or tokenizer.chat_template is not None
    options = ReportOptions(
        packing=data,
        token_budget=data.budget if path else None,
        seed=config.trainer.seed,
        pads=bool(path) and _pads(path, config.model.trust_remote_code),
        tokenizer=path,
        long_texts=_long_texts(data),
    )
    surveys = []
    for name, key, paths in (
        ("training", "data.train_files", data.train_files),
        ("validation", "data.val_files", data.val_files),
    ):
        if paths:
            side = _side(name, key, paths, data, has_template)
            surveys.append(
                survey(side, encoder, prompt_key=prompt_key, num_samples=num_samples, seed=config.trainer.seed)
            )
            _check(surveys[-1], key)
    return build_report(surveys, encoder, options)


def _side(name: str, key: str, paths: str | Sequence[str], config: DataConfig, has_template: bool) -> Side:
    files = find_files(paths, key=key)
    dropped = Dropped()
    # Bad rows are counted whatever the configuration says: this is how people find them.
    counting = replace(config, bad_rows="drop")
    groups = read_groups(read_rows(files, key=key), counting, has_chat_template=has_template, dropped=dropped)
    return Side(name, tuple(str(file) for file in files), groups, dropped)


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


def prompt_key(group: PreferenceGroup) -> str:
    """What makes two groups the same prompt: the text, or the messages, that stand before every response."""
    if isinstance(group.prompt, str):
        return group.prompt
    turns = list(group.prompt)
    answers = [list(response) for response in group.responses if not isinstance(response, str)]
    while answers and all(len(answer) > 1 and answer[0] == answers[0][0] for answer in answers):
        turns.append(answers[0][0])
        answers = [answer[1:] for answer in answers]
    return json.dumps(turns, sort_keys=True, default=str)
