"""The table of model types agrees with the modules of transformers."""

from __future__ import annotations

from pathlib import Path

import pytest

from rm_gallery.modeling import architectures
from rm_gallery.modeling.architectures import ARCHITECTURES, architecture, positions_after_padding
from rm_gallery.modeling.reward_model import load_reward_model, max_positions
from tests.small import DECODERS, ENCODERS, make_model


def test_decoders_and_encoders() -> None:
    assert (architectures.DECODERS, architectures.ENCODERS) == (DECODERS, ENCODERS)


def test_other_types_have_no_special_features() -> None:
    assert architecture("gpt2") == architectures.Architecture(is_decoder=False)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_entries_describe_the_modules(kind: str, tmp_path: Path) -> None:
    entry = architecture(kind)
    model = load_reward_model(str(make_model(kind, tmp_path))).model
    config = model.network.config
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    norms = [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]
    assert entry.is_decoder == (not model.padded)
    assert entry.head_norms == ({"q_norm", "k_norm"} <= names)
    assert entry.four_norms == ("pre_feedforward_layernorm" in names)
    assert entry.float32_norms == any(not hasattr(norm, "variance_epsilon") for norm in norms)
    assert entry.gated_mlp == ("gate_proj" in names or kind == "modernbert")  # modernbert: one matrix for both
    assert entry.relative_attention == getattr(config, "relative_attention", False)
    after = positions_after_padding(kind, config.pad_token_id)
    assert (after > 0) == (max_positions(model) not in (None, config.max_position_embeddings))
    if entry.is_decoder:
        has_window = any(hasattr(module, "sliding_window") for module in model.modules())
        assert entry.window_in_config == (not has_window and getattr(config, "sliding_window", None) is not None)
