"""Which parameters are trained: `model.freeze`, and the parts that every run trains.

Frozen parameters have no gradient, master weight or optimizer state. What is below the lowest trained parameter is not
in autograd's graph, so none of its activations are saved either.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from rm_gallery.errors import UserError
from rm_gallery.modeling.config import FreezeSetting


def freeze(network: Any, setting: FreezeSetting) -> None:
    """Freeze the backbone, its embeddings, or the embeddings and a number of the lowest layers, in place.

    The reward head and poolers stay trained: most base models lack them. Raises UserError for more layers than the
    model has, and for a number of layers where they are not one list.
    """
    if setting is None:
        return
    if setting == "backbone":
        network.requires_grad_(False)
        for name in modules_to_save(network):
            network.get_submodule(name).requires_grad_(True)
        return
    backbone, lowest = getattr(network, network.base_model_prefix), []
    if setting != "embeddings":
        layers, what = _layers(network), f"model.freeze={setting}"
        if not layers:
            raise UserError(
                f"{what}: the layers of {network.config.model_type} are not one list; set embeddings or backbone"
            )
        if setting > len(layers):
            raise UserError(f"{what}: the model has {len(layers)} layers; set at most {len(layers)}, or backbone")
        lowest = layers[:setting]
    lists = [part for part in backbone.modules() if isinstance(part, nn.ModuleList)]
    inside = {each for part in lists for each in part.parameters()}
    for name, module in backbone.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            is_embedding = isinstance(module, nn.Embedding) or ("emb" in f"{name}.{own}" and "after" not in name)
            if is_embedding and parameter not in inside:
                parameter.requires_grad_(False)
    for layer in lowest:
        layer.requires_grad_(False)


def _layers(network: Any) -> list[nn.Module]:
    """The layers of the backbone, lowest first; [] if they are several lists, or no list."""
    backbone, depth = getattr(network, network.base_model_prefix), getattr(network.config, "num_hidden_layers", None)
    lists = [part for part in backbone.modules() if isinstance(part, nn.ModuleList) and len(part) == depth]
    return list(lists[0]) if len(lists) == 1 else []


def modules_to_save(network: Any) -> list[str]:
    """The reward head and other modules with parameters outside of the backbone, and poolers: new for most models."""
    backbone = network.base_model_prefix
    outside = [name for name, _ in network.named_children() if name != backbone]
    inside = [f"{backbone}.{name}" for name, _ in getattr(network, backbone).named_children() if name == "pooler"]
    return [name for name in [*outside, *inside] if any(True for _ in network.get_submodule(name).parameters())]


def count_trained(parameters: Iterable[nn.Parameter]) -> int:
    """Number of elements that are trained."""
    return sum(each.numel() for each in parameters if each.requires_grad)
