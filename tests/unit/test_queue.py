"""The queue hands a key out once, however often it is woken, and never to two at a time."""

import asyncio

from attune.reconcile.queue import Key, WorkQueue

CALLS = Key("Dataset", "team", "calls")
LORA = Key("FineTune", "team", "lora")


def run(scenario: object) -> None:
    asyncio.run(asyncio.wait_for(scenario, 10))  # type: ignore[arg-type]


def test_woken_often_is_handed_out_once() -> None:
    async def scenario() -> None:
        queue = WorkQueue()
        for _ in range(5):
            queue.wake(CALLS)
        queue.wake(LORA)
        assert queue.depth == 2
        assert [await queue.take(), await queue.take()] == [CALLS, LORA]
        assert queue.depth == 0

    run(scenario())


def test_woken_while_worked_on_is_handed_out_again_afterwards() -> None:
    async def scenario() -> None:
        queue = WorkQueue()
        queue.wake(CALLS)
        assert await queue.take() == CALLS
        queue.wake(CALLS)
        queue.wake(CALLS)
        assert queue.depth == 0
        queue.done(CALLS)
        assert queue.depth == 1
        assert await queue.take() == CALLS
        queue.done(CALLS)
        assert queue.depth == 0

    run(scenario())


def test_earliest_of_several_times_counts() -> None:
    async def scenario() -> None:
        queue = WorkQueue()
        queue.wake(CALLS, after=3600)
        queue.wake(CALLS, after=0.01)
        queue.wake(CALLS, after=7200)
        assert await queue.take() == CALLS

    run(scenario())


def test_looking_now_makes_a_later_look_needless() -> None:
    async def scenario() -> None:
        queue = WorkQueue()
        queue.wake(CALLS, after=0.01)
        queue.wake(CALLS)
        await queue.take()
        queue.done(CALLS)
        await asyncio.sleep(0.05)  # longer than the look that was asked for
        assert queue.depth == 0

    run(scenario())


def test_late_look_at_a_key_that_is_worked_on_waits_for_its_end() -> None:
    async def scenario() -> None:
        queue = WorkQueue()
        queue.wake(CALLS)
        await queue.take()
        queue.wake(CALLS, after=0.01)
        await asyncio.sleep(0.05)  # the look has come due meanwhile
        assert queue.depth == 0
        queue.done(CALLS)
        assert await queue.take() == CALLS

    run(scenario())
