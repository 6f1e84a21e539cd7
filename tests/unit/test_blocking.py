"""A call that hangs is given up at its deadline, is counted, and harms nobody else."""

from __future__ import annotations

import asyncio
import errno
import threading
import time
from collections.abc import Coroutine, Iterator
from typing import Any

import pytest

from storaged.errors import ErrorCode, StoragedError
from storaged.host.blocking import MAX_STUCK, BlockingCalls


@pytest.fixture
def sick() -> Iterator[threading.Event]:
    """A device that answers once this is set; nothing hangs longer than the test."""
    answer = threading.Event()
    yield answer
    answer.set()


def stuck(call: Coroutine[Any, Any, Any]) -> Coroutine[Any, Any, StoragedError]:
    async def run() -> StoragedError:
        with pytest.raises(StoragedError) as caught:
            await call
        assert caught.value.code is ErrorCode.HOST_STUCK
        assert caught.value.hint
        return caught.value

    return run()


def hanging(name: str) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == name]


async def eventually(condition: Any) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 -- it is set from no coroutine
            await asyncio.sleep(0.001)


def test_it_returns_what_the_function_returns_and_runs_it_in_another_thread() -> None:
    async def run() -> None:
        calls = BlockingCalls("a")
        assert await calls("divide", 5, divmod, 7, 2) == (3, 1)
        assert await calls("sort", 5, sorted, [1, 3, 2], reverse=True) == [3, 2, 1]
        assert await calls("look", 5, threading.get_ident) != threading.get_ident()

    asyncio.run(run())


@pytest.mark.parametrize(
    "failure",
    [
        OSError(errno.EIO, "EIO"), StoragedError(ErrorCode.NO_SPACE, "full"), KeyError("bug"),
        TimeoutError(errno.ETIMEDOUT, "Connection timed out"),
    ],
)
def test_it_raises_what_the_function_raises(failure: Exception) -> None:
    def fail() -> None:
        raise failure

    async def run() -> None:
        with pytest.raises(type(failure)) as caught:
            await BlockingCalls("a")("fail", 5, fail)
        assert caught.value is failure

    asyncio.run(run())


def test_the_event_loop_goes_on_meanwhile(sick: threading.Event) -> None:
    async def run() -> None:
        call = asyncio.ensure_future(BlockingCalls("a")("wait", 5, sick.wait, 5))
        await asyncio.sleep(0.01)
        assert not call.done()
        sick.set()
        assert await call is True

    asyncio.run(run())


def test_at_its_deadline_a_call_is_given_up_and_named(sick: threading.Event) -> None:
    async def run() -> None:
        before = time.monotonic()
        error = await stuck(BlockingCalls("a")("flush /dev/loop3", 0.05, sick.wait, 5))
        assert time.monotonic() - before < 2
        assert "flush /dev/loop3" in str(error)
        assert "0.05 s" in error.cause

    asyncio.run(run())


def test_one_owner_is_refused_more_when_too_many_hang_and_others_are_not(sick: threading.Event) -> None:
    ran: list[str] = []

    async def run() -> None:
        ill, well = BlockingCalls("ill"), BlockingCalls("well")
        for _ in range(MAX_STUCK):
            await stuck(ill("wait", 0.01, sick.wait, 5))
        error = await stuck(ill("append", 5, ran.append, "ill"))
        assert str(MAX_STUCK) in error.cause
        assert not ran
        assert await well("add", 5, sum, [1, 2]) == 3

    asyncio.run(run())


def test_when_the_device_answers_again_calls_are_taken_again(sick: threading.Event) -> None:
    async def run() -> None:
        calls = BlockingCalls("a")
        for _ in range(MAX_STUCK):
            await stuck(calls("wait", 0.01, sick.wait, 5))
        sick.set()
        await eventually(lambda: not hanging("a: wait"))
        await asyncio.sleep(0.01)  # their ends are told to the loop
        assert await calls("add", 5, sum, [1, 2]) == 3

    asyncio.run(run())


def test_calls_that_hang_are_counted_until_they_end_and_calls_under_way_are_not(sick: threading.Event) -> None:
    async def run() -> None:
        calls = BlockingCalls("a")
        under_way = asyncio.ensure_future(calls("wait", 5, sick.wait, 5))
        await asyncio.sleep(0.01)
        assert calls.stuck == 0
        for count in range(1, MAX_STUCK):
            await stuck(calls("wait", 0.01, sick.wait, 5))
            assert calls.stuck == count
        sick.set()
        assert await under_way
        await eventually(lambda: calls.stuck == 0)

    asyncio.run(run())


def test_calls_that_fail_do_not_count_as_stuck() -> None:
    async def run() -> None:
        calls = BlockingCalls("a")
        for _ in range(3 * MAX_STUCK):
            with pytest.raises(ZeroDivisionError):
                await calls("divide", 5, divmod, 1, 0)

    asyncio.run(run())


def test_many_calls_at_once_that_are_merely_not_done_yet_are_no_reason_to_refuse() -> None:
    async def run() -> None:
        calls = BlockingCalls("a")
        await asyncio.gather(*(calls("sleep a little", 5, time.sleep, 0.02) for _ in range(5 * MAX_STUCK)))

    asyncio.run(run())


def test_a_thread_that_cannot_be_started_does_not_count_as_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_thread(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    async def run() -> None:
        calls = BlockingCalls("a")
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", no_thread)
            for _ in range(MAX_STUCK):
                with pytest.raises(RuntimeError):
                    await calls("add", 5, sum, [1, 2])
        assert await calls("add", 5, sum, [1, 2]) == 3

    asyncio.run(run())


def test_a_result_that_comes_too_late_is_handed_over(sick: threading.Event) -> None:
    def open_late() -> str:
        sick.wait(5)
        return "a descriptor"

    async def run() -> None:
        late: list[str] = []
        calls = BlockingCalls("a")
        await stuck(calls.with_late_result("open", 0.01, open_late, late.append))
        assert not late
        sick.set()
        await eventually(lambda: late)
        assert late == ["a descriptor"]

    asyncio.run(run())


def test_a_result_that_comes_in_time_or_a_late_failure_is_not_handed_over(sick: threading.Event) -> None:
    def fail_late() -> None:
        sick.wait(5)
        raise OSError(errno.EIO, "EIO")

    async def run() -> None:
        late: list[object] = []
        calls = BlockingCalls("a")
        assert await calls.with_late_result("open", 5, lambda: 7, late.append) == 7
        await stuck(calls.with_late_result("open", 0.01, fail_late, late.append))
        sick.set()
        await eventually(lambda: not hanging("a: open"))
        await asyncio.sleep(0.01)  # its end is told to the loop
        assert not late

    asyncio.run(run())


def test_who_is_cancelled_is_cancelled_at_once_and_the_result_still_handed_over(sick: threading.Event) -> None:
    async def run() -> None:
        late: list[bool] = []
        calls = BlockingCalls("a")
        call = asyncio.ensure_future(calls.with_late_result("wait", 5, lambda: sick.wait(5), late.append))
        await asyncio.sleep(0.01)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        sick.set()
        await eventually(lambda: late == [True])

    asyncio.run(run())


def test_a_stuck_call_does_not_keep_the_daemon_from_ending(sick: threading.Event) -> None:
    async def run() -> None:
        await stuck(BlockingCalls("a")("wait", 0.01, sick.wait, 5))

    asyncio.run(run())
    (left,) = hanging("a: wait")
    assert left.daemon
    sick.set()
    left.join(5)  # the loop is closed by now: its end is nobody's concern, and raises nothing
