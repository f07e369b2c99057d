from __future__ import annotations

import pytest

from launch.slurm.requeue_policy import DONE, OVER, REQUEUE, Verdict, judge


def note(outcome: str, **facts):
    return {"outcome": outcome, "host": "node1", "time": 10.0, **facts}


def failed(kind: str, message: str, time: float = 10.0):
    return note("failed", type=kind, message=message, time=time)


def lived(place: int, failure: str = "", then: str = REQUEUE):
    return {"then": then, "place": place, "failure": failure}


OWN = {2: failed("ArithmeticError", "one too many", time=12.0)}
ECHO = failed("RuntimeError", "[gloo] Connection closed by peer [10.0.0.1]", time=11.0)


def test_done_and_stopped():
    assert judge(0, {0: note("done"), 1: note("done"), 2: note("idle")}, [], 96).then == DONE
    stopped = judge(0, {0: note("stopped", why="was preempted"), 1: note("stopped", why="was preempted")}, [], 96)
    assert stopped == Verdict(REQUEUE, "was preempted")


def test_a_mistake_does_not_come_back():
    told = {0: note("mistake", type="ValueError", message="lower lr"), 1: ECHO}
    assert judge(2, told, [], 0) == Verdict(OVER, "lower lr", failure="mistake")


def test_an_exception_comes_back_once_at_a_place():
    first = judge(1, OWN, [], 600)
    assert (first.then, first.failure) == (REQUEUE, "ArithmeticError: one too many")
    assert judge(1, OWN, [lived(600, first.failure)], 600).then == OVER
    assert judge(1, OWN, [lived(0, first.failure)], 600).then == REQUEUE  # it got further meanwhile
    assert judge(1, OWN, [lived(600, "KeyError: x")], 600).then == REQUEUE  # another one


def test_the_cause_is_no_echo_of_it():
    assert "rank 2" in judge(1, {0: ECHO, **OWN}, [], 600).why


def test_a_rank_without_a_word_comes_back_twice_at_a_place():
    told = {0: ECHO, 1: note("left", why="was asked to end, or another rank died"), 3: ECHO}
    first = judge(137, told, [], 600, tasks=4)
    assert first.then == REQUEUE
    assert "rank 2 ended without a note (status 137 of srun: signal 9)" in first.why
    assert judge(137, told, [lived(600, first.failure)], 600, tasks=4).then == REQUEUE
    assert judge(137, told, [lived(600, first.failure)] * 2, 600, tasks=4).then == OVER


@pytest.mark.parametrize(("place", "then"), [(600, OVER), (0, OVER), (None, REQUEUE)])
def test_starts_that_get_no_further_end(place, then):
    told = {0: note("stopped", why="the time limit is near")}
    verdict = judge(0, told, [lived(place)] * 4, place)
    assert verdict.then == then
    assert ("give jobs more time" in verdict.why) == (then == OVER)
    assert judge(0, told, [lived(place)] * 3, place).then == REQUEUE


def test_progress_is_no_standstill():
    told = {0: note("stopped", why="the time limit is near")}
    assert judge(0, told, [lived(place) for place in range(0, 4000, 100)], 4000).then == REQUEUE


def test_who_was_replaced_does_not_come_back():
    assert judge(0, {0: note("superseded", type="Superseded", message="")}, [], 600).then == OVER


def test_who_left_in_time_without_an_answer_comes_back():
    told = {rank: note("left", why="was preempted, and no step ended") for rank in range(4)}
    assert judge(0, told, [], 600) == Verdict(REQUEUE, "was preempted, and no step ended")


def test_done_without_all_is_not_done():
    assert judge(137, {0: note("done")}, [], 600, tasks=2).then == REQUEUE


@pytest.mark.parametrize("notes", [OWN, {0: ECHO}], ids=["raised", "lost"])
def test_failures_that_differ_each_time_are_a_standstill_too(notes):
    past = [lived(600, f"KeyError: {number}") for number in range(4)]
    assert judge(1, notes, past, 600, tasks=4).then == OVER
    assert judge(1, notes, [lived(600, f"KeyError: {number}", then=OVER) for number in range(4)], 600).then == REQUEUE


def test_a_killed_rank_is_named_by_its_supervisor_and_counts_in_the_job_and_beyond():
    told = {3: note("killed", why="was killed by SIGKILL", time=12.0), 0: ECHO}
    first = judge(137, told, [], 600, tasks=4)
    assert first == Verdict(REQUEUE, "rank 3 was killed by SIGKILL", failure="rank 3 was killed by SIGKILL")
    past = [lived(600, first.failure, "restarted"), lived(600, first.failure)]
    assert judge(137, told, past[1:], 600, tasks=4).then == REQUEUE
    assert judge(137, told, past, 600, tasks=4).then == OVER
    assert judge(137, told, past, 1200, tasks=4).then == REQUEUE


def test_restarts_without_progress_count_as_requeues_do():
    past = [lived(600, f"rank {rank} was killed by SIGKILL", "restarted") for rank in range(4)]
    told = {9: note("killed", why="was killed by SIGKILL")}
    assert "5 consecutive starts made no progress" in judge(137, told, past, 600).why
    assert judge(137, told, past[1:], 600).then == REQUEUE
