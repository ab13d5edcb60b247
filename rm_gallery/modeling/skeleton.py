"""A model without weights: its modules and buffers, for sharded training and to check what transformers loaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules constructed in this context have their parameters on the meta device, and their buffers on the CPU."""
    original = nn.Module.register_parameter

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:  # one on the meta device may be tied, so it stays the same object
            param = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
        original(self, name, param)

    nn.Module.register_parameter = register  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


def wrong_buffers(network: Any) -> list[str]:
    """Buffers that no file holds and that have other values than a newly built model has.

    transformers builds a model without memory and computes such buffers again; for some types (Falcon-H1) it does not,
    and they hold whatever was in memory.
    """
    with torch.random.fork_rng(devices=[]), parameters_on_meta():
        built = type(network)(network.config)
    wanted = dict(built.named_buffers())
    return [
        name
        for name, each in network.named_buffers()
        if name in wanted and not _is_persistent(network, name) and not _is_same(each, wanted[name])
    ]


def _is_persistent(network: nn.Module, name: str) -> bool:
    owner, _, last = name.rpartition(".")
    return last not in network.get_submodule(owner)._non_persistent_buffers_set


def _is_same(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    if found.shape != wanted.shape or wanted.is_meta:
        return found.shape == wanted.shape
    return torch.allclose(found.double(), wanted.double(), rtol=1e-2, atol=0)  # of bfloat16
