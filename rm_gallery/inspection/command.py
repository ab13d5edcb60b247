"""`rm-gallery show-data`: reads the data of a training configuration and reports on it."""

from __future__ import annotations

import json
import logging
import os
import shlex
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rm_gallery import __version__
from rm_gallery.data.batching.bin_packing import Packer, attention_length
from rm_gallery.data.config import sides_of
from rm_gallery.data.sources import resolve_files
from rm_gallery.data.tokenization.template_date import freeze_date
from rm_gallery.data.tokenization.tokenizer import load_tokenizer, read_at
from rm_gallery.errors import UserError
from rm_gallery.files import write_text
from rm_gallery.html_page import is_foreign, render
from rm_gallery.inspection.collect import collect
from rm_gallery.inspection.conversations import ConversationReport, inspect_conversations, page_of_conversations
from rm_gallery.inspection.page import page_of
from rm_gallery.inspection.report import Report, build_report
from rm_gallery.inspection.terminal import print_page
from rm_gallery.modeling.config import ModelConfig
from rm_gallery.modeling.weight_files import backbone_folder, tokenizer_folder
from rm_gallery.safe_text import redact
from rm_gallery.training.config import TrainConfig, load_config

log = logging.getLogger(__name__)

MARKER = "rm-gallery show-data"
"""In the first lines of every report, so that no other file is overwritten."""


def show_data(
    config_file: str | None, overrides: Sequence[str], *, html: str | None, as_json: bool, samples: int
) -> None:
    """Print the report as text or JSON. If a file is named, write it there as HTML and print the summary only."""
    if samples < 0:
        raise UserError(f"--samples={samples}: must be at least 0")
    target = _check_target(html) if html is not None else None
    config = load_config(config_file, overrides, only_data=True)
    if config.data.attributes:
        key = "model.attributes" if config.model.attributes else f"objective.name={config.objective.name}"
        raise UserError(
            f"{key}: show-data reports on preferences, and here the data are rated responses; without {key} it reports "
            "on the comparisons that the ratings imply, in rows of one response those of the column helpfulness "
            "(data.columns.helpfulness=NAME names another)"
        )
    is_sft = config.objective.name == "sft"
    if is_sft and not config.model.partial_pretrain:
        raise UserError(
            "objective.name=sft: which tokens are predicted depends on the chat template; set model.partial_pretrain"
        )
    options = ["--config", config_file] if config_file else []
    options += ["--html", html] if html is not None else []
    command = shlex.join(["rm-gallery", "show-data", *options, "--samples", str(samples), *overrides])
    made = time.strftime("%Y-%m-%d %H:%M %Z")
    about = (("made", f"{made}, by rm-gallery {__version__}"), ("command", redact(command)))
    if config.data.ties:
        log.warning(
            "this report is on chosen and rejected responses: ties, which training keeps, count as dropped here"
        )
        config = replace(config, data=replace(config.data, ties=False))
    if is_sft:
        page = page_of_conversations(_inspect_conversations(config, num_samples=samples), about)
    else:
        page = page_of(inspect_data(config, num_samples=samples), about)
    if target is not None:
        try:
            write_text(target, render("inspection/report.html.jinja", MARKER, page=page))
        except OSError as error:
            raise UserError(f"--html={html}: cannot be written ({error.strerror}); choose another file") from error
    if as_json:
        print(json.dumps(page.as_dict(), indent=2))
        return
    print_page(page, summary_only=target is not None)
    if target is not None:
        print(f"\nreport: {html}")


def _check_target(html: str) -> Path:
    """The file to write. Checked before the data are read, so that a typo wastes no time and
    overwrites no other file."""
    path = Path(html).expanduser()
    if path.is_dir() or not path.parent.is_dir():
        what = "is a folder" if path.is_dir() else "is in a folder that does not exist"
        raise UserError(f"--html={html}: {what}; use a file name such as report.html")
    if is_foreign(path, MARKER):
        raise UserError(f"--html={html}: the file exists and is not a report of this command; choose another one")
    return path


def inspect_data(config: TrainConfig, *, num_samples: int) -> Report:
    """Read the data that a run would read and compute the report.

    Without `model.partial_pretrain`, lengths are in words and nothing is rendered by a chat template.
    Raises UserError if no row of a split is usable.
    """
    data, model = config.data, config.model
    tokenizer: Any = None
    packer = None
    if model.partial_pretrain:
        tokenizer = _tokenizer_of(config)
        packer = _packer_for(model, data.budget, tokenizer)
    elif data.custom_cls.path is not None:
        raise UserError("data.custom_cls renders with a tokenizer: set model.partial_pretrain as well")
    sides = sides_of(data)
    files = [resolve_files(data, key=side.key) for side in sides]
    short_names = _short_names({file.name for some in files for file in some})
    splits = [
        collect(
            name, side, some, data, tokenizer,
            short_names=short_names, num_samples=num_samples, seed=config.trainer.seed,
        )
        for name, side, some in zip(("training", "validation"), sides, files, strict=False)
    ]  # fmt: skip
    return build_report(splits, data, packer, model=model.partial_pretrain, seed=config.trainer.seed)


def _inspect_conversations(config: TrainConfig, *, num_samples: int) -> ConversationReport:
    """The same for supervised fine-tuning."""
    data, tokenizer = config.data, _tokenizer_of(config)
    packer = _packer_for(config.model, data.budget, tokenizer)
    sides = [(side, resolve_files(data, key=side.key)) for side in sides_of(data)]
    return inspect_conversations(
        sides, data, tokenizer, packer, model=config.model.partial_pretrain, num_samples=num_samples,
        seed=config.trainer.seed,
    )  # fmt: skip


def _tokenizer_of(config: TrainConfig) -> Any:
    model, data = config.model, config.data
    if model.trust_remote_code:
        log.warning("model.trust_remote_code=true: Python code of the model folder may run")
    tokenizer = load_tokenizer(
        tokenizer_folder(model.partial_pretrain, key="model.partial_pretrain", base=model.lora.base),
        trust_remote_code=model.trust_remote_code,
        chat_template=data.chat_template,
    )
    freeze_date(tokenizer, data.template_date, key="data.template_date")
    return tokenizer


def _short_names(names: set[str]) -> dict[str, str]:
    """File names without folders, unless two files have the same name."""
    short = {name: os.path.basename(name) for name in names}
    return short if len(set(short.values())) == len(short) else {}


def _packer_for(model: ModelConfig, token_budget: int, tokenizer: Any) -> Packer:
    """The packer of one rank, as in training. A folder without a model configuration counts as a decoder."""
    from transformers import AutoConfig

    from rm_gallery.modeling.architectures import DECODERS, ENCODERS, closing_token
    from rm_gallery.modeling.text_part import text_part

    path = backbone_folder(model.partial_pretrain, key="model.partial_pretrain", base=model.lora.base)
    try:
        config = text_part(
            AutoConfig.from_pretrained(os.path.expanduser(path), trust_remote_code=model.trust_remote_code)
        )
    except (OSError, ValueError):
        return Packer(token_budget)
    read_at(tokenizer, closing_token(config), what=path)
    padded = config.model_type in ENCODERS or model.packing == "padded"
    if config.model_type not in (*DECODERS, *ENCODERS):
        from rm_gallery.modeling.model_folder import check_class
        from rm_gallery.modeling.packing import choose_way

        try:
            check_class(config, what=path)
            padded = not choose_way(config, model.packing, what=path).packed
        except UserError:  # the data can be shown for a model that cannot be trained
            return Packer(token_budget)
    return Packer(token_budget, padded=padded, attention_length=attention_length(config.hidden_size))
