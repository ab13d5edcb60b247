"""Sequence classification for model types that transformers has only as causal language models.

The library's `GenericForSequenceClassification` (the type's backbone, and `score` at the last token) is combined with
the type's base class and registered for the auto class, as the library itself does for newer types. A checkpoint of
such a type holds the same class as a file, `modeling_reward.py`, since plain transformers has no class for it.
"""

from __future__ import annotations

from typing import Any

CODE_FILE = "modeling_reward.py"
_BACKBONES = {"Llama4ForCausalLM": "model"}
"""Causal language models whose backbone, and so its weights in files, has another name than their base_model_prefix."""


def register(config: Any) -> bool:
    """Make the sequence classification class of a configuration known to transformers; returns whether it has one.

    False for encoder-decoders, wrappers of several models, and types without a causal language model.
    """
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
        AutoModelForSequenceClassification,
    )

    kind = type(config)
    if kind in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        return True
    is_text = not config.sub_configs and not getattr(config, "is_encoder_decoder", False)
    if not is_text or kind not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return False
    made = _make_class(MODEL_FOR_CAUSAL_LM_MAPPING[kind], kind)
    AutoModelForSequenceClassification.register(kind, made, exist_ok=True)
    return True


def _make_class(language_model: Any, config_class: type) -> type:
    from transformers.modeling_layers import GenericForSequenceClassification

    base = _base_class(language_model)
    prefix = _BACKBONES.get(language_model.__name__, language_model.base_model_prefix)
    name = language_model.__name__.removesuffix("ForCausalLM").removesuffix("LMHeadModel")
    return type(
        f"{name}ForSequenceClassification",
        (GenericForSequenceClassification, base),
        {"config_class": config_class, "base_model_prefix": prefix, "__module__": __name__},
    )


def _base_class(language_model: Any) -> Any:
    """The type's own subclass of PreTrainedModel, which knows how its weights are initialized."""
    from transformers import PreTrainedModel

    return next(
        each
        for each in reversed(language_model.__mro__)
        if issubclass(each, PreTrainedModel) and each is not PreTrainedModel
    )


def is_generic(network: Any) -> bool:
    """Whether the class of a network was made here."""
    return type(network).__module__ == __name__


def auto_map(network: Any) -> dict[str, str]:
    """The entry of config.json that names the class in `CODE_FILE`."""
    return {"AutoModelForSequenceClassification": f"{CODE_FILE.removesuffix('.py')}.{type(network).__name__}"}


def forget_code(config: Any) -> None:
    """Remove such an entry from a configuration that was read: the class is made here, not run from the folder."""
    found = list((getattr(config, "auto_map", None) or {}).values())
    if len(found) == 1 and str(found[0]).startswith(CODE_FILE.removesuffix("py")) and register(config):
        del config.auto_map


def code_of(network: Any) -> str:
    """The file that defines the class of a network for plain transformers."""
    kind = type(network)
    base, config = _base_class(kind), kind.config_class
    return f'''"""The reward model class of this checkpoint, which transformers has for other types only."""

from transformers.modeling_layers import GenericForSequenceClassification
from {base.__module__} import {base.__name__}
from {config.__module__} import {config.__name__}


class {kind.__name__}(GenericForSequenceClassification, {base.__name__}):
    config_class = {config.__name__}
    base_model_prefix = "{kind.base_model_prefix}"
'''
