"""Keys of older versions beside those of transformers 5, so that transformers 4.x computes the same rewards.

Version 4 does not know `rope_parameters`: it takes its default base of 10,000 for rotary embeddings, silently. It does
not load a tokenizer whose `extra_special_tokens` is a list. Names of version 4: `modeling_rope_utils.py` and the
configuration classes of transformers 4.57.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from rm_gallery.errors import UserError
from rm_gallery.files import MANIFEST, check_manifest, sha256, write_text

CONFIG, TOKENIZER = "config.json", "tokenizer_config.json"


def add_config_keys(config: dict[str, Any]) -> None:
    """Add the keys of transformers 4.x and of sentence-transformers to the values of config.json, in place.

    `rope_theta` and `rope_scaling`; for models with a base per layer type also `rope_local_base_freq` (Gemma 3) or
    `global_rope_theta` and `local_rope_theta` (ModernBERT). They are omitted for a type for which transformers 5 would
    read other rotary settings with them. sentence-transformers applies a sigmoid by default.
    """
    config["sentence_transformers"] = {"activation_fn": "torch.nn.modules.linear.Identity"}
    config.update(_expert_keys(config))
    keys = _rope_keys(config)
    if keys and _are_ignored(config, keys):
        config.update(keys)


def _expert_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """The number of experts under the name of version 4: Qwen3 MoE's `num_experts` is `num_local_experts` now."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = config.get("model_type")
    aliases = getattr(CONFIG_MAPPING[kind], "attribute_map", {}) if kind in CONFIG_MAPPING else {}
    return {
        name: config[new]
        for name, new in aliases.items()
        if name == "num_experts" and new == "num_local_experts" and new in config
    }


def _rope_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    rope = config.get("rope_parameters")
    if not isinstance(rope, Mapping):
        return {}
    full, local = rope.get("full_attention", rope), rope.get("sliding_attention")
    if not isinstance(full, Mapping) or "rope_theta" not in full:
        return {}
    if config.get("model_type") == "modernbert":
        return {"global_rope_theta": full["rope_theta"], "local_rope_theta": (local or full)["rope_theta"]}
    keys: dict[str, Any] = {"rope_theta": full["rope_theta"]}
    if full.get("rope_type", "default") != "default":
        keys["rope_scaling"] = {key: value for key, value in full.items() if key != "rope_theta"}
    if isinstance(local, Mapping):
        keys["rope_local_base_freq"] = local["rope_theta"]
    return keys


def _are_ignored(config: Mapping[str, Any], keys: Mapping[str, Any]) -> bool:
    """Whether transformers 5 reads the same rotary settings with these keys beside its own."""
    try:
        found = _rope_as_read({**config, **keys})
    except Exception:  # it refuses them: Gemma 4
        return False
    return bool(found == _rope_as_read(config))


def _rope_as_read(config: Mapping[str, Any]) -> Any:
    """`rope_parameters` as transformers 5 reads them: some types take old keys in place of the new ones."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = config.get("model_type")
    if kind not in CONFIG_MAPPING:  # code of the folder
        return config
    return CONFIG_MAPPING[kind].from_dict(deepcopy(dict(config))).rope_parameters


def rename_tokenizer_keys(config: dict[str, Any]) -> None:
    """Use the names of transformers 4.x in the values of tokenizer_config.json, in place; version 5 reads them too."""
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")


def repair_folder(folder: Path) -> list[str]:
    """Add the keys to a folder that an earlier version of RM-Gallery wrote; return the names of the files that changed.

    The hashes in its manifest are updated. Raises UserError for a folder without a model of ours, and for a damaged
    one, which is left as it is.
    """
    manifests = [name for name in (MANIFEST, "training_state/complete.json") if (folder / name).is_file()]
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder}: no {CONFIG}; give the folder of a checkpoint")
    for manifest in manifests:
        if damaged := check_manifest(folder, manifest=manifest):
            raise UserError(f"{folder}: {damaged}; it is damaged; copy it again")
    changed = []
    for name, change in ((CONFIG, add_config_keys), (TOKENIZER, rename_tokenizer_keys)):
        path = folder / name
        if path.is_file():
            before = json.loads(path.read_text(encoding="utf-8"))
            after = dict(before)
            change(after)
            if after != before:
                if name == CONFIG and "rm_gallery" not in before:
                    raise UserError(f"{folder}: no model that RM-Gallery wrote; give the folder of a checkpoint")
                write_text(path, json.dumps(after, indent=2, sort_keys=name == CONFIG) + "\n")
                changed.append(name)
    for manifest in manifests if changed else ():  # the second one lists the first
        _update_hashes(folder, manifest, [*changed, MANIFEST])
    return changed


def _update_hashes(folder: Path, manifest: str, names: list[str]) -> None:
    path = folder / manifest
    values = json.loads(path.read_text(encoding="utf-8"))
    for name in names:
        if name in values["sha256"]:
            values["sha256"][name] = sha256(folder / name)
    write_text(path, json.dumps(values, indent=2) + "\n")
