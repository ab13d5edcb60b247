"""BaseTrainDataset: derive from it to train on rows of your own structure.

    data:
      custom_cls:
        path: ./my_dataset.py     # relative to where you stand
        name: MyDataset

Every hook has a default, so a class overrides only what its rows need. The trainer makes an instance without files,
reads the rows itself, and calls the hooks in as many processes as it likes: a hook should depend on its row alone.
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

    By itself it is a sequence, to look at in a notebook before training:

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
        """data_files: a file or several, as in `data.train_files`. tokenizer: needed for text alone.

        config: the `data` section or a part of it; read as `self.config.max_length`, `self.config["max_length"]` or
        `self.config.get("max_length")`. processor: kept for classes that use one; the trainer gives none.
        """
        self.data_files = [data_files] if isinstance(data_files, str | os.PathLike) else list(data_files)
        self.tokenizer = with_template(tokenizer)
        self.config = config if isinstance(config, DataSection) else DataSection(config)
        self.processor = processor

    def _build_messages(self, example: dict[str, Any]) -> list[Message]:
        """The messages before the responses. Default: the column `data.prompt_key`, text or messages; none, if null."""
        name = self.config.prompt_key or ""
        return as_messages(read_cell(example.get(name), name, required=False), "user")

    def _apply_chat_template(self, messages: list[Message]) -> str:
        """The text of these messages, up to where the response begins. Default: the tokenizer's chat template."""
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def _extract_ground_truth(self, row_dict: dict[str, Any]) -> Any:
        """A plain JSON value for `metadata["ground_truth"]`; None for nothing. Default: the column `ground_truth`."""
        return row_dict.get("ground_truth")

    def _get_data_source(self, row_dict: dict[str, Any]) -> str:
        """The name for metrics by source; "" for that of the file. Default: the column `data_source`, else the column
        `data.source_key`."""
        return read_name(row_dict, "data_source") or read_name(row_dict, self.config.source_key)

    def build_group(self, row: dict[str, Any]) -> PreferenceGroup | tuple[None, str] | None:
        """One row as a whole: override it for data that are not pairs.

        Gives a `PreferenceGroup`, or `(None, reason)` for a row to leave out; rows are counted by reason, None alone
        as "left out by build_group". A prompt of messages, or `style="chat"`, is rendered by `_apply_chat_template`,
        with string responses as assistant turns; strings alone are bare text. What the group leaves open, `source`
        and `metadata["ground_truth"]`, comes from the hooks. Two answers with votes, for example:

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

        Default: the pair of `_build_messages` with the columns `data.chosen_key` and `data.rejected_key`; those of
        `data.weight_key`, `data.margin_key` and `data.p_chosen_key` count, too.
        """
        return build_pair(self, row, self.config)

    def __len__(self) -> int:
        return len(self._file_rows)

    @overload
    def __getitem__(self, index: int) -> PreferenceGroup: ...
    @overload
    def __getitem__(self, index: slice) -> list[PreferenceGroup]: ...
    def __getitem__(self, index: int | slice) -> PreferenceGroup | list[PreferenceGroup]:
        """The group of a row. Raises UserError for a row that training leaves out, with the reason."""
        if isinstance(index, slice):
            return [self[number] for number in range(len(self))[index]]
        row = self._file_rows[index]
        try:
            return read_row(self, row, self.config)
        except BadRow as error:
            raise UserError(f"{row.where}: {error}; training leaves this row out") from error

    def texts(self, index: int) -> list[str]:
        """The whole text of each response of a row, as the model reads it. Raises UserError like `dataset[index]`."""
        group = self[index]
        if isinstance(group.prompt, str):
            return [f"{group.prompt}{response}" for response in group.responses]
        if self.tokenizer is None:
            raise UserError("texts need a tokenizer; give the data set one")
        renderer = Renderer(self, self.tokenizer)
        try:
            return [renderer.render(group.prompt, as_messages(each, "assistant")) for each in group.responses]  # type: ignore[arg-type]
        except (BadRow, UserError) as error:
            raise UserError(f"{group.where}: {error}") from error

    @cached_property
    def _file_rows(self) -> list[Row]:
        """All rows, read when they are first asked for."""
        if not self.data_files:
            return []
        config = SourceConfig(train_files=tuple(str(each) for each in self.data_files))
        return list(read_rows(resolve_files(config, key="data.train_files"), key="data.train_files"))
