"""What an answer is worth: honest parsing, honest scores."""

import math

import pytest

from phi3v_dist.evaluation.metrics import (
    METRICS,
    anls,
    constant_answer,
    find_metrics,
    parse_price,
    parse_product,
)
from phi3v_dist.evaluation.scores import Scores, sample_values, slices, summarise
from shards.common.errors import BadInputError


def score(truths: list[str], answers: list[str]) -> Scores:
    return summarise(
        sample_values([METRICS[n] for n in ("price", "category", "title", "exact_match")], truths, answers)
    )


@pytest.mark.parametrize(
    ("text", "price"),
    [
        ("12", 12.0),
        ("$1,290.50", 1290.5),
        ("EUR 1290", 1290.0),
        ("1,234,567", 1234567.0),
        ("1.290,50 €", 1290.5),
        ("12,5", 12.5),
        ("€ 1.290", 1290.0),
        ("1 290,50", 1290.5),
        ("1'290.50", 1290.5),
        ("1,00,000", 100000.0),
        ("Rs. 500", 500.0),
        ("0.125", 0.125),
        ("$12.", 12.0),
        ("1.290", None),  # 1.29 or 1290?
        ("about 3 or 4", None),
        ("", None),
        ("none", None),
        ("-5", None),
        ("1.2.3", None),
        ("10, 20", None),
        ("12k", None),
        ("12.5 million", None),
        ("5%", None),
        ("A4", None),
        ("1e3", None),
    ],
)
def test_a_price_is_one_number_that_reads_in_one_way_or_nothing(text: str, price: float | None) -> None:
    assert parse_price(text) == price


def test_fields_are_lines_and_the_first_of_a_name_counts() -> None:
    product = parse_product("Title: Big Bag\n category : BAGS \nPrice: 3.50\nPrice: 9")
    assert (product.title, product.category, product.price) == ("Big Bag", "BAGS", 3.5)
    seed = parse_product("Product: Bag, red, Category: BAGS, Full Price: 1,290.5")
    assert (seed.title, seed.category, seed.price) == ("Bag, red", "BAGS", 1290.5)
    assert parse_product("a bag for 3.50") == parse_product("")
    assert parse_product("Title:\nCategory:\nPrice:").title is None


def test_scores_count_what_cannot_be_read_as_wrong_but_not_as_a_price_error() -> None:
    truths = [f"Title: T{i}\nCategory: C\nPrice: {100 + i}" for i in range(4)]
    answers = [truths[0], "Title: T1\nCategory: C\nPrice: 111", "nothing", "Title: T3\nCategory: X\nPrice: ?"]
    scores = score(truths, answers)
    assert scores.samples == 4
    assert scores.values["price_mae"] == pytest.approx(5.0)  # (0 + 10) / 2
    assert scores.values["price_mape"] == pytest.approx(10 / 101 / 2)
    assert scores.values["price_median_ape"] == pytest.approx(10 / 101 / 2)
    assert scores.values["price_parse_rate"] == 0.5 and scores.counted["price_mae"] == 2
    names = ("category_accuracy", "title_accuracy", "exact_match")
    assert [scores.values[name] for name in names] == [0.5, 0.75, 0.25]
    assert score(truths, ["?"] * 4).values["price_mae"] is None
    with pytest.raises(ValueError, match="no answers"):
        score([], [])


def test_intervals_hold_the_value_and_shrink_with_more_samples() -> None:
    rows = [{"x": float(i % 10), "x_median": float(i % 10)} for i in range(40)]
    few, many = summarise(rows[:20], 1), summarise(rows * 20, 1)
    for scores in (few, many):
        for name in ("x", "x_median"):
            interval = scores.intervals[name]
            assert interval is not None and interval[0] <= (scores.values[name] or 0) <= interval[1]
    assert few.intervals["x"] is not None and many.intervals["x"] is not None
    assert math.dist(few.intervals["x"][:1], few.intervals["x"][1:]) > 2 * math.dist(
        many.intervals["x"][:1], many.intervals["x"][1:]
    )
    assert summarise(rows, 1) == summarise(rows[::-1], 1) != summarise(rows, 2)


def test_slices_share_out_the_answers() -> None:
    found = slices([{"x": 1.0}, {"x": 3.0}, {"x": None}, {"x": 5.0}], ["a", "b", "b", None])
    assert list(found) == ["b", "a"]
    assert (found["b"].samples, found["b"].values["x"], found["a"].values["x"]) == (2, 3.0, 1.0)


def test_metrics_are_names_or_functions_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_metrics(["price", "anls"]) == [METRICS["price"], METRICS["anls"]]
    assert find_metrics(["phi3v_dist.evaluation.metrics:anls"]) == [anls]
    for name, why in (
        ("prise", "there are price"),
        ("no.such:f", "No module"),
        ("math:pi", "not a function"),
    ):
        with pytest.raises(BadInputError, match=why):
            find_metrics([name])
    with pytest.raises(BadInputError, match="metric gcd failed on the answer 'b'"):
        sample_values([math.gcd], ["a"], ["b"])  # type: ignore[list-item]


def test_anls_is_one_for_the_same_and_nothing_below_a_half() -> None:
    assert anls(" Bag", "bag ") == {"anls": 1.0}
    assert anls("kitten", "sitting")["anls"] == pytest.approx(4 / 7)
    assert anls("abc", "xyz") == {"anls": 0.0}


def test_the_constant_answer_is_the_best_without_looking() -> None:
    replies = [
        f"Title: T{i // 2}\nCategory: {'AB'[i == 4]}\nPrice: {price}"
        for i, price in enumerate([1, 2, 3, 50, 90])
    ]
    assert constant_answer(replies) == "Title: T0\nCategory: A\nPrice: 3.00"
    assert constant_answer(["free text"]) == ""
