"""The examples of docs/model.md run as they stand, on a tiny checkpoint."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from phi3v_dist.model.hub import init_random_checkpoint
from phi3v_dist.processor.tokenizer import train_tokenizer

PAGE = Path(__file__).parents[2] / "docs/model.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)


@pytest.fixture(scope="module")
def names(tiny, tmp_path_factory) -> dict:
    """What the first example leaves behind, and what the others take for granted."""
    directory = tmp_path_factory.mktemp("docs")
    Image.fromarray(np.random.RandomState(0).randint(0, 256, (80, 120, 3), np.uint8)).save(
        directory / "shoe.jpg"
    )
    train_tokenizer(["What is shown?"] * 3, directory / "tokenizer", 140)
    init_random_checkpoint(
        tiny.config(),
        directory / "model",
        1,
        dtype=torch.bfloat16,
        num_crops=4,
        tokenizer_dir=directory / "tokenizer",
    )
    code = EXAMPLES[0].replace("/models/Phi-3-vision-128k-instruct", str(directory / "model"))
    names: dict = {}
    exec(code.replace("shoe.jpg", str(directory / "shoe.jpg")), names)
    row = tiny.pack([tiny.document(1, 20), tiny.document(2, 9, ((1, 2),))])
    return names | {"row": row, "world_size": 1, "accumulation": 1, "global_target_tokens": row.num_targets}


def test_ask_a_picture(names) -> None:
    assert names["answer"].shape[1] > names["inputs"]["input_ids"].shape[1]
    assert names["model"].dtype == torch.bfloat16


def test_the_others(names) -> None:
    assert len(EXAMPLES) == 3
    for example in EXAMPLES[1:]:
        exec(example, names)
    assert names["loss"].isfinite()
