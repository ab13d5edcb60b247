"""Export: a reward model as a Hugging Face sequence-classification folder that every server loads.

What such a folder must hold, and why: transformers' pipeline and vLLM apply a sigmoid unless `problem_type` is
`regression`; the padded forward pass reads the reward one token early when the pad token is the EOS token.

Safetensors files are written and checked one tensor at a time. Weights that are cut over processes are gathered one
tensor after the other, and rank 0 writes them: no device and no host ever holds more than a file's worth beside its own
part.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils.rnn import pad_sequence

from rm_gallery.distributed.collectives import broadcast
from rm_gallery.distributed.process_group import heartbeat, rank
from rm_gallery.errors import UserError
from rm_gallery.files import replace, sha256, sha256_files, write_manifest
from rm_gallery.modeling.reward_model import RewardModel, quiet_transformers
from rm_gallery.schema import InputStyle

log = logging.getLogger(__name__)

RECORD_KEY = "rm_gallery"
_PAD_CANDIDATES = ("<|pad|>", "<pad>", "[PAD]", "<|finetune_right_pad_id|>", "<|endoftext|>", "<unk>")


@dataclass(frozen=True)
class InputRecord:
    """How the model was given its texts in training, kept in `config.json`, so that scoring builds the same input."""

    input_style: InputStyle
    append_eos: bool = False
    max_length: int = 4096
    separator: str = "\n\n"
    """Style `text`: what stands between a prompt and its response. Training joins a prompt column directly, which is
    "" here; without one the model knows no prompts, and a blank line is put between."""
    text_special_tokens: Literal["parse", "plain"] = "parse"
    """Style `text`: whether control tokens that a text spells are read as such."""
    own_rendering: bool = False
    """A class of the user's own rendered conversations otherwise than the chat template of the folder does, so texts
    that it rendered score as in training, and messages do not."""


def settle_pad_token(model: RewardModel, tokenizer: Any) -> None:
    """Give tokenizer and model a pad token that is not EOS; an embedding row is added only if there is no room.

    Called before training, since the padded forward pass of every consumer looks for the last token that is not
    a pad token.
    """
    num_rows = model.network.get_input_embeddings().num_embeddings
    missing = lacking_rows(model, tokenizer)
    if missing:
        model.network.resize_token_embeddings(len(tokenizer))
        log.info("embeddings: %d rows, %d more, for tokens of the tokenizer", num_rows + missing, missing)
    model.network.config.pad_token_id = tokenizer.pad_token_id


def lacking_rows(model: RewardModel, tokenizer: Any) -> int:
    """Rows that the embeddings lack for the tokenizer, once it has a pad token that is not EOS."""
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        vocabulary = tokenizer.get_vocab()
        known = [token for token in _PAD_CANDIDATES if token in vocabulary and token != tokenizer.eos_token]
        tokenizer.add_special_tokens({"pad_token": known[0] if known else "<|pad|>"})
        log.info("pad token: %s (id %d), since it must differ from EOS", tokenizer.pad_token, tokenizer.pad_token_id)
    return max(0, len(tokenizer) - model.network.get_input_embeddings().num_embeddings)


def export_folder(
    folder: Path,
    model: RewardModel,
    state: Mapping[str, Tensor],
    tokenizer: Any,
    dtype: torch.dtype,
    record: InputRecord,
) -> None:
    """Write the folder under a temporary name, check every tensor by its hash, and rename it.

    state: the library model's state dict; floating tensors are written as `dtype`, and those that are cut over
    processes are gathered one at a time. Every process must call it; rank 0 writes.
    Raises OSError, on every process, when the disk is full or a file came out damaged; `folder` does not exist then.
    """
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    if rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)
    problem: OSError | None = None
    try:
        hashes = write_weights(temporary, state, dtype)
        if rank() == 0:
            write_manifest(temporary, {**hashes, **_write_rest(temporary, model, tokenizer, dtype, record)})
            replace(temporary, folder)
    except OSError as error:
        problem = error
    finally:
        if rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
    said = broadcast(str(problem) if problem else "")
    if said:
        raise problem or OSError(said)


def write_folder(
    folder: Path,
    model: RewardModel,
    state: Mapping[str, Tensor],
    tokenizer: Any,
    dtype: torch.dtype,
    record: InputRecord,
    *,
    read: Callable[[str], Tensor],
) -> dict[str, str]:
    """Write the folder from one process, without a manifest; return the SHA-256 of each file by its name.

    state: tensors without values (on the meta device); `read` returns the values of one.
    """
    hashes = write_weights(folder, state, dtype, read=read)
    return {**hashes, **_write_rest(folder, model, tokenizer, dtype, record)}


def _write_rest(
    folder: Path, model: RewardModel, tokenizer: Any, dtype: torch.dtype, record: InputRecord
) -> dict[str, str]:
    """Write all files but the weights; return their hashes."""
    from transformers.dynamic_module_utils import custom_object_save

    network = model.network
    with quiet_transformers():
        if getattr(network, "_auto_class", None) is not None:  # the folder brings its code along, as it came
            custom_object_save(network, folder, config=network.config)
        network.config.save_pretrained(folder)
    _finish_config(folder / "config.json", model, dtype, record)
    _save_tokenizer(folder, tokenizer, record)
    _make_readable(folder)
    names = [path.name for path in sorted(folder.iterdir()) if path.is_file() and path.suffix != ".safetensors"]
    return sha256_files(folder, names)


def _finish_config(path: Path, model: RewardModel, dtype: torch.dtype, record: InputRecord) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    config.update(
        architectures=[type(model.network).__name__],
        dtype=str(dtype).removeprefix("torch."),
        id2label={"0": "LABEL_0"},
        label2id={"LABEL_0": 0},
        problem_type="regression",
        pad_token_id=model.network.config.pad_token_id,
    )
    config[RECORD_KEY] = asdict(record)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def text_template(separator: str) -> str:
    """A chat template that joins the contents of the turns, without names of roles."""
    between = f"{{% if not loop.last %}}{{{{ {separator!r} }}}}{{% endif %}}"
    return f"{{% for message in messages %}}{{{{ message['content'] }}}}{between}{{% endfor %}}"


def _save_tokenizer(folder: Path, tokenizer: Any, record: InputRecord) -> None:
    """The tokenizer with its chat template inside tokenizer_config.json, where every server looks for one."""
    own = tokenizer.chat_template
    try:
        if own is None and record.input_style == "text":
            # A conversation becomes bare text, as the model was trained.
            tokenizer.chat_template = text_template(record.separator)
        tokenizer.save_pretrained(folder, save_jinja_files=False)
    finally:
        tokenizer.chat_template = own
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"  # the same class, by the name that older servers know
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _make_readable(folder: Path) -> None:
    """Give the files the rights that the user's umask says; safetensors writes them for the owner alone."""
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.iterdir():
        if path.is_file():
            path.chmod(0o666 & ~umask)


def read_record(folder: str | Path) -> InputRecord | None:
    """How the model in this folder was trained, or None for a folder that is not ours."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        return None
    values = json.loads(path.read_text(encoding="utf-8")).get(RECORD_KEY)
    return InputRecord(**values) if values else None


@torch.no_grad()
def rescore(folder: Path, texts: Sequence[Sequence[int]]) -> list[float]:
    """Rewards of token sequences as any consumer gets them: plain transformers, float32, one padded batch."""
    from transformers import AutoModelForSequenceClassification

    with quiet_transformers():
        network = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    rows = [torch.tensor(ids) for ids in texts]
    input_ids = pad_sequence(rows, batch_first=True, padding_value=network.config.pad_token_id)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return network(input_ids=input_ids, attention_mask=mask).logits[:, 0].tolist()


def check_rewards(folder: Path, texts: Sequence[Sequence[int]], expected: Sequence[float], *, exact: bool) -> None:
    """Compare the folder's rewards with the trainer's.

    exact: float32 throughout, so 1e-4 of difference is too much; with bfloat16 on either side rounding is larger.
    Left out, with a warning, where the host has no room for the float32 model beside all else.
    Raises UserError that names the first difference.
    """
    needed, free = _float32_bytes(folder), _free_memory()
    if needed > free / 2:
        log.warning(
            "%s: not rescored, since its %.0f GiB in float32 do not fit easily into %.0f GiB of free memory",
            folder, needed / 2**30, free / 2**30,
        )  # fmt: skip
        return
    absolute, relative = (1e-4, 1e-4) if exact else (0.1, 0.05)
    for number, (found, wanted) in enumerate(zip(rescore(folder, texts), expected, strict=True)):
        if abs(found - wanted) > absolute + relative * abs(wanted):
            raise UserError(
                f"{folder}: reloaded, it gives text {number} the reward {found:.6f}, the trainer gave {wanted:.6f}; "
                "the folder cannot be trusted (please report the architecture)"
            )


def _float32_bytes(folder: Path) -> int:
    """Of all weights of the folder."""
    total = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                total += 4 * math.prod(tensors.get_slice(name).get_shape())
    return total


def _free_memory() -> float:
    """Bytes that new memory can take without swapping; no limit where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return math.inf
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), math.inf)


WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_FILE_BYTES = 5_000_000_000  # of one file; a larger tensor is alone


def write_weights(
    folder: Path, state: Mapping[str, Tensor], dtype: torch.dtype, *, file_bytes: int = _FILE_BYTES,
    read: Callable[[str], Tensor] | None = None,
) -> dict[str, str]:  # fmt: skip
    """Make the folder and write `model.safetensors`, or several files and an index; floating tensors as `dtype`.

    read: gives the values of tensors on the meta device, each when its turn comes.
    Every process must call it with the same names, unless no tensor is cut over processes; rank 0 writes. Each file
    is read again and compared with the tensors. Returns the SHA-256 of each file by its name; nothing on other ranks.
    Raises OSError on rank 0, once all tensors were gathered, when they cannot be written or came out damaged.
    """
    files = _plan_files(state, dtype, file_bytes)
    hashes: dict[str, str] = {}
    waiting: dict[str, Tensor] = {}
    problem: Exception | None = None
    for name, tensor in _whole_tensors(state, dtype, read):
        if problem:
            continue  # the others still need this process to gather
        waiting[name] = tensor
        file = files.of[name]
        if len(waiting) == len(files.names[file]):
            try:
                folder.mkdir(parents=True, exist_ok=True)
                hashes[file] = _save_and_compare(folder / file, waiting)
            except (OSError, SafetensorError) as error:  # the second is how the library reports a disk that is full
                problem = error
            waiting = {}
    if problem:
        raise OSError(str(problem)) from problem
    if rank() == 0 and len(files.names) > 1:
        index = {"metadata": {"total_size": files.total_bytes}, "weight_map": files.of}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return hashes


class _Files:
    """Which tensor goes into which file, in the order of the state."""

    def __init__(self, groups: list[list[str]], total_bytes: int) -> None:
        count = len(groups)
        numbered = [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
        self.names = dict(zip(numbered if count > 1 else [WEIGHTS], groups, strict=True))
        self.of = {name: file for file, names in self.names.items() for name in names}
        self.total_bytes = total_bytes


def _plan_files(state: Mapping[str, Tensor], dtype: torch.dtype, file_bytes: int) -> _Files:
    groups: list[list[str]] = [[]]
    size = total = 0
    for name, tensor in state.items():
        item = dtype.itemsize if tensor.is_floating_point() else tensor.dtype.itemsize
        needed = math.prod(tensor.shape) * item
        if groups[-1] and size + needed > file_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += needed
        total += needed
    return _Files(groups, total)


def _whole_tensors(
    state: Mapping[str, Tensor], dtype: torch.dtype, read: Callable[[str], Tensor] | None
) -> Iterator[tuple[str, Tensor]]:
    """Each tensor whole, on the host of rank 0, in the type that is written; the other processes help to gather.

    Gathered in that type too: bfloat16 is half of float32.
    """
    for name, tensor in state.items():
        is_cut = isinstance(tensor, DTensor)
        if rank() and not is_cut:
            continue
        if read is not None and tensor.is_meta:
            tensor = read(name)
        tensor = tensor.detach()
        if tensor.is_floating_point():
            tensor = tensor.to(dtype)
        if is_cut:
            heartbeat(f"gathering {name}")
            assert isinstance(tensor, DTensor)
            tensor = tensor.full_tensor()
        if rank() == 0:
            yield name, tensor.to("cpu").contiguous()


def _save_and_compare(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write a safetensors file, compare it with the tensors in memory, and return its SHA-256.

    The weights are hashed twice in all: the file as it was read back, and the same bytes as they must be, with the
    header of the file followed by the tensors in memory. Raises OSError when the two differ.
    """
    save_file(dict(tensors), path, metadata={"format": "pt"})
    found = sha256(path)
    if found != _expected_sha256(path, tensors):
        raise OSError(f"{path}: the file differs from the tensors written to it; check the disk")
    return found


def _expected_sha256(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of a file with the header of `path` and the contents of these tensors; "" if the header differs.

    A safetensors file is the length of the header (8 bytes), the header (JSON), and the tensors without gaps.
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
