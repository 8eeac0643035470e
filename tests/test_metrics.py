"""What an answer is worth: honest parsing, honest scores."""

import pytest

from phi3v_dist.metrics import constant_answer, parse_price, parse_product, score


@pytest.mark.parametrize(
    ("text", "price"),
    [
        ("12", 12.0),
        ("$1,290.50", 1290.5),
        ("EUR 1290", 1290.0),
        ("1,234,567", 1234567.0),
        ("about 3 or 4", None),
        ("", None),
        ("none", None),
        ("-5", None),
        ("1.2.3", None),
        ("12,5", None),
    ],
)
def test_a_price_is_one_number_or_nothing(text: str, price: float | None) -> None:
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
    assert scores.price_mae == pytest.approx(5.0)  # (0 + 10) / 2
    assert scores.price_parse_rate == 0.5
    assert (scores.category_accuracy, scores.title_accuracy, scores.exact_match) == (0.5, 0.75, 0.25)
    assert score(truths, ["?"] * 4).price_mae is None
    with pytest.raises(ValueError, match="no answers"):
        score([], [])


def test_the_constant_answer_is_the_best_without_looking() -> None:
    replies = [
        f"Title: T{i // 2}\nCategory: {'AB'[i == 4]}\nPrice: {price}"
        for i, price in enumerate([1, 2, 3, 50, 90])
    ]
    assert constant_answer(replies) == "Title: T0\nCategory: A\nPrice: 3.00"
    assert constant_answer(["free text"]) == ""
