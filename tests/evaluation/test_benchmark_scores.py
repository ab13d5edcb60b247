"""Scores of benchmarks: golden values, most of them printed by the benchmarks' own functions (docs/log.md)."""

from __future__ import annotations

import numpy as np
import pytest

from rm_gallery.data.benchmarks import scores
from tests.evaluation.tables import make_table


def _pairs(accuracies: dict[str, float]) -> list[tuple[str, str, int, list[float]]]:
    """Ten pairs of each subset, of which the given share is right; a wrong one in two is a tie."""
    rows = []
    for name, share in accuracies.items():
        for number in range(10):
            worse = 0.0 if number < 10 * share else float(1 + number % 2)
            rows.append((name, "", 1, [1.0, worse]))
    return rows


def test_rewardbench_sections_are_those_of_the_package() -> None:
    accuracies = {
        "alpacaeval-easy": 0.9, "mt-bench-med": 0.5, "mt-bench-hard": 0.4, "llmbar-natural": 0.8,
        "refusals-dangerous": 1.0, "xstest-should-respond": 0.6, "math-prm": 0.7, "hep-go": 0.3,
    }  # fmt: skip
    found = scores.rewardbench(*make_table(_pairs(accuracies)))
    # rewardbench.utils.calculate_scores_per_section(EXAMPLE_COUNTS, SUBSET_MAPPING, accuracies)
    golden = [0.7857142857142857, 0.691970802919708, 0.7142857142857143, 0.6428571428571429]
    assert [*found.parts] == ["Chat", "Chat Hard", "Safety", "Reasoning"]
    assert [*found.parts.values()] == pytest.approx(golden, abs=1e-12)
    assert found.overall == pytest.approx(np.mean(golden))
    # Weights 2, 2, 2, 2 and 1, as the leaderboard.
    assert scores.with_prior_sets(found.parts, 0.6) == pytest.approx((2 * sum(golden) + 0.6) / 9)


def test_rewardbench_without_a_section_has_no_overall_score() -> None:
    found = scores.rewardbench(*make_table(_pairs({"alpacaeval-easy": 0.9})))
    assert found.overall is None and found.parts == {"Chat": 0.9}
    assert found.notes == ("no overall score: rows of section Chat Hard, Safety, Reasoning are missing",)


def test_rewardbench_2_credits_and_ties_are_those_of_the_package() -> None:
    # rewardbench.utils.reroll_and_score_dataset: 1, 1/3, 0, 1/2
    rewards = ([3.0, 1, 2, 0], [1.0, 1, 0, 1], [0.0, 2, 2, 1], [2.0, 2, 1, 0])
    table, flat = make_table([("Math", "", 1, each) for each in rewards])
    assert scores.credits(table, flat).tolist() == pytest.approx([1, 1 / 3, 0, 0.5])
    ties = [
        ("Ties", "ref:0", 1, [2.0, 1.0, 0.5]), ("Ties", "tied:0", 2, [3.0, 2.5, 1.0, 0.0]),
        ("Ties", "ref:1", 1, [1.0, 1.0, 0.0]), ("Ties", "tied:1", 3, [2.0, 0.5, 1.0, 0.5, 0.0]),
        ("Ties", "ref:2", 1, [4.0, 0.0]), ("Ties", "tied:2", 2, [1.0, 1.0, 0.0]),
    ]  # fmt: skip
    # rewardbench.utils.process_single_model
    assert scores.ties_score(*make_table(ties), np.arange(6)) == pytest.approx(0.6699999999999999, abs=1e-12)
    subsets = ("Factuality", "Precise IF", "Math", "Safety", "Focus")
    every = [(name, "", 1, each) for name in subsets for each in rewards]
    found = scores.rewardbench2(*make_table([*every, *ties]))
    mean = (1 + 1 / 3 + 0 + 0.5) / 4
    assert found.overall == pytest.approx((5 * mean + 0.67) / 6)
    assert [*found.parts] == [*subsets, "Ties"]


def test_rm_bench_by_hand() -> None:
    # Chosen 3, 2, 1 against rejected 2, 2, 0: wins above the diagonal (1, 1, 1), on it (1, 0, 1), below it (0, 0, 0).
    rows = [(domain, "", 3, [3.0, 2.0, 1.0, 2.0, 2.0, 0.0]) for domain in ("chat", "math", "code", "safety")]
    found = scores.rm_bench(*make_table(rows))
    assert found.parts["hard"] == 1 and found.parts["normal"] == pytest.approx(2 / 3) and found.parts["easy"] == 0
    assert found.overall == pytest.approx((1 + 2 / 3 + 0) / 3) == found.parts["chat"]


def test_rmb_by_hand() -> None:
    rows = [
        ("Pairwise_set/Helpfulness/Chat", "Pairwise_set/Helpfulness", 1, [1.0, 0.0]),
        ("Pairwise_set/Helpfulness/Chat", "Pairwise_set/Helpfulness", 1, [1.0, 1.0]),
        ("Pairwise_set/Helpfulness/Code", "Pairwise_set/Helpfulness", 1, [1.0, 0.0]),
        ("BoN_set/Helpfulness/Chat", "BoN_set/Helpfulness", 1, [2.0, 0.0, 2.0]),
        ("BoN_set/Helpfulness/Chat", "BoN_set/Helpfulness", 1, [2.0, 0.0, 1.0]),
    ]
    found = scores.rmb(*make_table(rows))
    assert found.parts == {"Pairwise_set/Helpfulness": pytest.approx(0.75), "BoN_set/Helpfulness": pytest.approx(0.5)}
    assert found.overall is None


def test_ppe_by_hand() -> None:
    found = scores.ppe(*make_table([("MATH", "", 2, [2.0, 0.0, 1.0, 0.0])]))
    # Pairs: 2 > 1, 2 > 0 right; 0 < 1, 0 = 0 wrong. AUC: (1 + 1 + 0 + 1/2) / 4.
    assert found.parts["MATH accuracy"] == 0.5 and found.parts["MATH auc"] == pytest.approx(0.625)
    # By reward: right, wrong, and a tie of a right and a wrong one.
    chosen = [0.5, 1 / 2 + 0 + 1 / 6 * 0.5, 3 / 4, 1.0]
    best = [0.5, 5 / 6, 1.0, 1.0]
    assert found.parts["MATH best of k, end"] == 1.0
    assert found.parts["MATH best of k, loss"] == pytest.approx(np.mean(np.subtract(best, chosen)))


def test_judgebench_counts_a_tie_as_b() -> None:
    from rm_gallery.data.benchmarks.table import Item, TableBuilder
    from rm_gallery.schema import Comparison, PreferenceGroup

    builder = TableBuilder()
    for number, (label, writer) in enumerate((("A", "gpt"), ("B", "gpt"), ("B", "gpt"), ("A", "claude"))):
        comparison = Comparison(0, 1) if label == "A" else Comparison(1, 0)
        group = PreferenceGroup((), ["x", "y"], (comparison,), "chat", where=f"made.jsonl:{number}")
        builder.add(Item(group, number, "mmlu-pro", None, writer), [1, 1])
    rewards = np.array([1.0, 1.0, 1.0, 1.0, 2.0, 1.0, 2.0, 1.0])  # tie, tie, A, A
    found = scores.judgebench(builder.finish(), rewards)
    assert found.parts["gpt"] == pytest.approx(1 / 3) and found.parts["claude"] == 1
    assert found.overall is None, "the two halves are reported apart"


def test_llmbar_is_the_mean_of_five_subsets() -> None:
    accuracies = {"Natural": 1.0}
    accuracies.update({f"Adversarial/{name}": 0.5 for name in ("Neighbor", "GPTInst", "GPTOut", "Manual")})
    found = scores.llmbar(*make_table(_pairs(accuracies)))
    assert found.overall == pytest.approx(0.6) and found.parts["Adversarial"] == 0.5
