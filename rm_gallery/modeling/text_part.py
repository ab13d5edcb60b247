"""The text model of a multimodal wrapper (Gemma 3, Mistral 3, Qwen3.5, Llama 4, ...): trained as a model of its own.

A wrapper's config.json has a `text_config`, and its weight files hold the text model under a prefix, such as
`model.language_model.` or `language_model.model.`, beside those of images and sound. Here the configuration is taken
out and the tensors get the names of the text model, so that everything else sees a folder of text.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from rm_gallery.errors import UserError
from rm_gallery.modeling.generic_class import register
from rm_gallery.modeling.weight_files import StoredTensor, WeightFolder, list_names, read_weight_folder

_SAME_LAYERS = {"qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3"}
"""Text models that compute what a plain type does if the three position ids of each token are equal, as in text."""
_IMAGE_SETTINGS = ("mrope_section", "mrope_interleaved", "type")
_EMBEDDING = re.compile(r"(.*?)(embed_tokens|embeddings\.tok_embeddings|wte)\.weight")
_OTHER_PARTS = re.compile(r"vision|visual|image|audio|speech|video|mtp")


def is_wrapper(config: Any) -> bool:
    """Whether a configuration wraps several models, one of them of text."""
    return getattr(config, "text_config", None) is not None and config.get_text_config() is not config


def text_part(config: Any) -> Any:
    """The configuration of a wrapper's text model; any other configuration as it is.

    The wrapper itself is returned where its text model has no class for rewards, or where its weight files hold other
    tensors than its modules do.
    """
    if not is_wrapper(config) or not _keeps_layout(config):
        return config
    text = _plain(config.get_text_config())
    if getattr(text, "is_encoder_decoder", False) or not register(text):
        return config
    for name in ("architectures", "quantization_config", "pad_token_id", "bos_token_id", "eos_token_id"):
        if getattr(text, name, None) is None and getattr(config, name, None) is not None:
            setattr(text, name, getattr(config, name))
    return text


def reads_last_token(config: Any) -> bool:
    """Whether the wrapper's own sequence classification class, if it has one, computes the reward as its text model."""
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    from transformers.modeling_layers import GenericForSequenceClassification

    own = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(config), None)
    return own is None or issubclass(own, GenericForSequenceClassification)


def _plain(text: Any) -> Any:
    from transformers import AutoConfig

    if text.model_type not in _SAME_LAYERS:
        return text
    values = text.to_dict()
    rope = {name: each for name, each in (values["rope_parameters"] or {}).items() if name not in _IMAGE_SETTINGS}
    values.update(rope_parameters=rope, model_type=_SAME_LAYERS[text.model_type])
    return AutoConfig.for_model(**values)


def _keeps_layout(config: Any) -> bool:
    """Whether the wrapper's tensors are stored as its modules hold them, apart from their names."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    steps = get_checkpoint_conversion_mapping(config.model_type) or []
    return not any(isinstance(step, WeightConverter) for step in steps)


def text_files(config: Any, files: WeightFolder, *, what: str) -> tuple[WeightFolder, dict[str, str]]:
    """The weight files with the text model's tensors alone, under its own names, and how transformers renames them.

    config: of the text model. Heads beside the text model are kept; what belongs to images and sound is not.
    Raises UserError if the text model is not found.
    """
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

    target = f"{MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)].base_model_prefix}."
    starts = {match[1] for name in files.tensors if (match := _EMBEDDING.fullmatch(name))}
    found = sorted(start for start in starts if not _OTHER_PARTS.search(start))
    if len(found) != 1:
        raise UserError(
            f"{what}: the text model is not found in the weights: "
            + (f"it may be under {list_names(found)}" if found else "no safetensors file has its token embedding")
            + "; save it as a folder of its own"
        )
    [start] = found
    heads = _heads(files, start)
    tensors: dict[str, StoredTensor] = {}
    for name, tensor in files.tensors.items():
        if name.startswith(start) and not _OTHER_PARTS.search(name.removeprefix(start).partition(".")[0]):
            tensors[target + name.removeprefix(start)] = tensor
        elif name.endswith("lm_head.weight"):
            tensors["lm_head.weight"] = tensor
        elif _root(name, start) in heads:
            tensors[name] = tensor
    return replace(files, tensors=tensors), {} if start == target else {f"^{re.escape(start)}": target}


def plain_renames(path: str, *, key: str) -> dict[str, str] | None:
    """`key_mapping` of `from_pretrained` for the text model of this folder; None if it holds no wrapper."""
    from transformers import AutoConfig

    whole = AutoConfig.from_pretrained(path)
    config = text_part(whole)
    if config is whole:
        return None
    return text_files(config, read_weight_folder(path, key=key), what=f"{key}={path}")[1] or None


def _heads(files: WeightFolder, start: str) -> set[str]:
    """Roots outside of the text model that hold a matrix with one output."""
    return {
        root
        for name, tensor in files.tensors.items()
        if len(tensor.shape) == 2 and tensor.shape[0] == 1 and not name.startswith(start)
        and not _OTHER_PARTS.search(root := _root(name, start))
    }  # fmt: skip


def _root(name: str, start: str) -> str:
    """The first part of a name, or the first two if the first is that of the text model."""
    parts = name.split(".")
    return ".".join(parts[: 2 if start.startswith(f"{parts[0]}.") else 1])
