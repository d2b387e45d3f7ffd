"""Items made ahead of their use by a background thread.

A thread is enough: reading waits for the network, and tokenising runs in compiled code that lets
other threads go on.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from types import GeneratorType
from typing import Generic, TypeVar

T = TypeVar("T")
JOIN_SECONDS = 60


class Prefetched(Generic[T]):
    """The same items, made by a background thread until those that wait have reached `limit`.

    `size` says how much an item counts. An error in the background arrives in its place. The
    thread begins with the first `next`.
    """

    def __init__(
        self, items: Iterator[T], limit: int = 4, size: Callable[[T], int] = lambda item: 1
    ):
        self._items, self._limit, self._size = items, limit, size
        self._ready: deque[T] = deque()
        self._held = 0  # size of what waits
        self._error: BaseException | None = None
        self._ended = self._closed = False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        self.wait()
        with self._changed:
            if self._ready:
                item = self._ready.popleft()
                self._held -= self._size(item)
                self._changed.notify_all()
                return item
            error, self._error = self._error, None
        if error is not None:
            raise error
        raise StopIteration

    def wait(self, seconds: float | None = None) -> bool:
        """Wait for an item, so many seconds at most; whether `next` would answer at once."""
        if self._thread is None and not self._closed:
            self._thread = threading.Thread(target=self._produce, daemon=True, name="prefetch")
            self._thread.start()
        with self._changed:
            return self._changed.wait_for(lambda: bool(self._ready) or self._ended, seconds)

    def close(self) -> None:
        """End the thread, and what feeds it."""
        with self._changed:
            self._closed = self._ended = True
            self._ready.clear()
            self._changed.notify_all()
        close = getattr(self._items, "close", None)
        if close is not None and not isinstance(self._items, GeneratorType):
            close()  # a generator is closed by the thread that runs it
        if self._thread is not None:
            # A thread that the interpreter kills in the middle of compiled code aborts the process.
            self._thread.join(timeout=JOIN_SECONDS)

    def _produce(self) -> None:
        try:
            for item in self._items:
                if not self._put(item):
                    break
            if isinstance(self._items, GeneratorType):
                self._items.close()
        except BaseException as error:  # handed over to the consumer, whatever it is
            self._error = error
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _put(self, item: T) -> bool:
        """Hand an item over when there is room; False if nobody wants it any more."""
        with self._changed:
            self._changed.wait_for(lambda: self._held < self._limit or self._closed)
            if self._closed:
                return False
            self._ready.append(item)
            self._held += self._size(item)
            self._changed.notify_all()
            return True
