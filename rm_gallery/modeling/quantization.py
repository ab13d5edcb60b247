"""Quantized base models (QLoRA, Dettmers et al. 2023): frozen linear layers in 4-bit NF4 or 8-bit integers.

bitsandbytes holds the weights and multiplies with them. Everything else stays as it is: embeddings, norms, the reward
head, poolers, experts in one tensor, and layers whose weight the library's code reads itself. A loaded model is
quantized layer by layer in place, as transformers quantizes the folder with the `BitsAndBytesConfig` of `settings_of`.
Nothing here imports bitsandbytes until a model is quantized.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rm_gallery.errors import UserError
from rm_gallery.modeling.config import Quantization
from rm_gallery.modeling.lora_layers import asks_for_weight, linear_layers, quiet


def check_package(what: str) -> Any:
    """bitsandbytes; raises UserError, which begins with `what`, if it is missing."""
    try:
        with quiet():
            import bitsandbytes  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        raise UserError(f"{what} needs the bitsandbytes package: pip install 'rm-gallery[qlora]'") from error
    return bitsandbytes


@dataclass(frozen=True)
class QuantizeOptions:
    """How a base model is quantized."""

    kind: Quantization
    dtype: torch.dtype
    """In which 4-bit layers compute."""
    device: torch.device
    what: str
    """Beginning of messages."""

    @torch.no_grad()
    def quantize(self, network: Any, *, but: Collection[str] = ()) -> dict[str, Any]:
        """Quantize the linear layers of the backbone in place; returns `settings_of` what was done.

        but: names of modules that are trained in full. Raises UserError if bitsandbytes is missing or the model has no
        layer that it quantizes.
        """
        bnb = check_package(self.what)
        names = [
            name for name in names_to_quantize(network) if not any(f"{name}.".startswith(f"{each}.") for each in but)
        ]
        if not names:
            raise UserError(f"{self.what}: {network.config.model_type} has no linear layers that can be quantized")
        for name in names:
            network.set_submodule(name, self._quantized(bnb, network.get_submodule(name)))
        # peft chooses its layers by these, as in a model that transformers has quantized.
        setattr(network, "is_loaded_in_4bit" if self.kind == "nf4" else "is_loaded_in_8bit", True)
        return settings_of(self.kind, [name for name, module in network.named_modules() if _is_convertible(module)])

    def _quantized(self, bnb: Any, module: Any) -> nn.Module:
        found: Any
        sizes = (module.in_features, module.out_features, module.bias is not None)
        weight = module.weight.detach().float()
        with torch.device("meta"):
            if self.kind == "nf4":
                found = bnb.nn.Linear4bit(*sizes, compute_dtype=self.dtype, compress_statistics=True, quant_type="nf4")
            else:
                found = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False, threshold=0.0)
        if self.kind == "nf4":
            found.support_avx512bf16_for_cpu = False  # a form that computes in bfloat16, and cannot be trained on
            found.weight = bnb.nn.Params4bit(
                weight, requires_grad=False, quant_type="nf4", compress_statistics=True, module=found
            )
        else:
            found.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        found.weight = found.weight.to(self.device)  # quantizes
        found.bias = module.bias
        found.requires_grad_(False)
        found.train(module.training)
        made: nn.Module = found
        return made


def settings_of(kind: Quantization, skipped: list[str]) -> dict[str, Any]:
    """Arguments of transformers' `BitsAndBytesConfig`. skipped: names of layers that are not quantized.

    int8: the threshold for outliers is 0. With LLM.int8's mixed decomposition (6.0 by default) a feature that is large
    in any token is computed in float16 for all tokens, so the reward of a text would depend on those beside it.
    """
    if kind == "int8":
        return {"load_in_8bit": True, "llm_int8_threshold": 0.0, "llm_int8_skip_modules": skipped}
    return {
        "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "float32", "llm_int8_skip_modules": skipped,
    }  # fmt: skip


def names_to_quantize(network: Any) -> list[str]:
    """Names of the linear layers that are quantized."""
    in_float32 = getattr(network, "_keep_in_fp32_modules", None) or ()
    return [
        name
        for name in linear_layers(network)[0]
        if _is_convertible(network.get_submodule(name))
        and not asks_for_weight(network, name)
        and not any(part in in_float32 for part in name.split("."))
    ]


def _is_convertible(module: nn.Module) -> bool:
    return type(module) is nn.Linear


def num_parameters(model: nn.Module) -> int:
    """Number of parameters, each of a quantized layer counted once, though the tensor holds two in one number."""
    return sum(each.numel() for each in model.parameters()) + sum(
        module.in_features * module.out_features - module.weight.numel() for module in _layers(model)
    )


def quantized_share(network: nn.Module) -> float:
    """Share of the parameters that are quantized."""
    return sum(each.in_features * each.out_features for each in _layers(network)) / num_parameters(network)


def _layers(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        if type(module).__module__.startswith("bitsandbytes.") and hasattr(module, "in_features"):
            yield module
