"""The dtypes that a configuration may name."""

from __future__ import annotations

import torch

from shards.common.errors import BadInputError

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype called `name`. Raises BadInputError if it is not in DTYPES."""
    if name not in DTYPES:
        raise BadInputError(f"dtype {name!r}: use {' or '.join(DTYPES)}")
    return DTYPES[name]
