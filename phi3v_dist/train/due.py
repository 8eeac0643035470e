"""What is due after a step of the train loop. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Schedule:
    """When a run does what, in optimizer steps. total: of the run. log_every, eval_every (0: at the end
    alone), save_every: steps between two of them.
    """

    total: int
    log_every: int
    eval_every: int
    save_every: int


@dataclass(frozen=True)
class Due:
    """log: write the metrics of the window. evaluate: run the evaluation. save: write a checkpoint. last:
    that checkpoint must be on the disk before the process ends. stop: the run ends before it is done.
    interrupted: an evaluation did not finish; the next start makes it, and writes the line of this step.
    """

    log: bool
    evaluate: bool
    save: bool
    last: bool
    stop: bool
    interrupted: bool = False

    @classmethod
    def at(
        cls, step: int, schedule: Schedule, *, stepped: bool = True, stop: bool = False, owed: bool = False
    ) -> Due:
        """What is due when `step` optimizer steps are done.

        stepped: whether one was just done; it was not if its data did not come, or if only an evaluation is
        made that the last start owes. stop: a rank was asked to stop. owed: such an evaluation is still to be
        made.
        """
        done = step == schedule.total
        save = done or stop or step % schedule.save_every == 0
        evaluate = done or (schedule.eval_every > 0 and step % schedule.eval_every == 0)
        # A window ends wherever the run may be interrupted, so that a resumed run writes the same lines.
        log = stepped and (save or evaluate or step % schedule.log_every == 0)
        return cls(
            log=log,
            evaluate=owed or (stepped and evaluate),
            save=save,
            last=done or stop,
            stop=stop and not done,
        )

    def after_interruption(self) -> Due:
        """The same when the evaluation was interrupted by a request to stop: the run stops now."""
        return replace(self, save=True, last=True, stop=True, interrupted=True)
