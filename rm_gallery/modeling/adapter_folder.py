"""A folder with an adapter (LoRA) and its reward head: finds both, whatever trainer wrote them, and loads them.

The adapter of a language model has no head, and the task type `CAUSAL_LM`.

Names of the tensors. peft writes `base_model.model.` + the name in the network. A state dict that another tool saved
also has `modules_to_save.default` in the name of the head and `default` in those of LoRA. LLaMA-Factory writes the head
as `v_head.summary` into value_head.safetensors.

Nothing here imports peft until an adapter is loaded.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from rm_gallery.errors import UserError, one_line
from rm_gallery.modeling.adapters import (
    BASE_RECORD,
    Adapter,
    add_layers,
    same_weights,
    short_name,
    stored_name,
    weights_fingerprint,
)
from rm_gallery.modeling.config import LoraConfig, PackingSetting
from rm_gallery.modeling.generic_class import forget_code, register
from rm_gallery.modeling.heads import HEADS, OTHER_HEADS, RewardHead, adapter_heads, is_of_language_model, one_output
from rm_gallery.modeling.language_model import load_language_model
from rm_gallery.modeling.lora_layers import import_peft, merge_layers, quiet
from rm_gallery.modeling.model_folder import check_values
from rm_gallery.modeling.quantization import QuantizeOptions, check_package
from rm_gallery.modeling.reward_model import LoadedModel, load_reward_model
from rm_gallery.modeling.text_part import plain_renames, text_part
from rm_gallery.modeling.weight_files import (
    AdapterFiles,
    StoredTensor,
    kind_of_quantization,
    list_names,
    read_adapter_files,
)

log = logging.getLogger(__name__)

_HINT = "name the folder of the base model with base= (--base)"
BASE_HINT = "name the folder of the base model with model.lora.base"
"""For training; see `open_adapter`."""
_UNKNOWN_SETTINGS = (
    "trainable_token_indices", "layer_replication", "lora_bias", "target_parameters", "megatron_config", "use_qalora",
    "alora_invocation_tokens", "arrow_config", "use_bdlora", "velora_config", "monteclora_config", "kasa_config",
)  # fmt: skip
"""Settings of peft that train more than the matrices, or something else."""


@dataclass(frozen=True)
class AdapterFolder:
    """A folder with an adapter of a sequence classification model and its head, or of a language model."""

    path: str
    key: str
    """Configuration key of `path`, for messages."""
    base: str
    """Folder or hub name of the base model."""
    names_base: bool
    """Whether the caller named the base model, instead of adapter_config.json."""
    config: Mapping[str, Any]
    """adapter_config.json."""
    tensors: Mapping[str, StoredTensor]
    """By their names in the network, LoRA's without the adapter's name; the head under the library's name."""
    head: RewardHead | None
    """None if a new head is to be trained, and for a language model."""
    hint: str
    """What to do about the base model, in messages."""
    model_config: Mapping[str, Any]
    """config.json of the folder, or {}."""
    quantization: Mapping[str, Any] | None
    """See `AdapterFiles.quantization`."""
    attributes: Sequence[str] = ()
    """Names of the outputs of the head; () for one reward."""
    language_model: bool = False
    """Whether the base model is loaded as a language model."""

    @property
    def what(self) -> str:
        """The folder, in messages."""
        return f"{self.key}={self.path}"

    def load_merged(self) -> LoadedModel:
        """The base model with the adapter merged into its weights, in float32 on the CPU.

        The state of the random number generator does not change. Raises UserError for a base model that cannot be
        loaded or that does not fit the adapter.
        """
        with torch.random.fork_rng(devices=[]):
            loaded = self._load_base()
            self._add_to(loaded)
        network = loaded.model.network
        merge_layers(network)
        check_values(network.named_parameters(), self.what, but=HEADS)
        network.requires_grad_(True)
        return self._with_head(loaded)

    def load_quantized(self, dtype: torch.dtype, device: torch.device) -> LoadedModel:
        """The quantized base model with the adapter, which is not merged; see `load_merged`."""
        options = QuantizeOptions(kind_of_quantization(self.quantization), dtype, device, self.what)
        with torch.random.fork_rng(devices=[]):
            loaded = self._load_base()
            self._add_to(loaded, quantization=options)
        return self._with_head(loaded)

    def load_for_training(
        self, config: LoraConfig, *, dropout: float, packing: PackingSetting,
        quantization: QuantizeOptions | None = None,
    ) -> tuple[LoadedModel, Adapter]:  # fmt: skip
        """The base model with the adapter, to train it further; see `load_merged`.

        A new head is initialized, from torch's random number generator, if the folder was opened without one.
        """
        for name in _UNKNOWN_SETTINGS:
            if self.config.get(name):
                raise UserError(f"{self.what}: adapters with {name} cannot be trained further; merge it first")
        if self.config.get("bias", "none") != "none":
            raise UserError(f"{self.what}: its biases are trained (bias={self.config['bias']}); merge it first")
        initial = self.config.get("init_lora_weights", True)
        if initial not in (True, False, "gaussian", "orthogonal"):
            raise UserError(
                f"{self.what}: init_lora_weights={initial} changes the weights of the base model; merge it first"
            )
        has_head = self.head is not None
        with torch.random.fork_rng(devices=[], enabled=has_head):
            loaded = self._load_base(dropout=dropout, packing=packing)
        with torch.random.fork_rng(devices=[]):
            adapter = self._add_to(loaded, lora_dropout=config.dropout, quantization=quantization)
        log.info(
            "LoRA: continues the adapter of %s (rank %d, alpha %g%s%s) on %s",
            self.path, config.rank, config.alpha, ", DoRA" * config.use_dora, ", rsLoRA" * config.use_rslora, self.base,
        )  # fmt: skip
        return self._with_head(loaded), adapter

    def _with_head(self, loaded: LoadedModel) -> LoadedModel:
        if self.head is None:
            return loaded
        name = next(name for name, each in self.tensors.items() if each == self.head.weight)
        is_own = short_name(self.head.weight.name) == name
        return replace(
            loaded, head_name=name if is_own else self.head.weight.name, head_bias=self.head.read_bias(), new_parts=()
        )

    def load_plain(self, *, quantized: bool = True) -> Any:
        """The model as transformers and peft alone load it, in float32; the adapter is not merged.

        quantized: quantize the base model as in training, if it was.

        A constant that the head adds to each reward is dropped. Tensors that are not stored under peft's names are
        passed to peft under these.
        """
        from transformers import (
            AutoConfig,
            AutoModelForCausalLM,
            AutoModelForSequenceClassification,
            BitsAndBytesConfig,
        )

        peft = import_peft(self.what)
        folder, base = Path(self.path).expanduser(), os.path.expanduser(self.base)
        more: dict[str, Any] = {}
        if quantized and self.quantization:
            check_package(self.what)
            more = {"quantization_config": BitsAndBytesConfig(**self.quantization), "device_map": {"": "cpu"}}
        with torch.random.fork_rng(devices=[]), quiet():
            config = text_part(AutoConfig.from_pretrained(folder if (folder / "config.json").is_file() else base))
            if not self.language_model:
                forget_code(config)
                register(config)
                config.num_labels = 1 if self.head is None else self.head.weight.shape[0]
                if config.pad_token_id is None:  # of another trainer, whose folder has no config.json
                    config.pad_token_id = 0
            library = AutoModelForCausalLM if self.language_model else AutoModelForSequenceClassification
            network = library.from_pretrained(
                base, config=config, dtype=torch.float32, ignore_mismatched_sizes=not self.language_model,
                key_mapping=plain_renames(base, key="base"), **more,
            )  # fmt: skip
            for module in network.modules():
                if hasattr(module, "support_avx512bf16_for_cpu"):
                    module.support_avx512bf16_for_cpu = False  # it would compute in bfloat16
            if self.language_model and not more:
                self._check_base(network)
            is_usual = all(each.name == stored_name(name) for name, each in self.tensors.items())
            if is_usual and self.config.get("task_type") == ("CAUSAL_LM" if self.language_model else "SEQ_CLS"):
                return peft.PeftModel.from_pretrained(network, folder).eval()
            settings = peft.LoraConfig.from_pretrained(folder)
            kind = peft.PeftModelForCausalLM if self.language_model else peft.PeftModelForSequenceClassification
            adapted = kind(network, settings)
            values = {stored_name(name): _read(each) for name, each in self.tensors.items()}
            peft.set_peft_model_state_dict(adapted, values)
            return adapted.eval()

    def _load_base(self, **options: Any) -> LoadedModel:
        if self.language_model:
            loaded = load_language_model(self.base, key="base", **options)
        else:
            loaded = load_reward_model(self.base, key="base", new_head=True, attributes=self.attributes, **options)
        self._check_base(loaded.model.network)
        return loaded

    def _check_base(self, network: Any) -> None:
        """Raise UserError if the base model's weights are not those of training; a warning if the caller named it."""
        recorded = self.model_config.get(BASE_RECORD)
        found = None if recorded is None else weights_fingerprint(network, language_model=self.language_model)
        if recorded is None or found is None or same_weights(recorded, found):
            return
        problem = (
            f"{self.what}: the adapter was trained on other weights than those of {self.base}, which has the same "
            f"shapes (another version, or trained further), so {'losses' if self.language_model else 'rewards'} differ "
            "from those of training"
        )
        if not self.names_base:
            raise UserError(f"{problem}; restore the base model, or {self.hint} to use it anyway")
        log.warning("%s", problem)

    def _add_to(
        self, loaded: LoadedModel, *, lora_dropout: float = 0.0, quantization: QuantizeOptions | None = None
    ) -> Adapter:
        """Add the layers of LoRA to the base model, and copy the adapter's values into them and into the head."""
        network = loaded.model.network
        peft = import_peft(self.what)
        try:
            with quiet():
                settings = peft.LoraConfig.from_pretrained(Path(self.path).expanduser())
                settings.lora_dropout = lora_dropout
                adapter = add_layers(
                    loaded.model, settings, self.base, also_trained=settings.modules_to_save or (),
                    quantization=quantization,
                )  # fmt: skip
        except UserError as error:
            raise UserError(f"{self.what}: {error}") from error
        except (ValueError, TypeError, KeyError, RuntimeError, AttributeError) as error:
            raise self._no_fit([one_line(error)]) from error
        if self.language_model and hasattr(network.get_output_embeddings(), "lora_A"):
            raise UserError(
                f"{self.what}: LoRA on the output layer of a language model is not read; merge it with peft"
            )
        places = {short_name(name) or "": each for name, each in network.named_parameters() if each.requires_grad}
        heads = {name for name in places if name.startswith(HEADS)} if self.head is None else set()
        tensors = {name: each for name, each in self.tensors.items() if name not in heads}
        new = {name for name in loaded.new_parts if name not in heads}
        wrong = [
            *(f"{name} is missing" for name in places if name not in tensors and (".lora_" in name or name in new)),
            *(f"{name} is missing, also in the base model" for name in new if name not in places),
            *(f"{name} has no counterpart" for name in tensors if name not in places),
            *(
                f"{name} has shape {list(each.shape)}, but {list(places[name].shape)} by adapter_config.json"
                for name, each in tensors.items()
                if name in places and tuple(places[name].shape) != each.shape
            ),
        ]
        if self.head is not None and not any(name.startswith(HEADS) and name in tensors for name in places):
            wrong.insert(0, f"the reward head {self.head.weight.name} has no counterpart")
        if wrong:
            raise self._no_fit(wrong)
        with torch.no_grad():
            for name, each in tensors.items():
                places[name].copy_(_read(each))
        check_values(
            ((name, places[name]) for name in tensors),
            self.what,
            but=[name for name in tensors if name.startswith(HEADS) or ".lora_B" in name],
        )
        return adapter

    def _no_fit(self, reasons: list[str]) -> UserError:
        return UserError(f"{self.what}: does not fit its base model {self.base} ({list_names(reasons)})")


def _read(tensor: StoredTensor) -> Tensor:
    with safe_open(tensor.file, framework="pt") as source:
        found: Tensor = source.get_tensor(tensor.name)
        return found


def open_adapter(
    path: str, *, key: str, base: str | None = None, new_head: bool = False, hint: str = _HINT,
    attributes: Sequence[str] = (), language_model: bool = False,
) -> AdapterFolder | None:  # fmt: skip
    """The adapter of a folder; None for a folder without one.

    base: the base model, instead of that of adapter_config.json. new_head: a head is trained, with one output per name
    of `attributes`, and one in the folder is ignored. language_model: the base model is to be a language model, and a
    reward head in the folder is an error. hint: what to do about a base model that is not found. Raises UserError for
    an adapter that is no LoRA, has no reward head or other labels, is a pickle, or whose base model is not known.
    """
    files = read_adapter_files(path, key=key)
    if files is None:
        if base:
            raise UserError(f"{key}={path}: base={base} is for adapters, and this folder holds none; remove it")
        return None
    what = f"{key}={path}: the folder holds an adapter"
    kind = str(files.config.get("peft_type") or "unknown")
    if kind != "LORA":
        raise UserError(f"{what} of type {kind}, which is not read; merge it into its base model first")
    if not new_head:
        attributes = tuple((files.model_config.get("rm_gallery") or {}).get("attributes") or ())
    if language_model:
        tensors, head = _of_language_model(files, what), None
    else:
        tensors, head = _sort(files, what, new_head=new_head, num_outputs=max(1, len(attributes)))
    found = base or files.base
    is_local = found.startswith((".", "/", "~")) or found.count("/") > 1
    if not found or (is_local and not Path(found).expanduser().is_dir()):
        why = f"its base model {found} does not exist here" if found else "adapter_config.json names no base model"
        raise UserError(f"{what}, and {why}; {hint}")
    return AdapterFolder(
        path,
        key,
        found,
        bool(base),
        files.config,
        tensors,
        head,
        hint,
        files.model_config,
        files.quantization,
        attributes,
        language_model,
    )


def _of_language_model(files: AdapterFiles, what: str) -> dict[str, StoredTensor]:
    """The tensors by their names in the network."""
    if heads := adapter_heads(files):
        raise UserError(
            f"{what} of a reward model ({short_name(heads[0]) or heads[0]}), and a language model is needed; take a "
            "base model, or from an adapter of one"
        )
    return {name: each for stored, each in files.tensors.items() if (name := short_name(stored)) is not None}


def _sort(
    files: AdapterFiles, what: str, *, new_head: bool, num_outputs: int
) -> tuple[dict[str, StoredTensor], RewardHead | None]:
    """The tensors by their names in the network, and the reward head among them, under the library's name."""
    tensors = {name: each for stored, each in files.tensors.items() if (name := short_name(stored)) is not None}
    if with_lora := [name for name in tensors if name.startswith(HEADS) and ".lora_" in name]:
        raise UserError(f"{what} with LoRA in its reward head ({with_lora[0]}), which is not read; merge it first")
    roots = {name.partition(".")[0] for name in tensors if ".lora_" in name}
    outside = {name: each for name, each in tensors.items() if name.partition(".")[0] not in roots}
    unread = [name for name in outside if name.partition(".")[0] in ("lm_head", "cls", "predictions")]
    if unread:
        log.warning("%s: not read, since it predicts tokens: %s", what, list_names(unread))
    own = {name: each for name, each in outside.items() if name.startswith(HEADS)}
    others = {name: each for name, each in outside.items() if name.partition(".")[0] in OTHER_HEADS}
    others |= files.head_file
    tensors = {name: each for name, each in tensors.items() if name not in unread and name not in others}
    if new_head:
        return {name: each for name, each in tensors.items() if name not in own}, None
    if own and others:
        raise UserError(f"{what} with two reward heads, {list_names(own)} and {list_names(others)}; delete one of them")
    if (adopted := one_output(others)) is not None:
        return tensors | {"score.weight": adopted.weight}, adopted
    weights = [each for name, each in own.items() if name.endswith(".weight") and len(each.shape) == 2]
    if not weights:
        found = f"{len(tensors)} tensors" + (f", {list_names(others)}" if others else "")
        of_language = "; rm-gallery merge makes a language model of it, from which a reward model starts"
        pickle = "".join(f"; {name} is a pickle, which can execute code and is not read" for name in files.other_files)
        raise UserError(
            f"{what} without a reward head (task type {files.config.get('task_type') or 'unknown'}, {found}{pickle}); "
            "the head is missing: save it with the adapter (peft: task_type SEQ_CLS, modules_to_save), or merge it "
            "into a reward model" + of_language * is_of_language_model(files)
        )
    if weights[-1].shape[0] != num_outputs:
        raise UserError(f"{what} of a classifier with {weights[-1].shape[0]} labels, but a reward model has one")
    return tensors, RewardHead(weights[-1])
