"""The model that a run starts from, in one of two forms.

- Whole, in float32 on the CPU: for one process and for DDP.
- Without weights, on the meta device: for FSDP2, where each rank then reads only its shards from the files.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from rm_gallery.distributed.collectives import all_gather
from rm_gallery.distributed.process_group import World
from rm_gallery.errors import UserError
from rm_gallery.modeling.adapter_folder import BASE_HINT, AdapterFolder, open_adapter
from rm_gallery.modeling.adapters import Adapter, add_lora, check_targets
from rm_gallery.modeling.config import LoraConfig
from rm_gallery.modeling.export import missing_embedding_rows, set_pad_token
from rm_gallery.modeling.freezing import count_trained, freeze
from rm_gallery.modeling.generic_class import CODE_FILE, is_generic
from rm_gallery.modeling.head_init import init_head
from rm_gallery.modeling.language_model import LanguageModel, load_language_model
from rm_gallery.modeling.meta_init import MetaInitError, WeightFiles, init_language_model_on_meta, init_on_meta
from rm_gallery.modeling.model_folder import quiet_transformers
from rm_gallery.modeling.packing import Way
from rm_gallery.modeling.parallel.apply import DTYPES, resolve_strategy
from rm_gallery.modeling.parallel.strategy import Strategy
from rm_gallery.modeling.quantization import QuantizeOptions, num_parameters, quantized_share
from rm_gallery.modeling.reward_model import LoadedModel, RewardModel, load_reward_model
from rm_gallery.training.config import TrainConfig
from rm_gallery.training.optimizers import is_layer_matrix

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StartModel:
    """The arguments of `modeling.parallel.apply`."""

    model: RewardModel
    strategy: Strategy
    files: WeightFiles | None
    """The weights of a model on the meta device; None if the model holds its weights."""
    num_parameters: int
    """Of the whole model, over all shards."""
    num_trained: int
    """Of the trained parameters; all without LoRA and `model.freeze`."""
    renames: Mapping[str, str] = field(default_factory=dict)
    """See `LoadedModel`."""
    adapter: Adapter | None = None
    """What the adapter's folder says, with LoRA."""


def check_parts(config: TrainConfig, source: Any, way: Way, *, adds_lora: bool) -> None:
    """Raise UserError for `model.freeze` and layers of LoRA that the model, built without weights, does not have.

    source: the model's configuration. adds_lora: LoRA is added, rather than read from a folder.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    model = config.model
    adds_lora = adds_lora and bool(model.lora.rank)
    if not adds_lora and not isinstance(model.freeze, int):
        return
    kind, library = RewardModel, AutoModelForSequenceClassification
    if config.objective.name == "sft":
        kind, library = LanguageModel, AutoModelForCausalLM
    try:
        with torch.device("meta"), quiet_transformers():
            network = library.from_config(source, trust_remote_code=model.trust_remote_code)
    except Exception as error:  # some types cannot be built so; training checks them when their weights are read
        log.debug("%s is not built without weights: %s", model.partial_pretrain, error)
        return
    if adds_lora:
        check_targets(kind(network, way), model.lora)
    freeze(network, model.freeze)


def start_model(config: TrainConfig, tokenizer: Any, world: World) -> StartModel:
    """Load the model, choose the strategy, and set a pad token that is not EOS.

    Collective. Under FSDP2 every rank reads only its shards, unless the library has to load the folder itself; the log
    gives the reason then. Raises UserError for a folder that cannot be loaded.
    """
    reason, files, lora = "", None, config.model.lora
    is_language_model = config.objective.name == "sft"
    if not lora.rank and lora != LoraConfig():
        log.warning("model.lora has no effect with model.lora.rank=0: all parameters are trained")
    folder = find_adapter(config)
    adapter = None
    if lora.rank:
        reason = "LoRA is added to the loaded model"
    elif world.world_size > 1 or (world.device.type == "cuda" and config.model.fsdp_config.offloads_weights):
        try:
            loaded, files = _load_on_meta(config, tokenizer)
        except MetaInitError as error:
            reason = str(error)
    if files is None:
        loaded, adapter = _load(config, tokenizer, world, folder)
    freeze(loaded.model.network, config.model.freeze)
    count = num_parameters(loaded.model)
    trained = count_trained(loaded.model.parameters())
    # Quantized layers are replicated: FSDP2 shards no integers (`model_problems` refuses fsdp2).
    model = config.model if config.model.quantization is None else replace(config.model, strategy="ddp")
    named = [(name, each) for name, each in loaded.model.named_parameters() if each.requires_grad]
    matrices = [each.numel() for name, each in named if is_layer_matrix(name, each)]
    strategy = resolve_strategy(
        model, world, count, trained, optimizer=config.optim.name, num_matrix=sum(matrices),
        has_ema=config.trainer.ema_decay is not None,
    )  # fmt: skip
    if adapter is not None and config.model.quantization is not None:
        _check_equal_bases(adapter, loaded, config)
    if strategy != "fsdp2" and files is not None:  # not sharded: this process needs all weights
        (loaded, _), files = _load(config, tokenizer, world), None
        freeze(loaded.model.network, config.model.freeze)
    elif strategy == "fsdp2" and files is None:
        log.warning("every rank reads the whole model before sharding, since %s", reason)
    if config.model.trust_remote_code:
        log.warning("model.trust_remote_code=true: Python code of the model folder may run")
    log.info("model.packing=%s: %s", config.model.packing, loaded.model.way)
    if loaded.wrapper:
        log.info(
            "%s: %s wraps several models; its text model is trained, and checkpoints are of the type %s",
            _what(config), loaded.wrapper, loaded.model.network.config.model_type,
        )  # fmt: skip
    if is_generic(loaded.model.network):
        log.warning(
            "%s: transformers has no sequence classification class for this type, so checkpoints have %s, and plain "
            "transformers loads them with trust_remote_code=True",
            loaded.model.network.config.model_type, CODE_FILE,
        )  # fmt: skip
    if is_language_model:
        log.info("output layer: %s", "the embedding (tied)" if _is_tied(loaded.model.network) else "its own weights")
    else:
        _log_head(config, loaded)
    return StartModel(loaded.model, strategy, files, count, trained, loaded.renames, adapter)


def _check_equal_bases(adapter: Adapter, loaded: LoadedModel, config: TrainConfig) -> None:
    """Log the quantized share; raises UserError if ranks have other base models: rank 0 sends no quantized weights."""
    if len(set(all_gather(adapter.base_fingerprint))) > 1:
        raise UserError(f"{_what(config)}: the weights differ between machines; copy the same folder to all of them")
    log.info(
        "model.quantization=%s: %.1f%% of the parameters are quantized; embeddings, norms and head are not",
        config.model.quantization, 100 * quantized_share(loaded.model.network),
    )  # fmt: skip


def _log_head(config: TrainConfig, loaded: LoadedModel) -> None:
    path = config.model.partial_pretrain
    if not loaded.has_own_head:
        replaced = ", which replaces that of the folder if there is one (model.new_head=true)"
        log.info(
            "reward head: newly initialized with trainer.seed=%d%s%s",
            config.trainer.seed, replaced if config.model.new_head else "",
            f"; model.head_init={config.model.head_init}" if config.model.head_init != "normal" else "",
        )  # fmt: skip
    elif hasattr(loaded.model.network, loaded.head_name.partition(".")[0]):
        log.info("reward head: loaded from %s", path)
    else:
        log.info("reward head: loaded from %s of %s; checkpoints have it as score.weight", loaded.head_name, path)
    if loaded.head_bias:
        log.warning(
            "reward head: its bias of %.6g is dropped, since checkpoints have none: rewards start %.6g %s than those "
            "of %s; differences between rewards, and the loss, do not change",
            loaded.head_bias, abs(loaded.head_bias), "lower" if loaded.head_bias > 0 else "higher", path,
        )  # fmt: skip


def find_adapter(config: TrainConfig) -> AdapterFolder | None:
    """The adapter that the run continues; None for other models. Raises UserError as `open_adapter` does."""
    model = config.model
    folder = open_adapter(
        model.partial_pretrain, key="model.partial_pretrain", base=model.lora.base, new_head=model.new_head,
        hint=BASE_HINT, attributes=model.outputs, language_model=config.objective.name == "sft",
    )  # fmt: skip
    if folder is not None and list(folder.attributes) != model.outputs:
        raise UserError(
            f"{_what(config)}: an adapter with the outputs {', '.join(folder.attributes) or 'reward'}, but "
            f"{_outputs_key(config)}; name those of the folder, or set model.new_head=true"
        )
    return folder


def _load(
    config: TrainConfig, tokenizer: Any, world: World, folder: AdapterFolder | None = None
) -> tuple[LoadedModel, Adapter | None]:
    """The model with a pad token, and with LoRA if it is configured; folder: the adapter to continue."""
    model, adapter, quantization = config.model, None, None
    if model.quantization is not None:
        dtype, what = DTYPES[model.fsdp_config.model_dtype], f"model.quantization={model.quantization}"
        quantization = QuantizeOptions(model.quantization, dtype, world.device, what)
    if folder is not None:
        loaded, adapter = folder.load_for_training(
            model.lora, dropout=model.dropout, packing=model.packing, quantization=quantization
        )
    elif config.objective.name == "sft":
        loaded = load_language_model(
            model.partial_pretrain, trust_remote_code=model.trust_remote_code, dropout=model.dropout,
            packing=model.packing,
        )  # fmt: skip
    else:
        loaded = load_reward_model(
            model.partial_pretrain,
            trust_remote_code=model.trust_remote_code,
            dropout=model.dropout,
            new_head=model.new_head,
            packing=model.packing,
            attributes=model.outputs,
        )
    if config.objective.name == "sft":
        _fit_vocabulary(loaded.model.network, tokenizer, what=_what(config), resize=model.resize_embeddings)
    else:
        _fit_head(config, loaded, tokenizer, path=model.partial_pretrain if folder is None else folder.base)
    if model.lora.rank and adapter is None:
        adapter = add_lora(loaded.model, model.lora, model.partial_pretrain, quantization=quantization)
    return loaded, adapter


def _fit_head(config: TrainConfig, loaded: LoadedModel, tokenizer: Any, *, path: str) -> None:
    """Initialize the reward head, and set a pad token. path: folder of the base model."""
    model = config.model
    if model.lora.rank and missing_embedding_rows(loaded.model, tokenizer, what=_what(config)):
        raise UserError(
            f"{_what(config)}: the tokenizer has no pad token that differs from EOS and has a row of the embedding, "
            "and an adapter (model.lora.rank) adds no row; use a folder with such a token, or model.lora.rank=0"
        )
    init_head(loaded, model.head_init, model.head_init_words, tokenizer, path=path)
    set_pad_token(loaded.model, tokenizer, what=_what(config), resize=model.resize_embeddings)


def _fit_vocabulary(network: Any, tokenizer: Any, *, what: str, resize: bool) -> None:
    """Add embedding rows for the tokens of the tokenizer that have none; without `resize` raise UserError for them.

    On the meta device raise MetaInitError instead of adding rows.
    """
    rows, most = network.get_input_embeddings().num_embeddings, max(tokenizer.get_vocab().values()) + 1
    if most <= rows:
        return
    if not resize:
        raise UserError(
            f"{what}: the embedding has {rows} rows, but the tokenizer has tokens up to id {most - 1}; use the model's "
            "own tokenizer, or set model.resize_embeddings=true to train new rows"
        )
    if network.device.type == "meta":
        raise MetaInitError("its embeddings are resized for the tokenizer")
    network.resize_token_embeddings(most)
    log.info("embeddings: resized from %d to %d rows for the tokenizer", rows, most)


def _is_tied(network: Any) -> bool:
    """Whether the output layer of a language model is its embedding."""
    return network.get_output_embeddings().weight is network.get_input_embeddings().weight


def _load_on_meta(config: TrainConfig, tokenizer: Any) -> tuple[LoadedModel, WeightFiles]:
    """The same on the meta device, and the files with its weights; raises MetaInitError if that is not possible."""
    model = config.model
    if config.objective.name == "sft":
        loaded, files = init_language_model_on_meta(
            model.partial_pretrain, trust_remote_code=model.trust_remote_code, dropout=model.dropout,
            packing=model.packing,
        )  # fmt: skip
        _fit_vocabulary(loaded.model.network, tokenizer, what=_what(config), resize=model.resize_embeddings)
        return loaded, files
    with torch.random.fork_rng(devices=[]):  # `_load` may follow, and must draw the same head
        loaded, files = init_on_meta(
            model.partial_pretrain,
            seed=config.trainer.seed,
            trust_remote_code=model.trust_remote_code,
            dropout=model.dropout,
            new_head=model.new_head,
            packing=model.packing,
            attributes=model.outputs,
        )
    if missing_embedding_rows(loaded.model, tokenizer, what=_what(config), resize=model.resize_embeddings):
        raise MetaInitError("its embeddings are resized for the tokenizer")
    init_head(loaded, model.head_init, model.head_init_words, tokenizer, path=model.partial_pretrain, new=files.new)
    set_pad_token(loaded.model, tokenizer)
    return loaded, files


def _outputs_key(config: TrainConfig) -> str:
    heads = config.model.heads
    return f"model.heads={heads}" if heads > 1 else f"model.attributes={config.model.attributes}"


def _what(config: TrainConfig) -> str:
    return f"model.partial_pretrain={config.model.partial_pretrain}"
