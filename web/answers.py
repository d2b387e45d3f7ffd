"""One answer at a time: those who ask wait in line, and each may give up at any moment."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Literal, Union

from hamner.conversation import Speaker
from hamner.errors import first_line
from hamner.generation import Sampling, generate_ids

STOPPED = "the server was stopped"


@dataclass(frozen=True)
class Waiting:
    """So many answers are made before this one; 0 says that its turn has come."""

    before: int


@dataclass(frozen=True)
class Finished:
    """The end of an answer: it was said to its end, or became as long as it may."""

    reason: Literal["stop", "length"]
    tokens: int


Event = Union[Waiting, str, Finished]  # a str is the next piece of the answer
Events = AsyncGenerator[Event, None]


class AnswerFailed(Exception):
    """An answer broke off; the message says why."""


class Line:
    """Has a speaker make answers one after the other, in the order in which they are asked for.

    They are made in one thread, always the same one, so that the others can be heard meanwhile.
    """

    def __init__(self, speaker: Speaker):
        self.speaker = speaker
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="answers")
        self._orders: list[Order] = []

    async def answer(
        self, prompt: Sequence[int], sampling: Sampling, ends: Sequence[str] = ()
    ) -> Events:
        """The answer to a prompt as it is made, up to the first of the texts `ends`.

        Whoever closes the iterator gives the answer up: at most one more token is made for it.

        Raises:
            AnswerFailed: the model failed, or the line was closed.
        """
        order = Order(prompt, sampling, ends)
        order.tell_place(len(self._orders))
        try:
            made = order.loop.run_in_executor(self._thread, order.make, self.speaker)
        except RuntimeError:  # the line is closed
            raise AnswerFailed(STOPPED) from None
        self._orders.append(order)
        made.add_done_callback(partial(self._leave, order))
        try:
            while not isinstance(event := await order.events.get(), (Finished, BaseException)):
                yield event
            if isinstance(event, BaseException):
                raise AnswerFailed(first_line(event)) from event
            yield event
        finally:
            order.given_up.set()
            made.cancel()

    def _leave(self, order: Order, made: asyncio.Future[Finished | None]) -> None:
        self._orders.remove(order)
        for before, waiting in enumerate(self._orders):
            waiting.tell_place(before)
        if made.cancelled():
            return
        if error := made.exception():
            print(f"an answer failed: {first_line(error)}", file=sys.stderr, flush=True)
        if end := error or made.result():
            order.events.put_nowait(end)

    def close(self) -> None:
        """Give up all answers, those too that wait; none can be asked for any more."""
        for order in self._orders:
            order.given_up.set()
            order.events.put_nowait(AnswerFailed(STOPPED))
        self._thread.shutdown(wait=False, cancel_futures=True)


class Order:
    """An answer that somebody asked for."""

    def __init__(self, prompt: Sequence[int], sampling: Sampling, ends: Sequence[str]):
        self.prompt, self.sampling = prompt, sampling
        self.text = TextBefore(ends)
        self.loop = asyncio.get_running_loop()
        self.events: asyncio.Queue[Event | BaseException] = asyncio.Queue()
        self.given_up = threading.Event()
        self.place = 0  # answers before this one, as far as was told

    def tell_place(self, before: int) -> None:
        if before != self.place:
            self.place = before
            self.events.put_nowait(Waiting(before))

    def make(self, speaker: Speaker) -> Finished | None:
        """Make the answer, in the thread for answers; None if it was given up."""
        model, tokenizer, tokens = speaker.model, speaker.tokenizer, 0
        stop = (tokenizer.im_end, tokenizer.end_of_text)
        stream = tokenizer.decode_stream()
        for id_ in generate_ids(model, self.prompt, self.sampling, stop, tokenizer.control_ids):
            if self.given_up.is_set():
                return None
            tokens += 1
            self._pass_on(self.text.add(stream.add(id_)))
            if self.text.ended:
                return Finished("stop", tokens)
        self._pass_on(self.text.rest())
        room = model.config.max_position_embeddings - len(self.prompt)
        longest = min(room, self.sampling.max_new_tokens)
        return Finished("length" if tokens == longest else "stop", tokens)

    def _pass_on(self, piece: str) -> None:
        if piece:
            self.loop.call_soon_threadsafe(self.events.put_nowait, piece)


class TextBefore:
    """Passes text on without the white space at its beginning, up to the first of some ends.

    What may be the beginning of an end is held back until it is known.
    """

    def __init__(self, ends: Sequence[str] = ()):
        self.ends = [end for end in ends if end]
        self.begun = self.ended = False
        self._held = ""

    def add(self, piece: str) -> str:
        """The text that is certain now that `piece` has come."""
        self._held += piece if self.begun else piece.lstrip()
        self.begun = bool(self.begun or self._held)
        places = [place for end in self.ends if (place := self._held.find(end)) >= 0]
        self.ended = bool(places)
        certain = min(places) if places else len(self._held) - self._beginning_of_an_end()
        passed, self._held = self._held[:certain], self._held[certain:]
        return passed

    def _beginning_of_an_end(self) -> int:
        """How many of the last characters held are the first ones of an end."""
        longest = max(map(len, self.ends), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(end.startswith(self._held[-length:]) for end in self.ends):
                return length
        return 0

    def rest(self) -> str:
        """What was held back, once nothing more comes."""
        return self._held
