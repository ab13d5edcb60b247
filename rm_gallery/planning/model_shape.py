"""The size of a model from its configuration, counted on the meta device without allocating weights.

Known shapes need no download: the table holds the values of each repository's config.json on the hub.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rm_gallery.errors import UserError, nearest, one_line
from rm_gallery.modeling.architectures import ENCODERS
from rm_gallery.modeling.config import FreezeSetting, LoraConfig, PackingSetting, Quantization
from rm_gallery.modeling.weight_files import check_not_adapter, read_weight_folder

_MAX_LAYERS = 1000  # a configuration with more is a typo; building it would take minutes


@dataclass(frozen=True)
class ModelShape:
    """The size of a reward model. Parameters are counts, not bytes."""

    name: str
    source: str
    """Where the configuration comes from."""
    model_type: str
    padded: bool
    """Encoders are padded; decoders are packed with shared prompts."""
    own_layers: bool
    """Packed through own layers, whose last one computes keys and values only where there is no reward."""
    num_layers: int
    hidden: int
    intermediate: int
    """Width of the MLP. Of a mixture of experts: that of the experts of one token together, shared ones included."""
    experts_per_token: int
    """0 for models without a mixture of experts."""
    num_heads: int
    num_kv_heads: int
    head_dim: int
    windows: tuple[int | None, ...]
    """Sliding window of each layer in tokens; None for full attention."""
    relative_span: int
    """DeBERTa: relative positions in each direction; 0 for other models."""
    max_positions: int | None
    parameters: int
    trained_parameters: int
    """All but those that `model.freeze` names."""
    frozen_layers: int
    """Lowest layers without activations to save, since nothing in or below them is trained."""
    head_parameters: int
    """Parameters of the reward head, which is float32."""
    layer_parameters: int
    """Parameters of the largest layer, which FSDP all-gathers as a unit."""
    matrix_parameters: int
    """Parameters of all linear layers: no embeddings, and no experts, which are joined in one tensor."""
    active_parameters: int
    """Parameters in the matrix products of one token: linear layers, and of the experts those of one token."""
    largest_matrix: int
    """Parameters of the largest tensor in matrix products; the experts of a layer are one or two."""
    largest_embedding: int
    """With LoRA: of the trained ones."""
    adapter_rank: int = 0
    """Rank of LoRA; 0 trains the matrices themselves."""
    adapted_per_layer: int = 0
    """Linear layers with LoRA in a layer."""
    quantized_parameters: int = 0
    quantized_bytes: float = 0.0
    """Of these parameters, with the scales of their blocks or rows."""
    largest_quantized: int = 0
    """Parameters of the largest quantized matrix."""

    @property
    def outer_parameters(self) -> int:
        """Parameters outside the layers: embeddings, final norm, head."""
        return self.parameters - self.num_layers * self.layer_parameters


def load_shape(
    model: str,
    *,
    key: str = "model.partial_pretrain",
    trust_remote_code: bool = False,
    packing: PackingSetting = "auto",
    freeze: FreezeSetting = None,
    lora: LoraConfig | None = None,
    quantization: Quantization = None,
) -> ModelShape:
    """The shape of a folder with config.json, a configuration file, a known shape, or a model of the hub.

    Raises UserError for any other name, and for a model that cannot be trained.
    """
    from rm_gallery.modeling.model_folder import check_model_config
    from rm_gallery.modeling.text_part import text_files, text_part

    source, whole = _find_config(model, key, trust_remote_code)
    files = read_weight_folder(model, key=key) if Path(model).expanduser().is_dir() else None
    if (config := text_part(whole)) is not whole and files is not None and files.tensors:
        files, _ = text_files(config, files, what=f"{key}={model}")
    check_model_config(config, model, key=key, files=files)
    _check_layers(getattr(config, "num_hidden_layers", None), model, key)
    try:
        return measure(
            config, name=model, source=source, packing=packing, what=f"{key}={model}", frozen=freeze, lora=lora,
            quantization=quantization,
        )  # fmt: skip
    except UserError:
        raise
    except Exception as error:  # inconsistent sizes raise various errors in torch and transformers
        raise UserError(f"{key}={model}: no model can be built from this configuration ({one_line(error)})") from error


def _find_config(model: str, key: str, trust_remote_code: bool) -> tuple[str, Any]:
    path = Path(model).expanduser()
    is_path = path.is_absolute() or model.startswith((".", "~")) or model.endswith(".json") or model.count("/") > 1
    file = path / "config.json" if path.is_dir() else path
    check_not_adapter(model, key=key)
    if not file.is_file():
        if path.is_dir():
            raise UserError(f"{key}={model}: the folder has no config.json")
        if is_path:
            raise UserError(f"{key}={model}: no such folder or file (working directory {Path.cwd()})")
        if (known := known_config(model)) is not None:
            return f"published config.json of {known[0]}", known[1]
        file = Path(model)
        if "/" not in model:
            raise UserError(_unknown(model, key))
    from transformers import AutoConfig

    from rm_gallery.data.sources.hub import go_offline_if_unreachable, why_offline
    from rm_gallery.modeling.model_folder import quiet_transformers

    if not file.is_file():
        go_offline_if_unreachable()
    try:
        if file.is_file():  # before transformers, which is slow for millions of layers
            values = json.loads(file.read_text(encoding="utf-8"))
            _check_layers(values.get("num_hidden_layers", 1), model, key)
        with quiet_transformers():
            # owner/name is looked up on the hub; only the configuration is downloaded.
            return f"{file}", AutoConfig.from_pretrained(os.fspath(file), trust_remote_code=trust_remote_code)
    except UserError:
        raise
    except Exception as error:
        if file.is_file():
            raise UserError(
                f"{key}={model}: not a configuration that transformers can read ({one_line(error)})"
            ) from error
        reason = why_offline() or one_line(error)
        raise UserError(f"{_unknown(model, key)}; and the hub does not provide it ({reason})") from error


def _check_layers(layers: Any, model: str, key: str) -> None:
    if not isinstance(layers, int) or not 1 <= layers <= _MAX_LAYERS:
        raise UserError(f"{key}={model}: num_hidden_layers={layers!r} must be a number from 1 to {_MAX_LAYERS}")


def _unknown(model: str, key: str) -> str:
    found = nearest(short_name(model), KNOWN)
    return (
        f"{key}={model}: neither a folder with config.json nor a known shape.{found} Known: {', '.join(KNOWN)}; "
        "use a path, or owner/name of the hub, for others"
    )


def measure(
    config: Any, *, name: str, source: str, packing: PackingSetting = "auto", what: str = "model",
    frozen: FreezeSetting = None, lora: LoraConfig | None = None, quantization: Quantization = None,
) -> ModelShape:  # fmt: skip
    """Build the reward model of a configuration on the meta device and count."""
    import torch
    from torch import nn
    from transformers import AutoModelForSequenceClassification
    from transformers.pytorch_utils import Conv1D

    from rm_gallery.modeling.architectures import common_setting
    from rm_gallery.modeling.attention import dispatch
    from rm_gallery.modeling.freezing import count_trained, freeze
    from rm_gallery.modeling.model_folder import quiet_transformers
    from rm_gallery.modeling.packing import choose_way
    from rm_gallery.modeling.reward_model import RewardModel, max_positions

    heads = config.num_attention_heads
    kv_heads = common_setting(config, "num_key_value_heads") or heads
    # Types without this setting have an MLP of four times the width.
    intermediate = common_setting(config, "intermediate_size")
    intermediate = 4 * config.hidden_size if intermediate is None else intermediate
    if min(config.hidden_size, intermediate, config.vocab_size, heads, kv_heads) < 1 or heads % kv_heads:
        raise ValueError("its sizes must be at least 1, and num_attention_heads a multiple of num_key_value_heads")
    config.num_labels = 1
    config.problem_type = "regression"
    extra, way = {}, choose_way(config, packing, what=what)
    if way.packed:
        dispatch.install()
        extra["attn_implementation"] = dispatch.NAME
    with torch.device("meta"), quiet_transformers():
        network = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32, **extra)
    model = RewardModel(network, way)
    freeze(network, frozen)
    depth = config.num_hidden_layers
    layers = next(
        part for part in model.modules() if isinstance(part, nn.ModuleList) and len(part) == config.num_hidden_layers
    )
    linear = (nn.Linear, Conv1D)  # GPT-2 has the latter
    matrices = [part.weight.numel() for part in layers.modules() if isinstance(part, linear)]
    embeddings = [part.weight.numel() for part in model.modules() if isinstance(part, nn.Embedding)]
    num_experts, chosen, experts = _experts(config, layers)
    all_experts = sum(sum(each.values()) for each in experts)
    if chosen:
        shared = common_setting(config, "shared_expert_intermediate_size") or (
            (common_setting(config, "n_shared_experts") or 0) * (common_setting(config, "moe_intermediate_size") or 0)
        )
        # Three matrices of an expert, or two if they are not gated: the first of the tensors joins gate and up.
        width = max(sum(each.values()) for each in experts) // (3 * num_experts * config.hidden_size)
        intermediate = chosen * width + shared
    relative = config.model_type == "deberta-v2" and config.relative_attention
    span = config.position_buckets if relative and config.position_buckets > 0 else 0
    shape = ModelShape(
        name=name,
        source=source,
        model_type=config.model_type,
        padded=model.padded,
        own_layers=way.own_layers,
        num_layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        intermediate=intermediate,
        experts_per_token=chosen,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=common_setting(config, "head_dim") or config.hidden_size // heads,
        windows=_windows(config),
        relative_span=span or (config.max_position_embeddings if relative else 0),
        max_positions=max_positions(model),
        parameters=_count(model),
        trained_parameters=count_trained(model.parameters()),
        frozen_layers=frozen if isinstance(frozen, int) else depth if frozen == "backbone" else 0,
        head_parameters=_count(model.head),
        layer_parameters=max(_count(layer) for layer in layers),
        matrix_parameters=sum(matrices),
        active_parameters=sum(matrices) + (all_experts * chosen // num_experts if chosen else 0),
        largest_matrix=max([*matrices, *(size for each in experts for size in each.values())], default=0),
        largest_embedding=max(embeddings),
    )
    return shape if lora is None or not lora.rank else _with_lora(shape, network, lora, quantization)


def _with_lora(shape: ModelShape, network: Any, lora: LoraConfig, quantization: Quantization) -> ModelShape:
    """The shape with the parameters of LoRA, and without gradients of all others but heads and `modules_to_save`."""
    from rm_gallery.modeling.freezing import modules_to_save
    from rm_gallery.modeling.lora_layers import linear_layers
    from rm_gallery.modeling.quantization import names_to_quantize

    saved = [
        *modules_to_save(network),
        *(
            name
            for name, _ in network.named_modules()
            if any(f".{name}".endswith(f".{end}") for end in lora.modules_to_save)
        ),
    ]
    all_names = [
        name for name in linear_layers(network)[0] if not any(f"{name}.".startswith(f"{each}.") for each in saved)
    ]
    chosen = all_names
    if isinstance(lora.target_modules, list):
        chosen = [name for name in all_names if any(f".{name}".endswith(f".{end}") for end in lora.target_modules)]
    sizes = [tuple(network.get_submodule(name).weight.shape) for name in chosen]
    added = sum(lora.rank * sum(size) + (size[0] if lora.use_dora else 0) for size in sizes)
    in_full = {each for name in saved for each in network.get_submodule(name).parameters()}
    tables = [each.numel() for each in in_full if each.ndim == 2 and each.numel() >= shape.largest_embedding]
    quantized = [network.get_submodule(name).weight for name in names_to_quantize(network)] if quantization else []
    return replace(
        shape,
        parameters=shape.parameters + added,
        trained_parameters=added + sum(each.numel() for each in in_full),
        layer_parameters=shape.layer_parameters + added // shape.num_layers,
        largest_matrix=max((lora.rank * max(size) for size in sizes), default=0),
        largest_embedding=max(tables, default=0),
        adapter_rank=lora.rank,
        adapted_per_layer=round(len(chosen) / shape.num_layers),
        quantized_parameters=sum(each.numel() for each in quantized),
        quantized_bytes=sum(_quantized_bytes(each.shape[0], each.shape[1], quantization) for each in quantized),
        largest_quantized=max((each.numel() for each in quantized), default=0),
    )


def _quantized_bytes(rows: int, columns: int, kind: Quantization) -> float:
    """nf4: half a byte, a scale of one byte per 64 numbers, and a float32 per 256 of these; int8: a float32 per row."""
    count = rows * columns
    return count / 2 + count / 64 + 4 * count / (64 * 256) if kind == "nf4" else count + 4 * rows


def _count(module: Any) -> int:
    count: int = sum(parameter.numel() for parameter in module.parameters())
    return count


def _experts(config: Any, layers: Any) -> tuple[int, int, list[dict[str, int]]]:
    """Number of experts, those of one token, and for each layer with experts the parameters of their joined tensors."""
    from rm_gallery.modeling.architectures import common_setting

    names = ("num_local_experts", "num_experts", "n_routed_experts")
    count = next((found for name in names if (found := common_setting(config, name))), 0)
    chosen = common_setting(config, "num_experts_per_tok") or 0
    joined = [
        {name: each.numel() for name, each in layer.named_parameters() if each.ndim == 3 and len(each) == count}
        for layer in layers
    ]
    joined = [each for each in joined if each]
    return (count, chosen, joined) if count and chosen and joined else (0, 0, [])


def _windows(config: Any) -> tuple[int | None, ...]:
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


# Hub repository, model type, and the values that _NAMES names.
_ROWS: tuple[tuple[str, str, int, int, int, int, int, int, int, int], ...] = (
    ("Qwen/Qwen2.5-0.5B", "qwen2", 24, 896, 4864, 14, 2, 64, 151936, 32768),
    ("Qwen/Qwen2.5-1.5B", "qwen2", 28, 1536, 8960, 12, 2, 128, 151936, 131072),
    ("Qwen/Qwen2.5-3B", "qwen2", 36, 2048, 11008, 16, 2, 128, 151936, 32768),
    ("Qwen/Qwen2.5-7B", "qwen2", 28, 3584, 18944, 28, 4, 128, 152064, 131072),
    ("Qwen/Qwen2.5-14B", "qwen2", 48, 5120, 13824, 40, 8, 128, 152064, 131072),
    ("Qwen/Qwen2.5-32B", "qwen2", 64, 5120, 27648, 40, 8, 128, 152064, 131072),
    ("Qwen/Qwen2.5-72B", "qwen2", 80, 8192, 29568, 64, 8, 128, 152064, 131072),
    ("Qwen/Qwen3-0.6B", "qwen3", 28, 1024, 3072, 16, 8, 128, 151936, 40960),
    ("Qwen/Qwen3-1.7B", "qwen3", 28, 2048, 6144, 16, 8, 128, 151936, 40960),
    ("Qwen/Qwen3-4B", "qwen3", 36, 2560, 9728, 32, 8, 128, 151936, 40960),
    ("Qwen/Qwen3-8B", "qwen3", 36, 4096, 12288, 32, 8, 128, 151936, 40960),
    ("Qwen/Qwen3-14B", "qwen3", 40, 5120, 17408, 40, 8, 128, 151936, 40960),
    ("Qwen/Qwen3-32B", "qwen3", 64, 5120, 25600, 64, 8, 128, 151936, 40960),
    ("meta-llama/Llama-3.2-1B", "llama", 16, 2048, 8192, 32, 8, 64, 128256, 131072),
    ("meta-llama/Llama-3.2-3B", "llama", 28, 3072, 8192, 24, 8, 128, 128256, 131072),
    ("meta-llama/Llama-3.1-8B", "llama", 32, 4096, 14336, 32, 8, 128, 128256, 131072),
    ("meta-llama/Llama-3.1-70B", "llama", 80, 8192, 28672, 64, 8, 128, 128256, 131072),
    ("mistralai/Mistral-7B-v0.3", "mistral", 32, 4096, 14336, 32, 8, 128, 32768, 32768),
    ("google-bert/bert-base-uncased", "bert", 12, 768, 3072, 12, 12, 64, 30522, 512),
    ("google-bert/bert-large-uncased", "bert", 24, 1024, 4096, 16, 16, 64, 30522, 512),
    ("FacebookAI/roberta-base", "roberta", 12, 768, 3072, 12, 12, 64, 50265, 514),
    ("FacebookAI/roberta-large", "roberta", 24, 1024, 4096, 16, 16, 64, 50265, 514),
    ("microsoft/deberta-v3-base", "deberta-v2", 12, 768, 3072, 12, 12, 64, 128100, 512),
    ("microsoft/deberta-v3-large", "deberta-v2", 24, 1024, 4096, 16, 16, 64, 128100, 512),
    ("answerdotai/ModernBERT-base", "modernbert", 22, 768, 1152, 12, 12, 64, 50368, 8192),
    ("answerdotai/ModernBERT-large", "modernbert", 28, 1024, 2624, 16, 16, 64, 50368, 8192),
)  # fmt: skip
_NAMES = (
    "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "max_position_embeddings",
)  # fmt: skip
_MORE: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},
    "roberta": {"type_vocab_size": 1},
    "deberta-v2": {
        "relative_attention": True, "position_buckets": 256, "pos_att_type": ["p2c", "c2p"], "share_att_key": True,
        "norm_rel_ebd": "layer_norm", "position_biased_input": False, "type_vocab_size": 0,
        "max_relative_positions": -1,
    },
}  # fmt: skip
_TAILS = ("-instruct", "-chat", "-base", "-uncased", "-cased")


def short_name(repository: str) -> str:
    """The name of a shape: `qwen2.5-7b` for `Qwen/Qwen2.5-7B-Instruct`."""
    name = repository.lower().rpartition("/")[2]
    for tail in _TAILS:
        # In some names "base" is the size: bert-base-uncased.
        if name.endswith(tail) and not (tail == "-base" and name.startswith(("bert", "roberta", "deberta", "modern"))):
            name = name.removesuffix(tail)
    return name


KNOWN = {short_name(row[0]): row for row in _ROWS}


def known_config(model: str) -> tuple[str, Any] | None:
    """(hub repository, transformers configuration) of a known shape, by its short or hub name; None for others."""
    row = KNOWN.get(short_name(model))
    owner = model.rpartition("/")[0]
    if row is None or owner not in ("", row[0].partition("/")[0]):
        return None
    from transformers import AutoConfig

    repository, model_type = row[0], row[1]
    values: dict[str, Any] = dict(zip(_NAMES, row[2:], strict=True))
    if model_type in ENCODERS:
        del values["num_key_value_heads"], values["head_dim"]
    return repository, AutoConfig.for_model(model_type, **values, **_MORE.get(model_type, {}))
