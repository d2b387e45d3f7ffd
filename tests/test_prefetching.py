"""Tests of making items ahead: the same items, never too many, errors in place, no thread left."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from itertools import count, islice

import pytest

from hamner.errors import UserError
from hamner.prefetching import Prefetched


def until(condition: Callable[[], bool], seconds: float = 5) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    return condition()


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


@pytest.mark.parametrize("limit", [1, 4, 100])
@pytest.mark.parametrize("length", [0, 1, 25])
def test_the_items_are_the_same(length: int, limit: int) -> None:
    assert list(Prefetched(iter(range(length)), limit)) == list(range(length))


@pytest.mark.parametrize("error", [UserError("no such file"), ValueError("odd"), SystemExit(3)])
def test_what_goes_wrong_in_the_background_arrives_in_its_place(error: BaseException) -> None:
    def items() -> Iterator[int]:
        yield 0
        yield 1
        raise error

    prefetched = Prefetched(items())
    assert list(islice(prefetched, 2)) == [0, 1]
    with pytest.raises(type(error)) as caught:
        next(prefetched)
    assert caught.value is error
    assert list(prefetched) == []


def test_items_are_made_ahead_but_not_without_limit() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for number in range(1_000):
            made.append(number)
            yield number

    prefetched = Prefetched(items(), limit=3)
    assert next(prefetched) == 0
    assert until(lambda: len(made) >= 5)
    time.sleep(0.05)
    assert len(made) == 5  # one in use, three waiting, one in hand
    prefetched.close()


def test_the_limit_counts_what_items_weigh() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for number in count(1):
            made.append(number)
            yield number

    prefetched = Prefetched(items(), limit=30, size=lambda number: number)
    prefetched.wait()
    assert until(lambda: len(made) >= 9)
    time.sleep(0.05)
    assert len(made) == 9  # 1 + 2 + ... + 8 = 36 have passed the limit; the ninth is in hand
    assert list(islice(prefetched, 20)) == list(range(1, 21))
    prefetched.close()


def test_waiting_tells_whether_there_is_an_answer() -> None:
    go_on = threading.Event()

    def items() -> Iterator[int]:
        go_on.wait()
        yield 1

    prefetched = Prefetched(items())
    assert not prefetched.wait(0.01)
    go_on.set()
    assert prefetched.wait(5)
    assert next(prefetched) == 1
    assert prefetched.wait(5)  # that there is none is an answer, too
    assert list(prefetched) == []


def test_closing_ends_the_thread_and_the_generator() -> None:
    closed = threading.Event()

    def items() -> Iterator[int]:
        try:
            yield from count()
        finally:
            closed.set()

    prefetched = Prefetched(items())
    next(prefetched)
    (thread,) = threads()
    assert thread.daemon
    prefetched.close()
    assert closed.is_set() and not threads()
    assert list(prefetched) == []


def test_closing_reaches_what_waits_below() -> None:
    """A mix of streams waits for a stream, which waits for the network: all of it ends."""

    class Stuck:
        def __init__(self) -> None:
            self.closed = threading.Event()

        def __iter__(self) -> Iterator[int]:
            return self

        def __next__(self) -> int:
            self.closed.wait()
            raise StopIteration

        def close(self) -> None:
            self.closed.set()

    outer = Prefetched(iter(Prefetched(Stuck())))
    assert not outer.wait(0.05)
    begin = time.monotonic()
    outer.close()
    assert time.monotonic() - begin < 5
    assert not threads()


def test_the_thread_ends_with_the_items() -> None:
    prefetched = Prefetched(iter(range(3)))
    assert list(prefetched) == [0, 1, 2]
    assert until(lambda: not threads())


def test_items_that_nobody_asked_for_are_not_begun() -> None:
    def items() -> Iterator[int]:
        raise AssertionError("begun")
        yield 0

    prefetched = Prefetched(items())
    assert not threads()
    prefetched.close()
    assert not threads()


def test_when_closed_the_thread_has_ended_though_it_was_busy() -> None:
    """One that is still in compiled code when the interpreter ends would abort the process."""

    def slow() -> Iterator[int]:
        for number in range(1_000):
            time.sleep(0.05)
            yield number

    prefetched = Prefetched(slow(), limit=1)
    next(prefetched)
    prefetched.close()
    assert not threads()
