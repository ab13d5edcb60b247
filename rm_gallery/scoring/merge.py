"""`rm-gallery merge`: merges an adapter (LoRA) into its base model, and verifies the rewards of the written folder."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rm_gallery.data.tokenization.token_group import Span, TokenGroup
from rm_gallery.data.tokenization.tokenizer import load_tokenizer
from rm_gallery.errors import UserError, one_line
from rm_gallery.files import replace, write_manifest
from rm_gallery.modeling.adapter_folder import AdapterFolder, open_adapter
from rm_gallery.modeling.export import check_rewards, names_statistics, rescore, write_folder
from rm_gallery.modeling.heads import is_of_language_model
from rm_gallery.modeling.language_folder import check_losses, plain_losses, write_language_folder
from rm_gallery.modeling.parallel.apply import DTYPES
from rm_gallery.modeling.reward_model import RewardModel
from rm_gallery.modeling.weight_files import kind_of_quantization, read_adapter_files, tokenizer_folder
from rm_gallery.scoring.loading import KEY, load_folder
from rm_gallery.scoring.model_folder import choose_checkpoint

log = logging.getLogger(__name__)

PROBES = (
    "Why is the sky blue?\n\nAir scatters short waves of light more.",
    "Name a prime number.\n\n7",
    "2 + 2 = 5",
    "How long does an egg boil?\n\nEight minutes for a firm yolk; five minutes if you like it soft.",
)
"""Texts that are scored to compare models."""


def merge(
    folder: str | Path, output: str | Path | None = None, *, base: str | None = None, dtype: str = "fp32"
) -> Path:
    """Write the folder of the merged model, `FOLDER-merged` by default, and return it.

    base: the adapter's base model, instead of the one that its folder names. dtype: of the written weights. The rewards
    of a few texts by the written folder are compared with those of the adapter that is not merged, both by transformers
    and peft alone: within 1e-4 with fp32, and within the rounding of bf16 otherwise. An adapter of a quantized base
    model is merged into the one that is not quantized, and a warning says by how much rewards move.

    Raises UserError for a folder without an adapter, as `load_folder`, for an output that exists, when it cannot be
    written, and when the rewards differ; then nothing is written.
    """
    path = choose_checkpoint(str(folder), key=KEY)
    files = read_adapter_files(path, key=KEY)
    is_language_model = files is not None and is_of_language_model(files)
    adapter = open_adapter(path, key=KEY, base=base, language_model=is_language_model)
    if adapter is None:
        raise UserError(f"{KEY}={path}: the folder holds no adapter, so there is nothing to merge")
    source_folder = Path(path).expanduser()
    target = Path(output or source_folder.with_name(f"{source_folder.resolve().name}-merged")).expanduser()
    if target.exists():
        raise UserError(f"{target}: exists; name another folder with --output, or delete it")
    if is_language_model:
        return _merge_language_model(adapter, target, base=base, dtype=dtype)
    source = load_folder(path, device="cpu", dtype="fp32", base=base, quantized=False)
    model, tokenizer = source.model, source.tokenizer
    assert isinstance(model, RewardModel)  # adapters of other architectures are refused
    state = model.network.state_dict()
    if (bias := state.pop("score.bias", None)) is not None:  # of another trainer: no layer of the library has it
        log.warning("%s: the bias of the reward head, %.6g, is dropped: rewards differ by it", path, bias.item())
    texts = [tokenizer(text)["input_ids"] for text in PROBES]
    expected = rescore(source_folder, texts, base=base, quantized=False)
    if adapter.quantization is not None:
        _warn_of_quantized(adapter, expected, rescore(source_folder, texts, base=base), "rewards")
    meta = {name: value.to("meta") for name, value in state.items()}

    def write(folder: Path) -> dict[str, str]:
        hashes = write_folder(
            folder, model, meta, tokenizer, DTYPES[dtype], source.record, read=state.__getitem__,
            normalize=names_statistics(source_folder),
        )  # fmt: skip
        check_rewards(folder, texts, expected, exact=dtype == "fp32")
        return hashes

    return _publish(target, write)


def probe_groups(tokenizer: Any) -> list[TokenGroup]:
    """The texts whose losses are computed to compare language models; all tokens but the first are targets."""
    texts = [np.array(tokenizer(text)["input_ids"], np.int32) for text in PROBES]
    return [TokenGroup(text[:0], [text], (), spans=[Span(0, 1, len(text))]) for text in texts]


def _merge_language_model(adapter: AdapterFolder, target: Path, *, base: str | None, dtype: str) -> Path:
    """The same for a language model, whose losses are compared."""
    path = Path(adapter.path).expanduser()
    model = adapter.load_merged().model
    tokenizer = load_tokenizer(tokenizer_folder(adapter.path, key=KEY, base=base))
    groups = probe_groups(tokenizer)
    expected = plain_losses(path, groups, base=base, quantized=False)
    if adapter.quantization is not None:
        _warn_of_quantized(adapter, expected, plain_losses(path, groups, base=base), "losses")
    state = model.network.state_dict()
    meta = {name: value.to("meta") for name, value in state.items()}

    def write(folder: Path) -> dict[str, str]:
        hashes = write_language_folder(folder, model, meta, tokenizer, DTYPES[dtype], read=state.__getitem__)
        check_losses(folder, groups, expected, exact=dtype == "fp32")
        return hashes

    return _publish(target, write)


def _warn_of_quantized(adapter: AdapterFolder, found: Sequence[float], trained: Sequence[float], noun: str) -> None:
    log.warning(
        "%s: trained on a quantized base model (%s), and merged into the one that is not quantized: %s of %d texts "
        "differ by up to %.3g from those of training",
        adapter.path, kind_of_quantization(adapter.quantization), noun, len(found),
        max(abs(ours - theirs) for ours, theirs in zip(found, trained, strict=True)),
    )  # fmt: skip


def _publish(target: Path, write: Callable[[Path], dict[str, str]]) -> Path:
    """Write and verify a folder beside the target, and move it there. write: returns the hashes of the files."""
    staging = target.with_name(f".{target.name}.merging")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        write_manifest(staging, write(staging))
        replace(staging, target)
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({one_line(error)})") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target
