"""The value of one answer: product fields read from texts, and functions that compare an answer with the
truth. Pure.

A metric is a function (truth, answer) -> {name: value}; None means that it does not apply to this sample.
`scores` summarises them over a set of answers. METRICS holds the built-in ones; `find_metrics` also takes a
user's own as "package.module:function".

An answer has the lines `Title: ...`, `Category: ...` and `Price: ...`, or the form of the seed project in one
line: `Product: ..., Category: ..., Full Price: ...`. The truth is read from the reference reply in the same
way.
"""

from __future__ import annotations

import importlib
import re
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rapidfuzz.distance import Levenshtein

from shards.common.errors import BadInputError

Metric = Callable[[str, str], Mapping[str, float | None]]
"""(truth, answer) -> {name: value}."""

_NAMES = {
    "title": "title",
    "product": "title",
    "category": "category",
    "price": "price",
    "full price": "price",
}
_NAME = "|".join(sorted(_NAMES, key=len, reverse=True))
_FIELD = re.compile(
    rf"(?:^|,)[ \t]*({_NAME})[ \t]*:[ \t]*(.*?)[ \t]*(?=$|,[ \t]*(?:{_NAME})[ \t]*:)",
    re.IGNORECASE | re.MULTILINE,
)
# Digits, and the signs that may stand between the digits of one number or between two numbers.
_RUN = re.compile(r"[0-9](?:[0-9.,'’ \u00a0\u202f]*[0-9])?")
_SPACE = r"['’ \u00a0\u202f]"
_NUMBERS = (  # (pattern of a number, separator of its thousands, its decimal sign)
    (re.compile(r"(?:[0-9]+|0)(?:\.[0-9]+)?"), "", "."),  # 1290, 1290.5
    (re.compile(r"[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?"), ",", "."),  # 1,290.50
    (re.compile(r"[0-9]{1,2}(?:,[0-9]{2})+,[0-9]{3}(?:\.[0-9]+)?"), ",", "."),  # 1,00,000
    (re.compile(r"[0-9]{1,3}(?:\.[0-9]{3})+,[0-9]{1,2}"), ".", ","),  # 1.290,50
    (re.compile(r"[0-9]{1,3}(?:\.[0-9]{3}){2,}"), ".", ","),  # 1.234.567
    (re.compile(r"[0-9]+,[0-9]{1,2}"), "", ","),  # 12,50
    (re.compile(rf"[0-9]{{1,3}}(?:{_SPACE}[0-9]{{3}})+(?:[.,][0-9]{{1,2}})?"), _SPACE, "[.,]"),  # 1 290,50
)
_DOT_AND_THREE = re.compile(
    r"[1-9][0-9]{0,2}\.[0-9]{3}"
)  # 1.290: a decimal point, or a European thousands separator?
_EURO = re.compile(r"€|\bEUR\b")
_BEFORE = re.compile(r"(?:(?:^|[^A-Za-z0-9_.,\-−–])|\b(?:[A-Z]{3}|Rs\.?|kr\.?))$")
_NOT_AFTER = re.compile(r"%|[.,]?[0-9]|\s*(?:k|m|mn|mio|thousand|million|lakh|crore)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Product:
    """The fields of an answer; None where a field is missing (price: or is not a single number)."""

    title: str | None
    category: str | None
    price: float | None


def parse_price(text: str) -> float | None:
    """The price in `text`, in its own currency unit; None unless there is exactly one number that can be read
    in only one way.

    Accepted: currency signs and codes, thousands separators (1,290  1.290,50  1 290  1'290), decimal commas
    (12,50). Not accepted: two numbers, a negative number, "12k", "5%", and "1.290" without a euro sign, which
    may mean 1.29 or 1290.
    """
    runs = list(_RUN.finditer(text))
    if len(runs) != 1:
        return None
    run = runs[0]
    if not _BEFORE.search(text[: run.start()]) or _NOT_AFTER.match(text[run.end() :]):
        return None
    digits = run.group()
    if _DOT_AND_THREE.fullmatch(digits):
        return float(digits.replace(".", "")) if _EURO.search(text) else None
    for shape, group, decimal in _NUMBERS:
        if shape.fullmatch(digits):
            plain = re.sub(group, "", digits) if group == _SPACE else digits.replace(group, "")
            return float(re.sub(decimal, ".", plain) if decimal != "." else plain)
    return None


def parse_product(answer: str) -> Product:
    """The fields of an answer; of a field that occurs twice, the first."""
    fields: dict[str, str] = {}
    for name, value in _FIELD.findall(answer):
        fields.setdefault(_NAMES[name.lower()], value)
    price = parse_price(fields["price"]) if "price" in fields else None
    return Product(fields.get("title") or None, fields.get("category") or None, price)


def price(truth: str, answer: str) -> dict[str, float | None]:
    """Errors of the price: absolute (price_mae, in its unit) and relative to the truth (0.1 = 10 %;
    price_mape is averaged, price_median_ape is the median). price_parse_rate: 1 if the answer's price can be
    read.

    All None if the truth has no price. An answer whose price cannot be read has no error; it lowers
    price_parse_rate instead, so these metrics must be read together.
    """
    wanted, found = parse_product(truth).price, parse_product(answer).price
    if wanted is None:
        return {"price_mae": None, "price_mape": None, "price_median_ape": None, "price_parse_rate": None}
    error = None if found is None else abs(found - wanted)
    relative = None if error is None or wanted == 0 else error / wanted
    return {
        "price_mae": error,
        "price_mape": relative,
        "price_median_ape": relative,
        "price_parse_rate": float(found is not None),
    }


def category(truth: str, answer: str) -> dict[str, float | None]:
    """category_accuracy: 1 if the category is the same, else 0 (also for an answer without one)."""
    return {"category_accuracy": _same(parse_product(truth).category, parse_product(answer).category)}


def title(truth: str, answer: str) -> dict[str, float | None]:
    """title_accuracy: 1 if the title is the same, else 0 (also for an answer without one)."""
    return {"title_accuracy": _same(parse_product(truth).title, parse_product(answer).title)}


def exact_match(truth: str, answer: str) -> dict[str, float | None]:
    """exact_match: 1 if the whole answer equals the truth, apart from surrounding space."""
    return {"exact_match": float(truth.strip() == answer.strip())}


def anls(truth: str, answer: str) -> dict[str, float | None]:
    """anls: normalised Levenshtein similarity, 0 below a half (metric of document VQA, arXiv:1907.00490)."""
    similarity = Levenshtein.normalized_similarity(truth.strip().lower(), answer.strip().lower())
    return {"anls": similarity if similarity >= 0.5 else 0.0}


METRICS: dict[str, Metric] = {
    "price": price,
    "category": category,
    "title": title,
    "exact_match": exact_match,
    "anls": anls,
}


def find_metrics(names: Sequence[str]) -> list[Metric]:
    """The functions of `names`: keys of METRICS, or "package.module:function" for a user's own.

    Raises BadInputError for a name that is neither.
    """
    found = []
    for name in names:
        module, colon, function = name.partition(":")
        if not colon:
            if name not in METRICS:
                known = ", ".join(METRICS)
                raise BadInputError(f"no metric {name!r}; there are {known}, and your own as module:function")
            found.append(METRICS[name])
            continue
        try:
            metric = getattr(importlib.import_module(module), function)
        except (ImportError, AttributeError, ValueError) as error:
            raise BadInputError(
                f"metric {name!r}: {error}; it must be module:function, importable from here (PYTHONPATH)"
            ) from error
        if not callable(metric):
            raise BadInputError(f"metric {name!r} is not a function")
        found.append(metric)
    return found


def constant_answer(replies: Sequence[str]) -> str:
    """The best answer that does not depend on the image: the most frequent title and category and the median
    price of `replies`.
    """
    products = [parse_product(reply) for reply in replies]
    titles = Counter(p.title for p in products if p.title).most_common(1)
    categories = Counter(p.category for p in products if p.category).most_common(1)
    prices = [p.price for p in products if p.price is not None]
    lines = [
        f"Title: {titles[0][0]}" if titles else "",
        f"Category: {categories[0][0]}" if categories else "",
        f"Price: {statistics.median(prices):.2f}" if prices else "",
    ]
    return "\n".join(line for line in lines if line)


def _same(wanted: str | None, found: str | None) -> float | None:
    return None if wanted is None else float(wanted == found)
