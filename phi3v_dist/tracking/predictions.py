"""Reads the answers of an evaluation back from its directory, for the report and for W&B."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phi3v_dist.run.layout import PREDICTIONS, PREDICTIONS_TABLE

_FIXED = ("key", "slice", "prompt", "truth", "prediction", "picture")


@dataclass(frozen=True)
class StoredAnswer:
    """One answered sample. prompt: as rendered for the model. truth: the reference reply. values: of every
    metric, None where it does not apply. image: a small JPEG, None where none was kept.
    """

    key: str
    prompt: str
    truth: str
    prediction: str
    values: dict[str, float | None]
    image: bytes | None

    @property
    def is_exact(self) -> bool:
        """Whether the prediction equals the truth, apart from surrounding space."""
        return self.truth.strip() == self.prediction.strip()


def read_predictions(folder: Path, most: int | None = None) -> list[StoredAnswer]:
    """The first `most` answers (None: all) of the evaluation in `folder`, empty if it has none.

    They come from predictions.parquet, or without images from predictions.jsonl where that is missing.
    """
    if (folder / PREDICTIONS_TABLE).exists():
        import pyarrow.parquet as pq  # here, so that importing the tracker stays cheap

        return [_answer(record) for record in pq.read_table(folder / PREDICTIONS_TABLE)[:most].to_pylist()]
    if (folder / PREDICTIONS).exists():
        lines = (folder / PREDICTIONS).read_text(encoding="utf-8").splitlines()
        return [_answer(json.loads(line)) for line in lines[:most]]
    return []


def _answer(record: dict[str, Any]) -> StoredAnswer:
    return StoredAnswer(
        key=str(record["key"]),
        prompt=str(record.get("prompt", "")),
        truth=str(record["truth"]),
        prediction=str(record["prediction"]),
        values={name: value for name, value in record.items() if name not in _FIXED},
        image=record.get("picture"),
    )
