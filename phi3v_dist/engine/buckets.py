"""Sizes of DeepSpeed's buffers, in elements: `zero` sets them, the memory estimate counts them.

One or two decoder layers of the published model (113 million parameters each). DeepSpeed's defaults are
several times as large.
"""

REDUCE_BUCKET = 125_000_000
"""Gradients that are reduced together."""
PREFETCH_BUCKET = 125_000_000
"""Parameters that are gathered ahead of their use: about one decoder layer."""
MAX_LIVE = 300_000_000
"""Parameters that are gathered at the same time."""
