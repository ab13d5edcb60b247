"""Liger's fused GPU kernels for norms and gated MLPs, set into the library's modules from outside.

Only its functions are used: its own way of patching changes classes, and with them every other model of the process.
"""

from __future__ import annotations

import logging
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from rm_gallery.errors import UserError

log = logging.getLogger(__name__)


def use_liger(network: nn.Module, device: torch.device) -> None:
    """Norms and gated MLPs of a decoder by Liger's kernels; on a CPU, where they do not run, one line says so.

    Raises UserError when the package is missing.
    """
    if device.type != "cuda":
        log.info("model.use_liger does nothing on a CPU: Liger's kernels need a GPU")
        return
    try:
        from liger_kernel.transformers import functional  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        raise UserError(
            "model.use_liger=true needs the liger-kernel package: pip install 'rm-gallery[liger]'"
        ) from error
    count = set_in(network, functional)
    if not count:
        log.info("model.use_liger does nothing for %s: it has no RMS norms or gated MLPs", type(network).__name__)


def set_in(network: nn.Module, kernels: Any) -> int:
    """Give modules that `kernels` has a function for a `forward` that calls it; returns how many."""
    config: Any = network.config
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    gated = {"silu": kernels.liger_swiglu, "gelu_pytorch_tanh": kernels.liger_geglu}.get(str(activation))

    def norm(module: Any, hidden_states: Tensor) -> Tensor:
        out: Tensor = kernels.liger_rms_norm(
            hidden_states, module.weight, module.variance_epsilon, 0.0, "llama", in_place=False
        )
        return out

    def gemma_norm(module: Any, hidden_states: Tensor) -> Tensor:  # times 1 + weight, and rounded after that
        out: Tensor = kernels.liger_rms_norm(hidden_states, module.weight, module.eps, 1.0, "gemma", in_place=False)
        return out

    def mlp(module: Any, hidden_states: Tensor) -> Tensor:
        assert gated is not None
        out: Tensor = module.down_proj(gated(module.gate_proj(hidden_states), module.up_proj(hidden_states)))
        return out

    count = 0
    for module in network.modules():
        name = type(module).__name__
        if name.endswith("RMSNorm"):
            module.forward = MethodType(norm if hasattr(module, "variance_epsilon") else gemma_norm, module)
        elif name.endswith("MLP") and hasattr(module, "gate_proj") and gated is not None:
            module.forward = MethodType(mlp, module)
        else:
            continue
        count += 1
    return count
