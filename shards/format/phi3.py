"""What the shard format knows of the model family that it feeds: two facts about Phi-3-Vision.

They stand here, under the family's name, so that `messages` and `shards.images` refuse at build time what
`phi3v_dist` could not train on. The general rules of the format do not depend on them.
"""

from __future__ import annotations

PHI3_CONTROL_TOKENS = ("<|assistant|>", "<|user|>", "<|system|>", "<|end|>", "<|endoftext|>")
"""The tokens that delimit a turn in the published chat template. Inside a text, the model would read them as
the end of that turn."""

PHI3_TILE_SIDE = 336
"""Side of an image tile in pixels (input size of the published CLIP vision encoder)."""
