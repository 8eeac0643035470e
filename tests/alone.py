"""The mesh of one process that needs no process group."""

from typing import Any

import torch

from phi3v_dist.parallel.mesh import Mesh


class Alone(Mesh):
    def on_main(self, work: Any) -> Any:
        return work()

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def sum(self, values: list[float]) -> list[float]:
        return values


ALONE = Alone(0, 1, 0, torch.device("cpu"))
