"""Training of Phi-3-Vision: config, model, processor, data, parallelism, loop, checkpoints, evaluation,
export.

The only thing taken from `shards` is the shard format. `launch` starts what is here.
"""

__version__ = "0.1.0"
