"""The page about a run: whole, escaped, and in need of nothing from outside."""

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from phi3v_dist.report import report
from shards.format import BadInputError


def test_a_page_holds_curves_scores_and_answers(tmp_path: Path) -> None:
    lines = [{"train/global_step": s, "train/loss": 1 / s, "eval/price_mae": 5.0} for s in range(1, 9)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text + '{"train/glo')
    scores = tmp_path / "eval" / "after"
    scores.mkdir(parents=True)
    (scores / "scores.json").write_text(json.dumps({"scores": {"samples": 1, "price_mae": None}}))
    answers = [{"key": "k", "truth": "<b>", "prediction": "<script>alert(1)</script>"}]
    (scores / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in answers))
    page = report(tmp_path)
    HTMLParser().feed(page)
    assert page.count("<svg") == 2 and "step 8: 0.125" in page
    assert "&lt;script&gt;" in page and "<script" not in page and "http" not in page
    assert page.count("<tr") == page.count("</tr>") and page.count("<figure") == page.count("</figure>")


def test_a_directory_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="no metrics.jsonl"):
        report(tmp_path)
