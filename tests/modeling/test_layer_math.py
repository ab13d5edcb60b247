"""RMS norm and rotary embedding against the formulas in float64 and against what the library computes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from rm_gallery.modeling.layer_math import rms_norm, rotate


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def angles(tokens: int, size: int) -> tuple[Tensor, Tensor]:
    angle = torch.arange(tokens)[:, None] * (0.3 ** torch.arange(size // 2))[None, :]
    both = torch.cat([angle, angle], -1)
    return both.cos(), both.sin()


@pytest.mark.parametrize("shape", [(1, 7, 12), (5, 3, 8), (1, 4)])
def test_the_backward_passes_are_the_derivatives(shape: tuple[int, ...]) -> None:
    states = draw(*shape).double().requires_grad_()
    weight = draw(shape[-1], seed=1).double().requires_grad_()
    # The norm is worked out in float32 whatever the type, so differences are taken wide enough to stand out.
    assert torch.autograd.gradcheck(lambda s, w: rms_norm(s, w, 1e-6), (states, weight), eps=1e-2, atol=1e-3)
    turned = draw(5, 3, 8).double().requires_grad_()
    cos, sin = (part.double() for part in angles(5, 8))
    assert torch.autograd.gradcheck(lambda s: rotate(s, cos, sin), (turned,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_is_llamas(dtype: torch.dtype) -> None:
    norm = LlamaRMSNorm(64, eps=1e-6).to(dtype)
    norm.weight.data = draw(64, seed=1).to(dtype)
    states = (draw(1, 50, 64, seed=2) * 3).to(dtype).requires_grad_()
    gradient = draw(1, 50, 64, seed=3).to(dtype)
    mine, theirs = rms_norm(states, norm.weight, 1e-6), norm(states)
    torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-6 if dtype == torch.float32 else 8e-3)
    for a, b in zip(
        *(torch.autograd.grad(out, (states, norm.weight), gradient) for out in (mine, theirs)), strict=True
    ):
        assert (a.float() - b.float()).norm() <= (1e-6 if dtype == torch.float32 else 4e-3) * b.float().norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rotation_is_the_librarys(dtype: torch.dtype) -> None:
    states = draw(9, 4, 16).to(dtype).requires_grad_()
    cos, sin = (part.to(dtype) for part in angles(9, 16))
    gradient = draw(9, 4, 16, seed=1).to(dtype)
    mine = rotate(states, cos, sin)
    theirs, _ = apply_rotary_pos_emb(states[None], states[None], cos[None], sin[None], unsqueeze_dim=2)
    tolerance = 1e-6 if dtype == torch.float32 else 8e-3
    for a, b in ((mine, theirs[0]), *zip(*(torch.autograd.grad(out, states, gradient) for out in (mine, theirs[0])),
                                         strict=True)):  # fmt: skip
        torch.testing.assert_close(a, b, atol=2 * tolerance, rtol=tolerance)
