"""preprocessor_config.json of a checkpoint: the published facts of the processor, read and written.

In: a checkpoint directory. Out: num_crops, or the file in the published layout.
"""

from __future__ import annotations

import json
from pathlib import Path

from shards.common.errors import BadInputError

PREPROCESSOR = "preprocessor_config.json"
# Where loaders that run the model's own code find that code; this package and vLLM bring their own.
CODE_REPOSITORY = "microsoft/Phi-3-vision-128k-instruct"
# Of CLIP, as in the published file: per channel R, G, B, of values from 0 to 1.
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)


def read_num_crops(directory: str | Path) -> int:
    """num_crops of a checkpoint. Raises BadInputError if the file is missing or num_crops is unusable."""
    file = Path(directory) / PREPROCESSOR
    if not file.exists():
        raise BadInputError(f"{directory}: no {PREPROCESSOR}; download it with the model, or pass num_crops")
    num_crops = json.loads(file.read_text()).get("num_crops")
    if not isinstance(num_crops, int) or num_crops < 1:
        raise BadInputError(f"{file}: num_crops is {num_crops!r}, expected a whole number from 1, such as 16")
    return num_crops


def write_preprocessor_config(directory: Path, num_crops: int, image_tokens: int = 144) -> None:
    """Writes the file in the published layout. image_tokens: of one view, without separators."""
    config = {
        "auto_map": {
            "AutoProcessor": f"{CODE_REPOSITORY}--processing_phi3_v.Phi3VProcessor",
            "AutoImageProcessor": f"{CODE_REPOSITORY}--image_processing_phi3_v.Phi3VImageProcessor",
        },
        "num_crops": num_crops,
        "image_mean": list(IMAGE_MEAN),
        "image_processor_type": "Phi3VImageProcessor",
        "image_std": list(IMAGE_STD),
        "processor_class": "Phi3VProcessor",
        "num_img_tokens": image_tokens,
    }
    (directory / PREPROCESSOR).write_text(json.dumps(config, indent=2) + "\n")
