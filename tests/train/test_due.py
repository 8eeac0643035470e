"""What is due after a step: the whole truth table, against the rules as docs/architecture.md states them."""

from __future__ import annotations

import itertools

import pytest

from phi3v_dist.train.due import Due, Schedule

SCHEDULE = Schedule(total=12, log_every=2, eval_every=3, save_every=4)
NOT_AT_ALL = Schedule(total=12, log_every=5, eval_every=0, save_every=100)

ROWS = [
    # step, log, evaluate, save, last, stop
    (1, False, False, False, False, False),
    (2, True, False, False, False, False),  # log_every
    (3, True, True, False, False, False),  # eval_every: the window ends there
    (4, True, False, True, False, False),  # save_every: so it does there
    (6, True, True, False, False, False),
    (8, True, False, True, False, False),
    (12, True, True, True, True, False),  # the end: everything, and the checkpoint is waited for
]


@pytest.mark.parametrize(("step", "log", "evaluate", "save", "last", "stop"), ROWS)
def test_after_a_step(step: int, log: bool, evaluate: bool, save: bool, last: bool, stop: bool) -> None:
    assert Due.at(step, SCHEDULE) == Due(log, evaluate, save, last, stop)


@pytest.mark.parametrize("step", range(1, 12))
def test_a_request_to_stop_saves_at_any_step_and_evaluates_no_more_than_it_would(step: int) -> None:
    due = Due.at(step, SCHEDULE, stop=True)
    assert due == Due(log=True, evaluate=step % 3 == 0, save=True, last=True, stop=True)


def test_a_request_to_stop_at_the_last_step_ends_as_a_finished_run() -> None:
    assert Due.at(12, SCHEDULE, stop=True) == Due.at(12, SCHEDULE)


@pytest.mark.parametrize("step", [0, 1, 3, 4, 11])
def test_a_step_whose_data_did_not_come_writes_no_line_and_makes_no_evaluation(step: int) -> None:
    assert Due.at(step, SCHEDULE, stepped=False, stop=True) == Due(False, False, True, True, True)


@pytest.mark.parametrize(
    ("step", "save", "last"), [(3, False, False), (4, True, False), (11, False, False), (12, True, True)]
)
def test_an_evaluation_owed_from_the_last_start_has_its_line_already(
    step: int, save: bool, last: bool
) -> None:
    due = Due.at(step, SCHEDULE, stepped=False, owed=True)
    assert due == Due(log=False, evaluate=True, save=save, last=last, stop=False)


def test_without_intervals_only_the_end_is_due() -> None:
    found = [step for step in range(1, 13) if Due.at(step, NOT_AT_ALL).evaluate]
    assert found == [12]
    assert [step for step in range(1, 13) if Due.at(step, NOT_AT_ALL).log] == [5, 10, 12]


@pytest.mark.parametrize("step", [3, 12])
def test_an_interrupted_evaluation_stops_the_run_with_a_checkpoint(step: int) -> None:
    due = Due.at(step, SCHEDULE).after_interruption()
    assert due == Due(log=True, evaluate=True, save=True, last=True, stop=True, interrupted=True)


def test_whatever_the_settings_what_must_hold_holds() -> None:
    """The whole table: 4 x 4 x 4 intervals, every step, stepped or not, stop or not, owed or not."""
    for log_every, eval_every, save_every in itertools.product(
        (1, 2, 5, 100), (0, 1, 3, 100), (1, 2, 4, 100)
    ):
        schedule = Schedule(10, log_every, eval_every, save_every)
        for step, stepped, stop, owed in itertools.product(range(11), *[(False, True)] * 3):
            due = Due.at(step, schedule, stepped=stepped, stop=stop, owed=owed)
            assert due.last == (step == 10 or stop)
            assert due.stop == (stop and step < 10)
            assert due.save or not due.last, "the last checkpoint is a checkpoint"
            assert not due.log or stepped, "a line belongs to a step"
            assert not (due.log is False and stepped and (due.save or due.evaluate) and not owed)
            assert due.evaluate or not owed
            if stepped and step == 10:
                assert due.log and due.evaluate and due.save
