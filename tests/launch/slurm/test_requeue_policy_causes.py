"""Which of several failures is the cause, and what counts as standing still."""

from __future__ import annotations

import pytest

from launch.slurm.requeue_policy import OVER, REQUEUE, judge


def note(outcome: str, **facts):
    return {"outcome": outcome, "host": "node1", "time": 10.0, **facts}


def failed(kind: str, message: str, time: float = 10.0):
    return note("failed", type=kind, message=message, time=time)


def lived(place: int | None, failure: str = "", then: str = REQUEUE):
    return {"then": then, "place": place, "failure": failure}


def test_of_several_causes_the_earliest_is_told_whatever_its_rank():
    told = {0: failed("KeyError", "late", time=12.0), 1: failed("ArithmeticError", "early", time=11.0)}
    assert judge(1, told, [], 0).why == "rank 1 on node1: ArithmeticError: early"


def test_of_several_mistakes_the_earliest_is_told():
    told = {0: note("mistake", message="late", time=12.0), 1: note("mistake", message="early", time=11.0)}
    assert judge(2, told, [], 0).why == "early"


@pytest.mark.parametrize("kind", ["ConnectionResetError", "BrokenPipeError", "DistBackendError"])
def test_a_peer_s_end_is_known_by_its_type_alone(kind):
    told = {0: failed(kind, "", time=1.0), 1: failed("ArithmeticError", "the cause", time=2.0)}
    assert judge(1, told, [], 0).failure == "ArithmeticError: the cause"


@pytest.mark.parametrize(("message", "line"), [("", "KeyError: "), ("a\n at 0x7f01\n at 0x7f02", "KeyError: a")])
def test_a_failure_is_known_by_its_first_line(message, line):
    assert judge(1, {0: failed("KeyError", message)}, [], 0).failure == line


def test_the_same_exception_ends_a_stage_without_checkpoints_too():
    told = {0: failed("KeyError", "x")}
    assert judge(1, told, [lived(None, "KeyError: x")], None).then == OVER


@pytest.mark.parametrize("notes", [{0: failed("KeyError", "another each time")}, {1: note("left", why="a signal")}])
def test_failures_of_many_kinds_at_one_place_end_as_well(notes):
    past = [lived(600, f"KeyError: {number}") for number in range(4)]
    assert judge(1, notes, past, 600, tasks=2).then == OVER
    assert judge(1, notes, past[1:], 600, tasks=2).then == REQUEUE


@pytest.mark.parametrize("then", ["over", "done"])
def test_who_was_started_again_by_hand_has_its_starts_anew(then):
    past = [lived(600), lived(600, then=then), lived(600), lived(600)]
    assert judge(0, {0: note("stopped", why="a signal")}, past, 600).then == REQUEUE


def test_three_losses_in_a_row_are_broken_by_another_end():
    lost = judge(137, {}, [], 600, tasks=2).failure
    past = [lived(600, lost), lived(600, "KeyError: x"), lived(600, lost)]
    assert judge(137, {}, past, 600, tasks=2).then == REQUEUE


def test_a_rank_that_died_while_the_others_saved_is_told():
    verdict = judge(139, {0: note("stopped", why="was preempted")}, [], 600, tasks=2)
    assert (verdict.then, verdict.why) == (REQUEUE, "rank 1 ended without a note (status 139 of srun: signal 11)")
