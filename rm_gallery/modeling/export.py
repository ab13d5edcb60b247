"""Export: writes a reward model as a Hugging Face sequence-classification folder that transformers and vLLM load.

Two settings in `config.json` decide about correct rewards elsewhere. `problem_type` is `regression`: for any other
value transformers' pipeline and vLLM apply a sigmoid. The pad token is not EOS: the padded forward pass reads the
reward at the last token that is not a pad token, so with EOS as pad token it would read one token early.

Safetensors files are written and verified one shard at a time, so host memory holds at most one shard (5 GB, or one
larger tensor).
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rm_gallery.data.tokenization.tokenizer import read_at
from rm_gallery.errors import UserError
from rm_gallery.files import sha256, sha256_files
from rm_gallery.modeling.adapter_folder import open_adapter
from rm_gallery.modeling.adapters import Adapter, stored_name
from rm_gallery.modeling.architectures import closing_token
from rm_gallery.modeling.generic_class import CODE_FILE, auto_map, code_of, is_generic
from rm_gallery.modeling.legacy_keys import add_config_keys, rename_tokenizer_keys
from rm_gallery.modeling.model_folder import quiet_transformers
from rm_gallery.modeling.reward_model import RewardModel
from rm_gallery.modeling.stored_layout import as_stored
from rm_gallery.modeling.weight_files import (
    ADAPTER_WEIGHTS,
    read_adapter_files,
    read_weight_folder,
)
from rm_gallery.schema import InputStyle

log = logging.getLogger(__name__)

RECORD_KEY = "rm_gallery"
_PAD_CANDIDATES = ("<|pad|>", "<pad>", "[PAD]", "<|finetune_right_pad_id|>", "<|endoftext|>", "<unk>")


@dataclass(frozen=True)
class InputRecord:
    """How training built the model's input; saved in `config.json`, so that scoring builds the same input."""

    input_style: InputStyle
    append_eos: bool = False
    max_length: int = 4096
    """In tokens."""
    separator: str = "\n\n"
    """Style `text`: string between prompt and response. "" if training had a prompt column, which is concatenated
    directly; a blank line if training had no prompts."""
    text_special_tokens: Literal["parse", "plain"] = "parse"
    """Style `text`: whether special tokens written out in a text are parsed or tokenized as plain text."""
    reward_mean: float | None = None
    """Of the distinct responses of the validation set, with these weights; None if they were not measured."""
    reward_std: float | None = None
    """The same: their standard deviation."""
    attributes: Sequence[str] = ()
    """Names of the outputs of the reward head, if they are attributes of a response; () for one reward."""
    attribute_weights: Sequence[float] = ()
    """Of each attribute in the reward of a response, which is their weighted sum."""
    objective: Mapping[str, Any] = field(default_factory=dict)
    """The objective's name and the values of its parameters, if it has any: e.g. the threshold of ties."""
    own_rendering: bool = False
    """A custom dataset class rendered the conversations, not the folder's chat template: texts that it rendered get the
    rewards of training, message lists do not."""


def set_pad_token(model: RewardModel, tokenizer: Any, *, what: str = "model", resize: bool | None = False) -> None:
    """Give tokenizer and model a pad token that is not EOS.

    Call it before training, because the padded forward pass reads the reward at the last token that is not a pad token.
    what, resize: see `missing_embedding_rows`; the embeddings are resized here. The row of a pad token that has none is
    zero: no reward depends on it.
    """
    embedding = model.network.get_input_embeddings()
    num_rows, missing = embedding.num_embeddings, missing_embedding_rows(model, tokenizer, what=what, resize=resize)
    if missing:
        with torch.random.fork_rng(devices=[], enabled=not resize):
            model.network.resize_token_embeddings(num_rows + missing, mean_resizing=bool(resize))
        with torch.no_grad():
            model.network.get_input_embeddings().weight[tokenizer.pad_token_id :] *= tokenizer.pad_token_id < num_rows
        log.info("embeddings: resized from %d to %d rows for the tokenizer", num_rows, num_rows + missing)
    model.network.config.pad_token_id = tokenizer.pad_token_id
    read_at(tokenizer, closing_token(model.network.config), what=what)


def missing_embedding_rows(
    model: RewardModel, tokenizer: Any, *, what: str = "model", resize: bool | None = False
) -> int:
    """Number of embedding rows to add, after giving the tokenizer a pad token that is not EOS.

    resize: new rows for any token (`model.resize_embeddings`); otherwise for that pad token only, and None if new rows
    cannot be trained, since the model scores. Raises UserError, which begins with `what`, for tokens without a row.
    """
    vocabulary, num_rows = tokenizer.get_vocab(), model.network.get_input_embeddings().num_embeddings
    without = sorted((index, token) for token, index in vocabulary.items() if index >= num_rows)
    if without and not resize:
        hint = "" if resize is None else ", or set model.resize_embeddings=true to train new rows"
        raise UserError(
            f"{what}: the embedding has {num_rows} rows, but the tokenizer has {len(without)} tokens beyond them "
            f"(ids {without[0][0]} to {without[-1][0]}, first: {without[0][1]!r}); use the model's own tokenizer{hint}"
        )
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        known = [token for token in _PAD_CANDIDATES if token in vocabulary and token != tokenizer.eos_token]
        tokenizer.add_special_tokens({"pad_token": known[0] if known else "<|pad|>"})
        log.info(
            "pad token: set to %s (id %d), since it must differ from EOS", tokenizer.pad_token, tokenizer.pad_token_id
        )
    return max(0, max([tokenizer.pad_token_id, *vocabulary.values()]) + 1 - num_rows)


def write_folder(
    folder: Path,
    model: RewardModel,
    tensors: Mapping[str, Tensor],
    tokenizer: Any,
    dtype: torch.dtype,
    record: InputRecord,
    *,
    read: Callable[[str], Tensor],
    adapter: Adapter | None = None,
    normalize: bool = False,
) -> dict[str, str]:
    """Write weights, config and tokenizer from one process, without a manifest; return each file's SHA-256 by its name.

    tensors, dtype, read: see `write_weights`. adapter: with LoRA, whose tensors are written in float32 as peft's
    folder, since they are small. normalize: write the mean and standard deviation of the record, if it has them, under
    the names of other programs as well. Raises OSError as `write_weights`.
    """
    from transformers.dynamic_module_utils import custom_object_save

    network = model.network
    if adapter is None:
        stored, read_stored = as_stored(network, without_tied(network, tensors), read)
        hashes = write_weights(folder, stored, dtype, read=read_stored)
    else:
        hashes = write_adapter(folder, adapter, tensors, read=read)
    with quiet_transformers():
        if getattr(network, "_auto_class", None) is not None:  # custom code of the folder (trust_remote_code)
            custom_object_save(network, folder, config=network.config)
        network.config.save_pretrained(folder)
    if is_generic(network):
        (folder / CODE_FILE).write_text(code_of(network), encoding="utf-8")
    _finish_config(folder / "config.json", model, dtype, record, adapter, normalize=normalize)
    _save_tokenizer(folder, tokenizer, record)
    apply_umask(folder)
    names = [path.name for path in sorted(folder.iterdir()) if path.is_file() and path.suffix != ".safetensors"]
    return {**hashes, **sha256_files(folder, names)}


def write_adapter(
    folder: Path, adapter: Adapter, tensors: Mapping[str, Tensor], *, read: Callable[[str], Tensor]
) -> dict[str, str]:
    """Write the tensors of an adapter in float32, and adapter_config.json; see `write_weights`."""
    inside = {stored_name(name): name for name in tensors}
    hashes = write_weights(
        folder, {stored: tensors[name] for stored, name in inside.items()}, torch.float32,
        read=lambda stored: read(inside[stored]), name=ADAPTER_WEIGHTS, max_shard_bytes=sys.maxsize,
    )  # fmt: skip
    adapter.write_config(folder)
    return hashes


def without_tied(network: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without those that are another one under a second name: BART's embedding has three."""
    tied = getattr(network, "all_tied_weights_keys", None) or {}
    return {name: each for name, each in tensors.items() if tied.get(name) not in tensors}


MEAN_KEYS, STD_KEYS = ("mean", "logit_mean"), ("std", "logit_sigma")
"""Keys of OpenRLHF's config.json, and of vLLM's pooler configuration: both compute (reward - mean) / std."""


def _finish_config(
    path: Path, model: RewardModel, dtype: torch.dtype, record: InputRecord, adapter: Adapter | None, *, normalize: bool
) -> None:
    """Add what servers need for one raw reward per text, the input record, and the fingerprint of an adapter's base."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config.update(
        architectures=[type(model.network).__name__],
        dtype=str(dtype).removeprefix("torch."),
        id2label={str(place): name for place, name in enumerate(record.attributes or ("reward",))},
        label2id={name: place for place, name in enumerate(record.attributes or ("reward",))},
        problem_type="regression",
        pad_token_id=model.network.config.pad_token_id,
    )
    if is_generic(model.network):
        config["auto_map"] = auto_map(model.network)
    elif not model.network.is_custom_code():
        config.pop("auto_map", None)  # code of the folder that training did not run
    config[RECORD_KEY] = asdict(record)
    for name in (*MEAN_KEYS, *STD_KEYS):
        config.pop(name, None)  # of the model that training started from, whose rewards are others
    if normalize and record.reward_mean is not None:
        config |= dict.fromkeys(MEAN_KEYS, record.reward_mean) | dict.fromkeys(STD_KEYS, record.reward_std)
    if adapter is not None:
        config |= adapter.base_record()
    add_config_keys(config)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def text_template(separator: str, before: str = "", after: str = "") -> str:
    """A chat template that concatenates the contents of the messages, without roles, between two texts."""
    between = f"{{% if not loop.last %}}{{{{ {separator!r} }}}}{{% endif %}}"
    start, end = (f"{{{{ {text!r} }}}}" if text else "" for text in (before, after))
    return f"{start}{{% for message in messages %}}{{{{ message['content'] }}}}{between}{{% endfor %}}{end}"


def _template_of_texts(tokenizer: Any, separator: str) -> str | None:
    """`text_template` with the special tokens that the tokenizer adds, since rendered chats are tokenized without them.

    None for a tokenizer that reads its special tokens in a text differently, such as one that marks the first word.
    """
    probe = "Air scatters light."
    ids, bare = (tokenizer(probe, add_special_tokens=adds)["input_ids"] for adds in (True, False))
    start = next((at for at in range(len(ids) - len(bare) + 1) if ids[at : at + len(bare)] == bare), None)
    if start is None:
        return None
    tokens = tokenizer.convert_ids_to_tokens(ids)
    before, after = "".join(tokens[:start]), "".join(tokens[start + len(bare) :])
    if tokenizer(f"{before}{probe}{after}", add_special_tokens=False)["input_ids"] != ids:
        return None
    return text_template(separator, before, after)


def _save_tokenizer(folder: Path, tokenizer: Any, record: InputRecord) -> None:
    """Save the tokenizer with its chat template in tokenizer_config.json, which older servers need."""
    own = tokenizer.chat_template
    try:
        if own is None and record.input_style == "text":
            # The model was trained on raw text, so a conversation is rendered as raw text.
            tokenizer.chat_template = _template_of_texts(tokenizer, record.separator)
        tokenizer.save_pretrained(folder, save_jinja_files=False)
    finally:
        tokenizer.chat_template = own
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    rename_tokenizer_keys(config)
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def apply_umask(folder: Path) -> None:
    """Set file permissions by the umask: safetensors creates files that only the owner can read."""
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.iterdir():
        if path.is_file():
            path.chmod(0o666 & ~umask)


def read_record(folder: str | Path) -> InputRecord | None:
    """The input record of a folder that we exported; None for any other folder."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        return None
    values = json.loads(path.read_text(encoding="utf-8")).get(RECORD_KEY)
    if not values:
        return None
    record = InputRecord(**values)
    return replace(record, attributes=tuple(record.attributes), attribute_weights=tuple(record.attribute_weights))


def names_statistics(folder: str | Path) -> bool:
    """Whether config.json has mean and standard deviation under the names of other programs."""
    path = Path(folder) / "config.json"
    return path.is_file() and MEAN_KEYS[0] in json.loads(path.read_text(encoding="utf-8"))


def read_statistics(folder: str | Path) -> tuple[float, float] | None:
    """Mean and standard deviation of rewards that config.json has: of our record, else under the names of others.

    Raises UserError for values that cannot normalize a reward.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        return None
    config = json.loads(path.read_text(encoding="utf-8"))
    record = config.get(RECORD_KEY) or {}
    places = [
        (record, "reward_mean", "reward_std"),
        *((config, *keys) for keys in zip(MEAN_KEYS, STD_KEYS, strict=True)),
    ]
    for values, mean, std in places:
        found = values.get(mean), values.get(std)
        if None in found:
            continue
        if not all(isinstance(each, int | float) and math.isfinite(each) for each in found) or found[1] <= 0:
            raise UserError(f"{path}: {mean}={found[0]} and {std}={found[1]} cannot normalize rewards; remove them")
        return float(found[0]), float(found[1])
    return None


@torch.no_grad()
def rescore(
    folder: Path, texts: Sequence[Sequence[int]], *, base: str | None = None, quantized: bool = True
) -> list[float]:
    """Rewards of token sequences by transformers (and peft) alone, in float32 and one padded batch.

    With several outputs, all of them, text by text.

    base: see `open_adapter`. quantized: see `AdapterFolder.load_plain`.
    """
    from transformers import AutoModelForSequenceClassification

    adapter = open_adapter(str(folder), key="model", base=base)
    if adapter is not None:
        network = adapter.load_plain(quantized=quantized)
    else:
        with quiet_transformers():
            network = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    rows = [torch.tensor(ids) for ids in texts]
    input_ids = pad_sequence(rows, batch_first=True, padding_value=network.config.pad_token_id)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return network(input_ids=input_ids, attention_mask=mask).logits.flatten().tolist()


def check_rewards(folder: Path, texts: Sequence[Sequence[int]], expected: Sequence[float], *, exact: bool) -> None:
    """Compare the folder's rewards with the trainer's; raises UserError for the first difference.

    exact: model and folder are float32, so the tolerance is 1e-4 (absolute plus relative); otherwise bfloat16 rounding
    allows 0.1 absolute plus 5%. Skipped with a warning if the float32 model takes more than half of the free memory.
    """
    if not fits_memory(folder):
        return
    absolute, relative = (1e-4, 1e-4) if exact else (0.1, 0.05)
    for number, (found, wanted) in enumerate(zip(rescore(folder, texts), expected, strict=True)):
        if not (abs(found - wanted) <= absolute + relative * abs(wanted) or (math.isnan(found) and math.isnan(wanted))):
            raise UserError(
                f"{folder}: the reloaded model gives text {number} the reward {found:.6f}, the trainer gave "
                f"{wanted:.6f}; do not use this checkpoint, and please report the architecture"
            )


def fits_memory(folder: Path) -> bool:
    """Whether the float32 model takes at most half of the free memory; logs a warning if not."""
    needed, free = _float32_bytes(folder), _free_memory()
    if needed > free / 2:
        log.warning(
            "%s: not rescored: the model takes %.0f GiB in float32, more than half of the %.0f GiB of free memory",
            folder, needed / 2**30, free / 2**30,
        )  # fmt: skip
    return needed <= free / 2


def _float32_bytes(folder: Path) -> int:
    """Bytes of all weights of the folder in float32; of an adapter also those of its base model."""
    adapter = read_adapter_files(str(folder), key="model")
    base = {} if adapter is None else read_weight_folder(adapter.base, key="base").tensors
    total = sum(4 * math.prod(each.shape) for each in base.values())
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                total += 4 * math.prod(tensors.get_slice(name).get_shape())
    return total


def _free_memory() -> float:
    """Bytes of host memory available without swapping; infinite where /proc/meminfo does not exist."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return math.inf
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), math.inf)


_INDEX = "model.safetensors.index.json"
_MAX_SHARD_BYTES = 5_000_000_000


def write_weights(
    folder: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype, *, read: Callable[[str], Tensor],
    name: str = "model.safetensors", max_shard_bytes: int = _MAX_SHARD_BYTES,
) -> dict[str, str]:  # fmt: skip
    """Write the file `name`, or several shards and an index; return the SHA-256 of each shard by its file name.

    tensors: on the meta device, under the names of the transformers model. read: returns the values of one, called once
    per tensor. Floating-point tensors are cast to `dtype`. Each shard is read back and compared with the tensors.
    Raises OSError when a shard cannot be written or is damaged.
    """
    converted = {name: each.to(dtype) if each.is_floating_point() else each for name, each in tensors.items()}
    split = split_torch_state_dict_into_shards(
        converted, max_shard_size=max_shard_bytes, filename_pattern=name.replace(".", "{suffix}.")
    )
    folder.mkdir(parents=True, exist_ok=True)
    hashes = {}
    for file, names in split.filename_to_tensors.items():
        shard = {name: read(name).detach().to("cpu", converted[name].dtype).contiguous() for name in names}
        try:
            hashes[file] = _save_and_compare(folder / file, shard)
        except SafetensorError as error:  # how safetensors reports a full disk
            raise OSError(str(error)) from error
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return hashes


def _save_and_compare(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write a safetensors file, compare it with the tensors in memory, and return its SHA-256.

    Two hashes must be equal: that of the file as read back, and that of the file's header followed by the tensors in
    memory. Raises OSError when they differ.
    """
    save_file(dict(tensors), path, metadata={"format": "pt"})
    found = sha256(path)
    if found != _expected_sha256(path, tensors):
        raise OSError(f"{path}: the file differs from the tensors written to it; check the disk")
    return found


def _expected_sha256(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of a file with the header of `path` and the data of these tensors; "" if the header does not match them.

    Layout of a safetensors file: length of the header (8 bytes, little-endian), header (JSON), tensors without gaps.
    """
    with path.open("rb") as file:
        length = file.read(8)
        text = file.read(int.from_bytes(length, "little"))
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        layout = {name: (entry["data_offsets"], entry["shape"]) for name, entry in header.items()}
        names = sorted(layout, key=lambda name: layout[name][0][0])
    except (ValueError, TypeError, KeyError, IndexError):
        return ""
    digest, position, expected = hashlib.sha256(length + text), 0, {}
    for name in names if layout.keys() == tensors.keys() else ():
        end = position + tensors[name].nbytes
        expected[name] = ([position, end], list(tensors[name].shape))
        digest.update(tensors[name].contiguous().view(-1).view(torch.uint8).numpy().data)
        position = end
    return digest.hexdigest() if layout == expected else ""
