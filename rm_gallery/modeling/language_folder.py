"""The folder of a language model: what transformers writes for a causal language model, and nothing of ours.

With LoRA it is the folder that peft writes, with the configuration of the model beside it.

Any program that reads language models reads it, and training a reward model from it adds a head.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rm_gallery.data.tokenization.token_group import TokenGroup
from rm_gallery.errors import UserError, one_line
from rm_gallery.files import sha256_files
from rm_gallery.modeling.adapter_folder import open_adapter
from rm_gallery.modeling.adapters import BASE_RECORD, Adapter
from rm_gallery.modeling.export import (
    MEAN_KEYS,
    RECORD_KEY,
    STD_KEYS,
    apply_umask,
    fits_memory,
    without_tied,
    write_adapter,
    write_weights,
)
from rm_gallery.modeling.model_folder import check_values, quiet_transformers
from rm_gallery.modeling.reward_model import RewardModel
from rm_gallery.modeling.stored_layout import as_stored
from rm_gallery.modeling.weight_files import QUANTIZATION_RECORD


def write_language_folder(
    folder: Path, model: RewardModel, tensors: Mapping[str, Tensor], tokenizer: Any, dtype: torch.dtype, *,
    read: Callable[[str], Tensor], adapter: Adapter | None = None,
) -> dict[str, str]:  # fmt: skip
    """Write weights, configurations and tokenizer; return the SHA-256 of each file. See `export.write_folder`."""
    network = model.network
    if adapter is None:
        stored, read_stored = as_stored(network, without_tied(network, tensors), read)
        hashes = write_weights(folder, stored, dtype, read=read_stored)
    else:
        hashes = write_adapter(folder, adapter, tensors, read=read)
    with quiet_transformers():
        network.config.save_pretrained(folder)
        if network.can_generate():
            network.generation_config.save_pretrained(folder)
        tokenizer.save_pretrained(folder, save_jinja_files=False)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config.update(architectures=[type(network).__name__], dtype=str(dtype).removeprefix("torch."))
    for name in (RECORD_KEY, BASE_RECORD, QUANTIZATION_RECORD, "auto_map", *MEAN_KEYS, *STD_KEYS):
        config.pop(name, None)  # of a reward model, or an adapter, that training started from
    if adapter is not None:
        config |= adapter.base_record()
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    apply_umask(folder)
    names = [path.name for path in sorted(folder.iterdir()) if path.is_file() and path.suffix != ".safetensors"]
    return {**hashes, **sha256_files(folder, names)}


def load_for_generation(
    folder: Path, dtype: torch.dtype, *, base: str | None, quantized: bool, trust_remote_code: bool
) -> Any:
    """The model on the CPU by transformers and peft alone; an adapter is merged into its base model in memory.

    base: see `open_adapter`. quantized: False for an adapter of a quantized base model, which is merged into the one
    that is not quantized. Raises UserError for a folder that cannot be loaded, or whose weights are incomplete.
    """
    from transformers import AutoModelForCausalLM

    what = f"model={folder}"
    adapter = open_adapter(str(folder), key="model", base=base, language_model=True)
    if adapter is not None and adapter.quantization and quantized:
        raise UserError(
            f"{what}: its base model was quantized in training, and a quantized model does not generate here; pass "
            "quantized=False to merge the adapter into the base model that is not quantized, as rm-gallery merge does"
        )
    try:
        if adapter is not None:
            return adapter.load_plain(quantized=False).merge_and_unload().to(dtype)
        with quiet_transformers():
            network, info = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, trust_remote_code=trust_remote_code, output_loading_info=True
            )
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what}: the model cannot be loaded ({one_line(error)})") from error
    if missing := sorted(info["missing_keys"]):
        raise UserError(
            f"{what}: the weights lack {len(missing)} tensors (first: {missing[0]}); is the download complete?"
        )
    check_values(network.named_parameters(), what)
    return network


@torch.no_grad()
def plain_losses(
    folder: Path, groups: Sequence[TokenGroup], *, base: str | None = None, quantized: bool = True
) -> list[float]:
    """The mean loss of the targets of each group by transformers (and peft) alone, in float32, one text at a time.

    base, quantized: see `export.rescore`.
    """
    from transformers import AutoModelForCausalLM

    adapter = open_adapter(str(folder), key="model", base=base, language_model=True)
    if adapter is not None:
        network = adapter.load_plain(quantized=quantized)
    else:
        with quiet_transformers():
            network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for group in groups:
        total, count = 0.0, 0
        for span in group.spans:
            text = [*group.prefix.tolist(), *group.tails[span.response].tolist()]
            ids = torch.tensor(text)
            losses = F.cross_entropy(
                network(input_ids=ids[None], use_cache=False).logits[0, :-1], ids[1:], reduction="none"
            )
            total += float(losses[span.first - 1 : span.last - 1].sum())
            count += span.last - span.first
        found.append(total / count)
    return found


def check_losses(folder: Path, groups: Sequence[TokenGroup], expected: Sequence[float], *, exact: bool) -> None:
    """Compare the folder's losses with the trainer's; raises UserError for the first difference.

    exact: as for `export.check_rewards`.
    """
    if not fits_memory(folder):
        return
    absolute, relative = (1e-4, 1e-4) if exact else (0.1, 0.05)
    for number, (found, wanted) in enumerate(zip(plain_losses(folder, groups), expected, strict=True)):
        if not (abs(found - wanted) <= absolute + relative * abs(wanted) or (math.isnan(found) and math.isnan(wanted))):
            raise UserError(
                f"{folder}: the reloaded model has the loss {found:.6f} on text {number}, the trainer had "
                f"{wanted:.6f}; do not use this checkpoint, and please report the architecture"
            )
