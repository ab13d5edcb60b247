"""The command `rm-gallery show-data`: the report on a terminal, as HTML, as JSON.

The only file here that knows how training reads its data: from a configuration to sides, encoder and report.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rm_gallery.data.config import DataConfig, sides_of
from rm_gallery.data.config import Side as DataSide
from rm_gallery.data.custom import CustomReader
from rm_gallery.data.formats import Readers, RowCounts, Task, iter_tasks, prompt_key, read_groups
from rm_gallery.data.sources import entries_of, resolve_files
from rm_gallery.data.tokenization.tokenizer import load_tokenizer
from rm_gallery.errors import UserError
from rm_gallery.files import write_text
from rm_gallery.inspection.collect import Side, Survey, survey
from rm_gallery.inspection.html import MARKER, html_of
from rm_gallery.inspection.lengths import LongTexts
from rm_gallery.inspection.page import page_of
from rm_gallery.inspection.report import Report, ReportOptions, build_report
from rm_gallery.inspection.terminal import print_page
from rm_gallery.inspection.views import Encoder, TokenEncoder, WordEncoder
from rm_gallery.schema import PreferenceGroup
from rm_gallery.training.config import TrainConfig, load_config

log = logging.getLogger(__name__)


def show_data(
    config_file: str | None, overrides: Sequence[str], *, html: str | None, as_json: bool, samples: int
) -> None:
    """Print what the model will see, as text or as JSON, and write the same as an HTML file if one is named."""
    if samples < 0:
        raise UserError(f"--samples={samples}: must be at least 0")
    target = _check_target(html) if html is not None else None
    config = load_config(config_file, overrides, only_data=True)
    report = inspect_data(config, num_samples=samples)
    page = page_of(report)
    if target is not None:
        _write(target, html_of(page))
    if as_json:
        facts = {**report.as_dict(), "verdicts": [{"level": v.level, "text": v.text} for v in page.verdicts]}
        print(json.dumps(_finite(facts), indent=2))
        return
    print_page(page)
    if target is not None:
        print(f"\nreport: {html}")


def _check_target(html: str) -> Path:
    """The file to write; refused before the data are read, when it cannot be written or is something else."""
    path = Path(html).expanduser()
    if path.is_dir() or not path.parent.is_dir():
        what = "is a folder" if path.is_dir() else "lies in a folder that does not exist"
        raise UserError(f"--html={html}: {what}; name a file, as report.html")
    if path.exists() and not _is_ours(path):
        raise UserError(f"--html={html}: the file is there and is no report of this command; name another one")
    return path


def _is_ours(path: Path) -> bool:
    with path.open("rb") as file:
        return MARKER.encode() in file.read(1000)


def _write(path: Path, text: str) -> None:
    try:
        write_text(path, text)
    except OSError as error:
        raise UserError(f"--html={path}: cannot be written ({error.strerror}); name another file") from error


def _finite(value: Any) -> Any:
    """The same with null for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


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
        side = _side(name, wanted, data, Readers(data, has_chat_template=has_template, custom=custom))
        surveys.append(survey(side, encoder, prompt_key=prompt_key, num_samples=num_samples, seed=config.trainer.seed))
        _check(surveys[-1], wanted.key)
    return build_report(surveys, encoder, options)


def _side(name: str, wanted: DataSide, config: DataConfig, readers: Readers) -> Side:
    files, entries = resolve_files(config, key=wanted.key), entries_of(config, wanted.key)
    counts = RowCounts()
    tasks = iter_tasks(files, entries, config, wanted.key, set())
    return Side(name, tuple(file.name for file in files), _read(tasks, wanted, readers, counts), counts.dropped)


def _read(tasks: Iterable[Task], wanted: DataSide, readers: Readers, counts: RowCounts) -> Iterator[PreferenceGroup]:
    """Bad rows are counted whatever `data.bad_rows` says: the report lists them."""
    for task in tasks:
        reader = readers.get(task.format_name)
        for _, group, _ in read_groups(task.chunk.rows(), reader, counts, hold_out=wanted.share):
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
