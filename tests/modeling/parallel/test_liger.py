"""Which modules are patched with Liger's kernels; the kernels themselves need a GPU."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rm_gallery.data.batching.packed_batch import collate
from rm_gallery.errors import UserError
from rm_gallery.modeling.parallel.apply import patch_modules, use_liger
from rm_gallery.modeling.reward_model import load_reward_model
from tests.small import DECODERS, make_model, random_groups

has_package = importlib.util.find_spec("liger_kernel") is not None


def rms_norm(states: Tensor, weight: Tensor, eps: float, offset: float, mode: str, in_place: bool) -> Tensor:
    normal = F.rms_norm(states.float(), (states.shape[-1],), None, eps)
    return (
        ((offset + weight.float()) * normal).to(states.dtype) if mode == "gemma" else weight * normal.to(weight.dtype)
    )


FORMULAS = SimpleNamespace(
    liger_rms_norm=rms_norm,
    liger_swiglu=lambda gate, up: F.silu(gate) * up,
    liger_geglu=lambda gate, up: F.gelu(gate, approximate="tanh") * up,
)
"""Liger's functions in plain PyTorch."""


@pytest.mark.parametrize("kind", DECODERS)
def test_patched_modules_call_the_kernels(kind: str, tmp_path: Path) -> None:
    model = load_reward_model(str(make_model(kind, tmp_path))).model.eval()
    batch = collate(random_groups(0))
    with torch.no_grad():
        before = model(batch)
        num_norms = sum("RMSNorm" in type(module).__name__ for module in model.modules())
        assert patch_modules(model.network, FORMULAS) == num_norms + 2
        torch.testing.assert_close(model(batch), before, atol=1e-5, rtol=0)
    halved = SimpleNamespace(**{**vars(FORMULAS), "liger_rms_norm": lambda *a, **k: rms_norm(*a, **k) / 2})
    patch_modules(model.network, halved)
    with torch.no_grad():
        assert (model(batch) - before).abs().max() > 1e-3


def test_no_effect_on_a_cpu_is_logged(qwen2_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = load_reward_model(str(qwen2_folder)).model
    caplog.set_level(logging.INFO)
    use_liger(model.network, torch.device("cpu"))
    assert [record.message for record in caplog.records] == [
        "model.use_liger has no effect on a CPU: Liger's kernels need a GPU"
    ]


@pytest.mark.skipif(has_package, reason="liger-kernel is installed here")
def test_a_missing_package_is_named(qwen2_folder: Path) -> None:
    model = load_reward_model(str(qwen2_folder)).model
    with pytest.raises(UserError, match=r"pip install 'rm-gallery\[liger\]'"):
        use_liger(model.network, torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.skipif(not has_package, reason="needs liger-kernel")
@pytest.mark.parametrize("kind", DECODERS)
def test_rewards_and_gradients_on_a_gpu(kind: str, tmp_path: Path) -> None:
    folder, device = make_model(kind, tmp_path), torch.device("cuda")
    batch = collate(random_groups(0)).to(device)
    found = []
    for with_liger in (False, True):
        torch.manual_seed(1)
        model = load_reward_model(str(folder)).model.to(device)
        if with_liger:
            use_liger(model.network, device)
        rewards = model(batch)
        rewards.sum().backward()
        found.append([rewards.detach(), *(p.grad for p in model.parameters())])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4 * max(1.0, float(theirs.abs().max())), rtol=0)
