"""What benchmarks/ethics.py trains on and holds out."""

import pytest

from benchmarks.ethics import connect, make_rows, rank, take

CHAIN = [("b", "c"), ("a", "b"), ("c", "d")]


def test_held_out_pairs_share_no_situation_with_the_others() -> None:
    pairs = [*CHAIN, ("p", "q"), ("x", "y"), ("z", "y")]
    held_out, others = take(connect(pairs), 2)
    inside, outside = ({text for each in sets for pair in each for text in pair} for sets in (held_out, others))
    assert inside and outside and not inside & outside
    assert sorted(pair for each in held_out + others for pair in each) == sorted(pairs)


def test_ranks_of_a_chain() -> None:
    assert rank(CHAIN) == ["a", "b", "c", "d"]
    assert rank([("x", "y"), ("z", "y")]) is None  # x and z are not compared
    assert rank([("x", "y"), ("y", "x")]) is None
    assert make_rows([CHAIN], "rankings") == [{"responses": ["a", "b", "c", "d"], "ranks": [1, 2, 3, 4]}]
    scores = make_rows([CHAIN, [("p", "q")]], "scores")
    assert [score for row in scores for score in row["scores"]] == pytest.approx([1.8, 0.6, -0.6, -1.8, 1, -1])


def test_unrelated_rows_are_as_many_pairs() -> None:
    sets = [[(f"{n}a", f"{n}b"), (f"{n}b", f"{n}c")] for n in range(6)]
    rows = make_rows(sets, "unrelated")
    made = [row for row in rows if row["chosen"][0] != row["rejected"][0]]
    assert len(rows) == 12 and len(made) == 4
    assert all(row["chosen"].endswith("a") and row["rejected"].endswith("c") for row in made)
