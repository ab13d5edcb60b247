"""Layers that LoRA is added to: which ones of a model, a check that this is exact, and merging them.

Of the types of `ARCHITECTURES` it is tested. For any other type the check runs on a twin (`twin.py`), where every layer
with LoRA must change the rewards, and rewards must be those of plain transformers with the layers merged.
Nothing here imports peft until layers are added.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from warnings import catch_warnings

import torch
from torch import nn

from rm_gallery.data.batching.packed_batch import collate
from rm_gallery.errors import UserError, one_line
from rm_gallery.modeling.architectures import ARCHITECTURES, closing_token
from rm_gallery.modeling.forward import padded_rewards
from rm_gallery.modeling.freezing import modules_to_save
from rm_gallery.modeling.language_model import library_losses, model_of_twin, probe_texts
from rm_gallery.modeling.model_folder import quiet_transformers
from rm_gallery.modeling.packing import TOLERANCE, Probe, Way, packed_by_library
from rm_gallery.modeling.twin import VOCABULARY, build_twin

ADAPTER_NAME = "default"  # in the names of peft's parameters
_TOLERANCE = 10 * TOLERANCE
"""Merged matrices round differently; a layer of the check that has no effect makes a difference of about 0.1."""


def linear_layers(network: Any) -> tuple[list[str], list[str]]:
    """Names of the backbone's linear layers: those that LoRA can be added to, and those that it cannot.

    The latter have a weight that the code of their parent reads without a call, such as Mamba's `dt_proj`.
    """
    from transformers.pytorch_utils import Conv1D

    kept = {module for name in modules_to_save(network) for module in network.get_submodule(name).modules()}
    found: tuple[list[str], list[str]] = ([], [])
    for name, module in network.named_modules():
        is_linear = type(module).forward is nn.Linear.forward or isinstance(module, Conv1D)  # GPT-2 has the latter
        if is_linear and module not in kept:
            found[is_read_directly(network, name)].append(name)
    return found


def is_read_directly(network: Any, name: str) -> bool:
    """Whether the code of a module's parent reads its weight, so that a layer in its place has no effect there."""
    # Not where only the dtype or the class of the weight is asked for, as T5 does.
    return _mentions(network, name, r"(?<!isinstance\()\bself\.(\w+)\.weight\b(?!\.(?:dtype|device|shape|size)\b)")


def asks_for_weight(network: Any, name: str) -> bool:
    """Whether the code of a module's parent names its weight at all, as T5 does to cast the input to its dtype."""
    return _mentions(network, name, r"\bself\.(\w+)\.weight\b")


def _mentions(network: Any, name: str, pattern: str) -> bool:
    parent, _, last = name.rpartition(".")
    kinds = type(network.get_submodule(parent)).__mro__
    return any(last in _found_in(kind, pattern) for kind in kinds if not kind.__module__.startswith("torch."))


@functools.lru_cache(maxsize=1024)
def _found_in(kind: Any, pattern: str) -> frozenset[str]:
    try:
        return frozenset(re.findall(pattern, inspect.getsource(kind)))
    except (OSError, TypeError):  # a class without a file
        return frozenset()


def generic_name(name: str) -> str:
    """A name without the numbers of layers and experts."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "#", name)


def inject(network: Any, settings: Any) -> None:
    """Add peft's layers to the network in place."""
    peft = import_peft("model.lora.rank")
    with quiet():
        peft.inject_adapter_in_model(settings, network, adapter_name=ADAPTER_NAME)


def names_without_effect(
    config: Any, way: Way, names: Iterable[str], *, what: str, language_model: bool = False
) -> set[str]:
    """Those of the layers that change no reward on a twin if LoRA is added to them; none for types that are tested.

    names: generic names. language_model: losses of tokens are compared instead of rewards. Raises UserError, which
    begins with `what`, for a type whose rewards with LoRA are not those of the merged model.
    """
    if config.model_type in ARCHITECTURES or not way.is_checked:
        return set()
    peft, twin, wanted = import_peft(what), build_twin(config, language_model=language_model), set(names)
    attention = twin.config._attn_implementation
    chosen = [name for name in linear_layers(twin)[0] if generic_name(name) in wanted]
    inject(twin, peft.LoraConfig(r=2, lora_alpha=4, target_modules=chosen))
    places = {name: each for name, each in twin.named_parameters() if ".lora_B." in name}
    _draw(places.values())
    compare = _compare_losses if language_model else _compare_rewards
    try:
        gradients, difference = compare(twin, way, list(places.values()), attention)
    except Exception as error:  # code of the library that does not know layers with LoRA
        raise UserError(f"{what}: a small {config.model_type} with LoRA does not run ({one_line(error)})") from error
    if not difference <= _TOLERANCE:
        raise UserError(
            f"{what}: LoRA is not exact on {config.model_type}: {'losses' if language_model else 'rewards'} of a small "
            f"model differ by {difference:.2g} from those of the merged one; set model.lora.rank=0"
        )
    used = {
        generic_name(name.partition(".lora_B.")[0])
        for name, gradient in zip(places, gradients, strict=True)
        if gradient is not None and bool(gradient.any())
    }
    return {generic_name(name) for name in chosen} - used


def _compare_rewards(twin: Any, way: Way, places: list[nn.Parameter], attention: Any) -> tuple[Any, float]:
    """Gradients of the rewards for `places`, and how far they are from those of the twin merged, which it is then."""
    probe = Probe(VOCABULARY, closing_token(twin.config))
    found = (packed_by_library if way.packed else padded_rewards)(twin, probe.batch)
    gradients = torch.autograd.grad(found.square().sum(), places, allow_unused=True)
    merge_layers(twin)
    twin.set_attn_implementation(attention)
    probe.measure(twin)
    return gradients, probe.difference(found.detach())


def _compare_losses(twin: Any, way: Way, places: list[nn.Parameter], attention: Any) -> tuple[Any, float]:
    """The same for the losses of a language model."""
    groups = probe_texts()
    found = model_of_twin(twin, packed=way.packed)(collate(groups))
    gradients = torch.autograd.grad(found.total, places, allow_unused=True)
    merge_layers(twin)
    twin.set_attn_implementation(attention)
    return gradients, float((found.each - library_losses(twin, groups)).abs().max())


def _draw(parameters: Iterable[nn.Parameter]) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for each in parameters:
            nn.init.normal_(each, std=0.1)


@torch.no_grad()
def merge_layers(network: nn.Module) -> None:
    """Merge the layers of an adapter into the weights in place, and restore the modules that they were added to."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    places = [(parent, *each) for parent in network.modules() for each in parent.named_children()]
    for parent, name, module in places:
        if isinstance(module, AuxiliaryTrainingWrapper):  # trained rows of an embedding
            setattr(parent, name, module.unload_and_optionally_merge_module(True, False, None))
        elif isinstance(module, BaseTunerLayer) and not isinstance(parent, AuxiliaryTrainingWrapper):
            module.merge()
            setattr(parent, name, module.get_base_layer())


def import_peft(what: str) -> Any:
    """The package; raises UserError, which begins with `what`, if it is missing."""
    try:
        with quiet():
            import peft
    except ImportError as error:
        raise UserError(f"{what} needs the peft package: pip install 'rm-gallery[lora]'") from error
    return peft


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings of peft, and no load reports of transformers: what is wrong is checked and reported here."""
    with catch_warnings(action="ignore"), quiet_transformers():
        yield
