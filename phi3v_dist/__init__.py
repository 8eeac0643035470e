"""Training of Phi-3-Vision on the GPUs. `launch` starts what is here; from `shards` only `shards.common` and
`shards.format` are used.

Floors, from the ground up; a module imports from its own floor and from those below it:

    exits, config                  exit codes; the typed settings of a run, with all defaults
    processor, parallel, engine    images, text -> tensors; groups of ranks; everything that knows DeepSpeed
    model, budget                  Phi-3-Vision itself; memory, FLOPs and time computed in advance
    run, data                      the run directory; dataset -> plan -> packed rows
    pretrained, checkpoint         first weights; slices that any number of ranks can read
    evaluation, tracking           answers and scores; metrics.jsonl, W&B, report
    replay, export, train          one row again; the published layout; the loop

`train/loop.py` shows a whole run from top to bottom. docs/architecture.md has the picture.
"""

__version__ = "0.1.0"
