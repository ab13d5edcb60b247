"""Random states survive JSON, and what is drawn while saving does not show."""

from __future__ import annotations

import json
import random

import numpy as np
import torch

from rm_gallery.training.checkpoint.state import preserve_random_state, random_state, set_random_state


def draw() -> tuple[object, ...]:
    return (
        random.random(), random.gauss(0, 1), np.random.rand(), np.random.standard_normal(),
        torch.rand(3).tolist(), torch.randn(17).tolist(),
    )  # fmt: skip


def test_the_same_is_drawn_again_after_json() -> None:
    draw()  # an odd number of normal values: one is kept back in Python's and numpy's states
    state = json.loads(json.dumps(random_state()))
    first = draw()
    assert draw() != first
    set_random_state(state)
    assert draw() == first


def test_what_is_drawn_inside_does_not_show() -> None:
    state = random_state()
    expected = draw()
    set_random_state(state)
    with preserve_random_state():
        draw()
    assert draw() == expected
