"""How long a save stops training: checkpoint.async against waiting for the disk, at 200 million parameters.

    python benchmarks/checkpoint.py [--rounds 3] [--folder DIR] [--json PATH]

One rank, a ZeRO-3 engine of this architecture with Adam's moments (12 bytes a parameter). The two ways
take turns to save the same state to the same disk. Measured is the time until `Saver.save` returns and
training may change the state again. A write in the background ends before the next measurement. Medians.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from benchmarks.record import Comparison, report
from phi3v_dist.checkpoint.meta import Progress
from phi3v_dist.checkpoint.save import ModelCard, Saver
from phi3v_dist.config import CheckpointConfig, load_config
from phi3v_dist.engine.zero import make_engine, partitioned_parameters, prepare_deepspeed, zero_config
from phi3v_dist.model.configuration import Phi3VConfig
from phi3v_dist.model.hub import build_model
from phi3v_dist.parallel.mesh import open_mesh
from phi3v_dist.train.optim import parameter_groups

BAR = 0.2


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=14, help="of 13 million parameters each")
    parser.add_argument("--folder", type=Path, help="on the disk to be measured")
    parser.add_argument("--json")
    options = parser.parse_args()
    config = load_config(Path(__file__).parents[1] / "configs/tiny.yaml")
    fields = dict(config.model.config or {})
    fields |= {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": options.layers}
    fields |= {"num_attention_heads": 32, "num_key_value_heads": 32, "pad_token_id": None}
    with open_mesh(600.0) as mesh, tempfile.TemporaryDirectory(dir=options.folder) as work:
        prepare_deepspeed(mesh)
        with partitioned_parameters(zero_config(config, 1), torch.float32):
            model = build_model(Phi3VConfig(**fields), torch.float32)
        engine = make_engine(model, parameter_groups(model, config.train), config, accumulation=1)
        numel = 0
        for flat in engine.optimizer.fp32_partitioned_groups_flat:
            engine.optimizer.optimizer.state[flat] = {
                "step": torch.tensor(1.0),
                **{kind: torch.rand_like(flat) for kind in ("exp_avg", "exp_avg_sq")},
            }
            numel += flat.numel()
        print(f"{numel / 1e6:.0f} million parameters that learn, {12 * numel / 1e9:.2f} GB a checkpoint")
        card = ModelCard(fields, 1, Path(work), Path(work))
        about = {"config": config.model_dump(mode="json")}
        savers = {}
        for way in ("waiting", "async"):
            settings = CheckpointConfig.model_validate({"async": way == "async", "keep_last": 1})
            folder = Path(work) / way
            savers[way] = Saver(
                engine, folder, mesh,
                card=card, run=about, wandb_id=folder / "none", config=settings, saved_step=0,
            )  # fmt: skip
        held: dict[str, list[float]] = {"waiting": [], "async": []}
        for step in range(1, options.rounds + 1):
            for way, saver in savers.items():
                began = time.perf_counter()
                saver.save(Progress(step=step))
                held[way].append(time.perf_counter() - began)
                assert saver.save_surely(Progress(step=step)) is None
                print(f"round {step}, {way}: held up {held[way][-1]:.2f} s", flush=True)
        engine.destroy()
    ours, theirs = (statistics.median(held[way]) for way in ("async", "waiting"))
    ratio = ours / theirs
    comparison = Comparison(
        f"training held up by a save of {numel / 1e6:.0f} million parameters, checkpoint.async",
        "waiting for the disk", ours, theirs, "s", ratio, f"at most {BAR} of it", ratio <= BAR,
    )  # fmt: skip
    return report("checkpoint", [comparison], options.json)


if __name__ == "__main__":
    raise SystemExit(main())
