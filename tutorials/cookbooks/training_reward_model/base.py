"""BaseTrainDataset: subclass it to train on rows with a custom structure.

    data:
      custom_cls:
        path: ./my_dataset.py     # relative to the working directory
        name: MyDataset

Every hook has a default, so a subclass overrides only what its rows need. The trainer creates an instance without
files, reads the rows itself, and calls the hooks in several processes: a hook must depend on its row only.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, overload

from rm_gallery.data.custom import DataSection, Renderer, build_pair, read_row, with_template
from rm_gallery.data.formats import as_messages, read_cell
from rm_gallery.data.formats.cells import read_name
from rm_gallery.data.sources import Row, SourceConfig, read_rows, resolve_files
from rm_gallery.errors import BadRow, UserError
from rm_gallery.schema import Message, PreferenceGroup

Files = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


class BaseTrainDataset(Sequence[PreferenceGroup]):
    """Rows of preference data as `PreferenceGroup`s.

    It is also a sequence, to inspect in a notebook before training:

        dataset = MyDataset("train.parquet", tokenizer)
        len(dataset)        # rows
        dataset[3]          # the PreferenceGroup of row 3
        dataset.texts(3)    # the text of each of its responses, as the model will read it
    """

    def __init__(
        self,
        data_files: Files = (),
        tokenizer: Any = None,
        config: DataSection | Mapping[str, Any] | None = None,
        processor: Any = None,
    ) -> None:
        """data_files: one or several files, as in `data.train_files`. tokenizer: needed by `texts` only.

        config: the `data` section or a part of it; read as `self.config.max_length`, `self.config["max_length"]` or
        `self.config.get("max_length")`. processor: stored for subclasses that use one; the trainer passes None.
        """
        self.data_files = [data_files] if isinstance(data_files, str | os.PathLike) else list(data_files)
        self.tokenizer = with_template(tokenizer)
        self.config = config if isinstance(config, DataSection) else DataSection(config)
        self.processor = processor

    def _build_messages(self, example: dict[str, Any]) -> list[Message]:
        """The messages before the responses. Default: the column `data.prompt_key`, text or messages; empty if null."""
        name = self.config.prompt_key or ""
        return as_messages(read_cell(example.get(name), name, required=False), "user")

    def _apply_chat_template(self, messages: list[Message]) -> str:
        """The text of these messages, up to the start of the response. Default: the tokenizer's chat template."""
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def _extract_ground_truth(self, row_dict: dict[str, Any]) -> Any:
        """A JSON value for `metadata["ground_truth"]`, or None. Default: the column `ground_truth`."""
        return row_dict.get("ground_truth")

    def _get_data_source(self, row_dict: dict[str, Any]) -> str:
        """The name for metrics by source; "" uses the name of the file. Default: the column `data_source`, else the
        column `data.source_key`."""
        return read_name(row_dict, "data_source") or read_name(row_dict, self.config.source_key)

    def build_group(self, row: dict[str, Any]) -> PreferenceGroup | tuple[None, str] | None:
        """Build the group of one row; override it for data that are not pairs.

        Returns a `PreferenceGroup`, or `(None, reason)` to drop the row; rows are counted by reason, None alone as
        "dropped by build_group". A prompt of messages, or `style="chat"`, is rendered by `_apply_chat_template`, with
        string responses as assistant turns; strings without messages are plain text. The hooks fill `source` and
        `metadata["ground_truth"]` where the group does not set them. Example, two answers with votes:

            def build_group(self, row):
                first, second = row["votes"]
                if first == second:
                    return None, "as many votes for both"
                better = 0 if first > second else 1
                return PreferenceGroup(
                    prompt=[{"role": "user", "content": row["question"]}],
                    responses=row["answers"],
                    comparisons=[Comparison(better, 1 - better, weight=abs(first - second))],
                )

        Default: the pair of `_build_messages` with the columns `data.chosen_key` and `data.rejected_key`; the columns
        `data.weight_key`, `data.margin_key` and `data.p_chosen_key` are read too.
        """
        return build_pair(self, row, self.config)

    def __len__(self) -> int:
        return len(self._file_rows)

    @overload
    def __getitem__(self, index: int) -> PreferenceGroup: ...
    @overload
    def __getitem__(self, index: slice) -> list[PreferenceGroup]: ...
    def __getitem__(self, index: int | slice) -> PreferenceGroup | list[PreferenceGroup]:
        """The group of a row. Raises UserError with the reason for a row that training drops."""
        if isinstance(index, slice):
            return [self[number] for number in range(len(self))[index]]
        row = self._file_rows[index]
        try:
            return read_row(self, row, self.config)
        except BadRow as error:
            raise UserError(f"{row.where}: {error}; training drops this row") from error

    def texts(self, index: int) -> list[str]:
        """The full text of each response of a row, as the model reads it. Raises UserError like `dataset[index]`."""
        group = self[index]
        if isinstance(group.prompt, str):
            return [f"{group.prompt}{response}" for response in group.responses]
        if self.tokenizer is None:
            raise UserError("texts need a tokenizer; pass one to the dataset")
        renderer = Renderer(self, self.tokenizer)
        try:
            return [renderer.render(group.prompt, as_messages(each, "assistant")) for each in group.responses]  # type: ignore[arg-type]
        except (BadRow, UserError) as error:
            raise UserError(f"{group.where}: {error}") from error

    @cached_property
    def _file_rows(self) -> list[Row]:
        """All rows, read on first access."""
        if not self.data_files:
            return []
        config = SourceConfig(train_files=tuple(str(each) for each in self.data_files))
        return list(read_rows(resolve_files(config, key="data.train_files"), key="data.train_files"))
