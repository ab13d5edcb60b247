"""Names and shapes of tensors in weight files, where they differ from those in the model.

transformers 5 joins some tensors when it loads a folder, such as the matrices [I, D] of all experts of a layer into one
[E, 2I, D]; files have them as models of the type are published. The conversions are the library's
(`transformers.core_model_loading`). `as_stored` converts one layer at a time; with `from_stored` each rank reads and
converts the rows that it holds, so it reads its own experts only.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from rm_gallery.modeling.weight_files import FLOATS, StoredTensor

_LAYER = re.compile(r"(?:[^.]+\.)*?\d+\.")  # the beginning of the names of a layer's tensors


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
        with ExitStack() as stack:
            files = {piece.file: None for each in pieces.values() for piece in each}
            opened = {file: stack.enter_context(safe_open(file, framework="pt")) for file in files}
            values = self._convert(
                {
                    pattern: [opened[piece.file].get_tensor(piece.name) for piece in each]
                    for pattern, each in pieces.items()
                }
            )
        return values if rows is None else values[rows]

    @property
    def all_pieces(self) -> list[StoredTensor]:
        """The tensors of the files."""
        return [piece for each in self.pieces.values() for piece in each]

    def has_shape(self, shape: Sequence[int]) -> bool:
        """Whether the whole tensor has this shape, without reading it; False for pieces that do not fit together."""
        meta = {
            pattern: [torch.empty(piece.shape, device="meta") for piece in each]
            for pattern, each in self.pieces.items()
        }
        try:
            return tuple(self._convert(meta).shape) == tuple(shape)
        except Exception:  # an expert without one of its matrices: torch and transformers raise various errors
            return False

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


def from_stored(network: Any, stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor | MergedTensor]:
    """Tensors of the model by their names, from tensors of the files that have another name or layout there.

    stored: by their names there, without those of a wrapper's other models.
    Tensors that match no conversion, those that one conversion splits, and incomplete ones are not in the result.
    """
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    conversions = _conversions(network)
    if not conversions:
        return {}
    renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
    converters = [each for each in conversions if isinstance(each, WeightConverter)]
    by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    state = network.state_dict()
    found: dict[str, StoredTensor | MergedTensor] = {}
    merged: dict[str, dict[str, list[StoredTensor]]] = {}
    for key in sorted(stored, key=dot_natural_key):
        piece = stored[key]
        name, pattern = rename_source_key(key, renamings, converters, network.base_model_prefix, state)
        if name not in state or name == key or piece.dtype not in FLOATS:
            continue
        if pattern is None:
            found[name] = piece
        elif len(by_pattern[pattern].target_patterns) == 1:
            merged.setdefault(name, {}).setdefault(pattern, []).append(piece)
    for name, pieces in merged.items():
        converter = by_pattern[next(iter(pieces))]
        tensor = MergedTensor(name, pieces, converter, network.config)
        if set(pieces) == set(converter.source_patterns) and tensor.has_shape(state[name].shape):
            found[name] = tensor
    return found


def as_stored(
    network: Any, tensors: Mapping[str, Tensor], read: Callable[[str], Tensor]
) -> tuple[dict[str, Tensor], Callable[[str], Tensor]]:
    """The tensors under the names and in the shapes in which models of this type are published, and how to read one.

    Transformers 5 joins tensors when it loads some models, such as all experts of a layer; transformers 4 and vLLM read
    them as published. They are those that `save_pretrained` writes. One layer is converted at a time.
    """
    steps = _conversions(network)
    if not steps:
        return dict(tensors), read
    layers: dict[str, list[str]] = {}
    for name in tensors:
        layers.setdefault((_LAYER.match(name) or [""])[0], []).append(name)
    converted: dict[str, Tensor] = {}
    layer_of: dict[str, str] = {}
    for layer, names in layers.items():
        found = _convert(network, steps, {name: tensors[name] for name in names})
        converted.update(found)
        layer_of.update(dict.fromkeys(found, layer))
    last: tuple[str, dict[str, Tensor]] = ("", {})

    def read_converted(name: str) -> Tensor:
        nonlocal last
        if name not in last[1]:
            layer = layer_of[name]
            last = layer, _convert(network, steps, {each: read(each).detach().cpu() for each in layers[layer]})
        return last[1][name]

    return converted, read_converted


def _convert(network: Any, steps: Sequence[Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `save_pretrained` makes of these tensors."""
    from transformers.core_model_loading import revert_weight_conversion

    before = vars(network).get("_weight_conversions")
    network._weight_conversions = list(steps)
    try:
        found: dict[str, Tensor] = revert_weight_conversion(network, dict(tensors))
    finally:
        network._weight_conversions = before
    return found
