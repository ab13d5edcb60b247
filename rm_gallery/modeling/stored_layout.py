"""Tensors of the model that are read from several tensors of the files.

transformers 5 merges the matrices of a mixture's experts when it loads a folder: [I, D] of each expert into one tensor
[E, 2I, D]. The conversions are the library's (`transformers.core_model_loading`); here each rank runs them on the rows
that it holds, so it reads its own experts only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from rm_gallery.modeling.weight_files import FLOATS, StoredTensor


def _conversions(network: Any) -> list[Any]:
    """The library's conversions for this class, from files to the model."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange

    found = get_model_conversion_mapping(network, add_legacy=False)
    # The prefix of the backbone is not a conversion: the files of this class always have it.
    return [each for each in found if not isinstance(each, PrefixChange)]


@dataclass(frozen=True)
class MergedTensor:
    """A tensor of the model that is read from several tensors of the files."""

    name: str
    pieces: Mapping[str, Sequence[StoredTensor]]
    """By the pattern of the conversion that their names match, each in the order of the experts."""
    converter: Any
    config: Any

    def read(self, rows: slice | None = None) -> Tensor:
        """The values of the given rows along dimension 0; of all rows by default."""
        pieces = self.pieces
        if rows is not None and self._is_stacked:
            pieces, rows = {pattern: each[rows] for pattern, each in pieces.items()}, None
        values = self._convert({pattern: [_read(piece) for piece in each] for pattern, each in pieces.items()})
        return values if rows is None else values[rows]

    @property
    def all_pieces(self) -> list[StoredTensor]:
        """The tensors of the files."""
        return [piece for each in self.pieces.values() for piece in each]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole tensor, without reading it."""
        shapes = {
            pattern: [torch.empty(piece.shape, device="meta") for piece in each]
            for pattern, each in self.pieces.items()
        }
        return tuple(self._convert(shapes).shape)

    @property
    def _is_stacked(self) -> bool:
        """Whether row r of the tensor is made of the r-th pieces alone."""
        first, *rest = self.converter.operations
        return (
            type(first).__name__ == "MergeModulelist"
            and first.dim == 0
            and all(type(each).__name__ in ("Concatenate", "Transpose") for each in rest)
            and all(0 not in (getattr(each, "dim", 1), getattr(each, "dim0", 1)) for each in rest)
        )

    def _convert(self, values: Mapping[str, Sequence[Tensor]]) -> Tensor:
        if any(not each for each in values.values()):  # a rank without rows
            return torch.empty(0)
        converter = deepcopy(self.converter)
        for pattern, each in values.items():
            for value in each:
                converter.add_tensor(self.name, self.name, pattern, value)
        [found] = converter.convert(self.name, config=self.config).values()
        return found[0] if isinstance(found, list) else found


def _read(piece: StoredTensor) -> Tensor:
    with safe_open(piece.file, framework="pt") as source:
        tensor: Tensor = source.get_tensor(piece.name)
        return tensor


def from_stored(network: Any, stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor | MergedTensor]:
    """Tensors of the model by their names, from tensors of the files that have another name or layout there.

    stored: by their names there, without those of a wrapper's other models.
    Tensors that match no conversion, and those that one conversion splits, are not in the result.
    """
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    conversions = _conversions(network)
    renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
    converters = {
        pattern: each for each in conversions if isinstance(each, WeightConverter) for pattern in each.source_patterns
    }
    state = network.state_dict()
    found: dict[str, StoredTensor | MergedTensor] = {}
    merged: dict[str, dict[str, list[StoredTensor]]] = {}
    for key in sorted(stored, key=dot_natural_key):
        piece = stored[key]
        name, pattern = rename_source_key(
            key, renamings, list(dict.fromkeys(converters.values())), network.base_model_prefix, state
        )
        if name not in state or name == key or piece.dtype not in FLOATS:
            continue
        if pattern is None:
            found[name] = piece
        elif len(converters[pattern].target_patterns) == 1:
            merged.setdefault(name, {}).setdefault(pattern, []).append(piece)
    for name, pieces in merged.items():
        converter = converters[next(iter(pieces))]
        if set(pieces) == set(converter.source_patterns):
            found[name] = MergedTensor(name, pieces, converter, network.config)
    return found
