"""Near duplicates and components."""

from __future__ import annotations

import numpy as np

from rm_gallery.inspection.components import connected
from rm_gallery.inspection.near import Signatures, near_clusters
from tests.inspection.made import words


def _signatures(*groups: tuple[str, list[str]]) -> tuple[np.ndarray, np.ndarray]:
    collected = Signatures()
    for prompt, responses in groups:
        collected.add(prompt.split(), [response.split() for response in responses])
    return collected.finish()


def test_agreement_estimates_the_share_of_common_triples() -> None:
    shared, own = words(60, seed=1), [words(30, seed=seed) for seed in range(2, 42)]
    signatures, _ = _signatures(*(("", [f"{shared} {text}", ""]) for text in own))
    # 58 common triples, 32 own ones on each side: 58 / (58 + 64)
    agreement = np.mean([(signatures[0] == signatures[i]).mean() for i in range(1, 40)])
    assert abs(agreement - 58 / 122) < 0.1


def test_copies_and_small_changes_are_one_cluster_and_other_texts_stay_alone() -> None:
    text = words(150, seed=3)
    changed = text.replace(text.split()[70], "other")
    signatures, comparable = _signatures(
        ("q", [text, "no"]), ("q", [words(150, seed=4), "no"]), ("q", [changed, "no"]), ("q", ["no", text])
    )
    assert comparable.all()
    assert near_clusters(signatures).tolist() == [0, 1, 0, 0]


def test_a_long_prompt_alone_makes_no_near_duplicate() -> None:
    prompt = words(500, seed=5)
    signatures, _ = _signatures(*((prompt, [words(20, seed=s), words(20, seed=s + 50)]) for s in range(10, 14)))
    assert near_clusters(signatures).tolist() == [0, 1, 2, 3]


def test_short_groups_are_not_compared() -> None:
    _, comparable = _signatures(("", ["yes", "no"]), ("", [words(10, seed=6), "no"]), ("", ["", ""]))
    assert comparable.tolist() == [False, True, False]


def test_batches_do_not_change_signatures(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    groups = [("q", [words(20, seed=seed), words(9, seed=seed + 100)]) for seed in range(7)]
    whole, _ = _signatures(*groups)
    monkeypatch.setattr("rm_gallery.inspection.near._BATCH", 2)
    assert (_signatures(*groups)[0] == whole).all()


def test_nothing_has_no_clusters() -> None:
    signatures, comparable = Signatures().finish()
    assert len(comparable) == len(near_clusters(signatures)) == 0


def test_components_follow_long_chains() -> None:
    chain = np.random.default_rng(0).permutation(1000)
    label = connected(1002, chain[:-1], chain[1:])
    assert label[:1000].tolist() == [0] * 1000
    assert label[1000:].tolist() == [1000, 1001]
    assert connected(3, np.zeros(0, int), np.zeros(0, int)).tolist() == [0, 1, 2]
