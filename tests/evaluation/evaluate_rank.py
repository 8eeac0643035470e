"""One rank: evaluates MODEL on DATASET with whole and with partitioned weights into OUT/whole and
OUT/partitioned, then on DAMAGED, where an image cannot be read.

    torchrun ... evaluate_rank.py MODEL DATASET DAMAGED OUT
"""

import sys
from dataclasses import replace
from pathlib import Path

from phi3v_dist.checkpoint.restore import find_source
from phi3v_dist.evaluation.evaluate import EvalSettings, evaluate, write_evaluation
from phi3v_dist.parallel.mesh import open_mesh
from shards.common.errors import BadInputError

SETTINGS = EvalSettings(split="train", samples=7, batch_size=2, max_new_tokens=8)


def main() -> None:
    model, dataset, damaged, out = sys.argv[1:]
    with open_mesh(60) as mesh:
        for weights in ("whole", "partitioned"):
            result = evaluate(find_source(model), dataset, replace(SETTINGS, weights=weights), mesh=mesh)
            if mesh.is_main:
                write_evaluation(result, Path(out) / weights)
        try:
            settings = replace(SETTINGS, weights="partitioned", loss=False)
            evaluate(find_source(model), damaged, settings, mesh=mesh)
        except BadInputError as error:
            (Path(out) / f"refused-{mesh.rank}").write_text(str(error))


if __name__ == "__main__":
    main()
