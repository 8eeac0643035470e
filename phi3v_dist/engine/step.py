"""One optimizer step of a DeepSpeed engine, by names of this project.

In: the engine that `zero.make_engine` returns. Every rank calls these functions together and in the same
order, for ZeRO-3 communicates in all of them but the last three.
"""

from __future__ import annotations

from typing import Any

import torch


def backward(engine: Any, loss: torch.Tensor) -> None:
    """Adds the gradients of `loss`, a scalar, to those of the step."""
    engine.backward(loss)


def accumulate(engine: Any) -> None:
    """Ends a micro-step that is not the last one of its optimizer step."""
    engine.step()


def apply(engine: Any) -> None:
    """Ends the last micro-step: clips the gradients, and updates the weights if all gradients are finite."""
    engine.step()


def gradient_norm(engine: Any) -> float:
    """The norm of all gradients of the step before clipping, over all ranks; non-finite if one of them is."""
    return float(engine.get_global_grad_norm() or 0.0)


def was_applied(engine: Any) -> bool:
    """Whether `apply` has updated the weights; False where a gradient was NaN or Inf."""
    return bool(engine.was_step_applied())


def param_groups(engine: Any) -> list[dict[str, Any]]:
    """The optimizer's parameter groups; a learning rate written into them holds from the next step on."""
    groups: list[dict[str, Any]] = engine.optimizer.param_groups
    return groups


def zero_stage(engine: Any) -> int:
    """The ZeRO stage that the engine runs at."""
    return int(engine.zero_optimization_stage())


def destroy(engine: Any) -> None:
    """Removes the engine's hooks; without it 3 of 48 runs on a CPU aborted at exit (DeepSpeed 0.19.8)."""
    engine.destroy()
