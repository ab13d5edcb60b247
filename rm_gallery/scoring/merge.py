"""`rm-gallery merge`: merges an adapter (LoRA) into its base model, and verifies the rewards of the written folder."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from rm_gallery.errors import UserError, one_line
from rm_gallery.files import replace, write_manifest
from rm_gallery.modeling.adapter_folder import open_adapter
from rm_gallery.modeling.export import check_rewards, names_statistics, rescore, write_folder
from rm_gallery.modeling.parallel.apply import DTYPES
from rm_gallery.modeling.reward_model import RewardModel
from rm_gallery.modeling.weight_files import kind_of_quantization
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
    adapter = open_adapter(path, key=KEY, base=base)
    if adapter is None:
        raise UserError(f"{KEY}={path}: the folder holds no adapter, so there is nothing to merge")
    source_folder = Path(path).expanduser()
    target = Path(output or source_folder.with_name(f"{source_folder.resolve().name}-merged")).expanduser()
    if target.exists():
        raise UserError(f"{target}: exists; name another folder with --output, or delete it")
    source = load_folder(path, device="cpu", dtype="fp32", base=base, quantized=False)
    model, tokenizer = source.model, source.tokenizer
    assert isinstance(model, RewardModel)  # adapters of other architectures are refused
    state = model.network.state_dict()
    if (bias := state.pop("score.bias", None)) is not None:  # of another trainer: no layer of the library has it
        log.warning("%s: the bias of the reward head, %.6g, is dropped: rewards differ by it", path, bias.item())
    texts = [tokenizer(text)["input_ids"] for text in PROBES]
    expected = rescore(source_folder, texts, base=base, quantized=False)
    if adapter.quantization is not None:
        trained = rescore(source_folder, texts, base=base)
        log.warning(
            "%s: trained on a quantized base model (%s), and merged into the one that is not quantized: rewards of %d "
            "texts differ by up to %.3g from those of training",
            path, kind_of_quantization(adapter.quantization), len(texts),
            max(abs(ours - theirs) for ours, theirs in zip(expected, trained, strict=True)),
        )  # fmt: skip
    staging = target.with_name(f".{target.name}.merging")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        meta = {name: value.to("meta") for name, value in state.items()}
        hashes = write_folder(
            staging, model, meta, tokenizer, DTYPES[dtype], source.record, read=state.__getitem__,
            normalize=names_statistics(source_folder),
        )  # fmt: skip
        check_rewards(staging, texts, expected, exact=dtype == "fp32")
        write_manifest(staging, hashes)
        replace(staging, target)
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({one_line(error)})") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target
