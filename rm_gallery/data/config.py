"""The `data` section of a configuration, its checks, and the two sides of the data: training and validation.

Loads neither torch nor transformers: `show-data` and `estimate` start with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rm_gallery.config import problem_of
from rm_gallery.data.batching.plan import Mixture, PackingConfig
from rm_gallery.data.custom import check_custom_class
from rm_gallery.data.formats import HoldOut
from rm_gallery.data.sources import DataFile, SourceConfig, check_val_fraction, entries_of, entry_problems, find_files
from rm_gallery.data.token_cache.arrays import TokenData
from rm_gallery.data.token_cache.prepare import PrepareConfig
from rm_gallery.data.tokenization.template_date import read_date
from rm_gallery.errors import Problem

FILE_KEYS = ("data.train_files", "data.val_files")


@dataclass(frozen=True)
class DataConfig(SourceConfig, PrepareConfig, PackingConfig):
    """`data`: which files, how a row is read, how texts are tokenized, and how tokens are batched.

    Flat for users. Each stage takes the base class with its own keys, so a `DataConfig` can be passed to all of them.
    """

    @property
    def budget(self) -> int:
        """Token budget of a micro-batch: the most tokens that it holds."""
        texts = 1 if self.lm_targets == "assistant" else 2  # of a conversation, of a pair
        return self.max_tokens_per_micro_batch or self.micro_batch_size_per_gpu * texts * self.max_length


def normalize_data(values: Any) -> Iterator[Problem]:
    """Before types are checked: `val_files: null` means none; reports entries that are neither paths nor sections.

    values: the plain value of `data`, changed in place; it may be of any type.
    """
    if not isinstance(values, Mapping):
        return
    if isinstance(values, dict) and values.get("val_files", "") is None:
        values["val_files"] = ""
    for key in FILE_KEYS:
        # pydantic would repeat itself for every type that an entry may have
        found = entry_problems(values.get(key.removeprefix("data.")), key)
        if found:
            yield Problem(key, "\n".join(found))


def data_problems(data: DataConfig) -> Iterator[Problem]:
    """Missing files, values out of range and contradictions."""
    if not data.train_files:
        yield Problem("data.train_files", "data.train_files is not set; give a file, a folder, a URL or a hub dataset")
    for key, files in zip(FILE_KEYS, (data.train_files, data.val_files), strict=True):
        if files:
            yield from problem_of(key, lambda files=files, key=key: find_files(files, key=key))  # type: ignore[misc]
    for name in ("train_batch_size", "micro_batch_size_per_gpu", "max_length", "max_tokens_per_micro_batch"):
        value = getattr(data, name)
        if value is not None and value < 1:
            yield Problem(f"data.{name}", f"data.{name}={value}: must be at least 1")
    if data.custom_cls.name and data.input_style == "text":
        yield Problem(
            "data.input_style", "data.input_style=text: data.custom_cls returns messages; remove one of the two"
        )
    if data.custom_cls.name and data.format != "auto":
        yield Problem(
            "data.format", f"data.format={data.format}: data.custom_cls reads the rows; remove one of the two"
        )
    if data.template_date is not None:
        date = data.template_date
        yield from problem_of("data.template_date", lambda: read_date(date, "data.template_date"))
    yield from problem_of("data.val_fraction", lambda: check_val_fraction(data))
    yield from problem_of("data.custom_cls", lambda: check_custom_class(data.custom_cls))


@dataclass(frozen=True)
class Side:
    """Training or validation data: the key that names its files, and its share of their prompts."""

    key: str
    share: HoldOut | None = None
    """None takes every row."""


def has_validation(config: DataConfig) -> bool:
    """Whether there is a validation side."""
    return bool(config.val_files or config.val_fraction)


def sides_of(config: DataConfig) -> list[Side]:
    """The training side, and the validation side if there is one."""
    if config.val_files:
        return [Side("data.train_files"), Side("data.val_files")]
    if config.val_fraction:
        held_out = config.val_fraction
        return [Side("data.train_files", ("train", held_out)), Side("data.train_files", ("val", held_out))]
    return [Side("data.train_files")]


def mixture_of(data: TokenData, files: Sequence[DataFile], config: DataConfig) -> Mixture | None:
    """How often each entry of `data.train_files` is used in an epoch; None if every group is used once.

    files: those that `data` was read from.
    """
    weights = [entry.weight for entry in entries_of(config, "data.train_files")]
    if all(weight == 1 for weight in weights):
        return None
    entry_of = {file.name: file.entry for file in files}
    entries = np.array([entry_of[name] for name in data.files], np.int32)
    return Mixture(entries[data.file_numbers], weights)
