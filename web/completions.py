"""POST /v1/chat/completions, as OpenAI's API has it, so that any client of that API can ask.

Answers are streamed as server-sent events; to the page too, which asks in the same way. What the
API has no words for is told where its clients look past it: a comment says how many answers are
made before this one, and the first event has a field `forgotten`, the number of messages that have
no room in the context any more.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, BeforeValidator, Field, StringConstraints, model_validator
from starlette.types import Send

from hamner.conversation import HIGHEST_TEMPERATURE, prompt_of
from hamner.generation import Sampling
from hamner.tokenization import Message
from web.answers import AnswerFailed, Events, Finished, Line, Waiting
from web.refusals import error_body, refusal

MODEL = "chat-hamner"  # there is one: whatever name is asked for gets it
MOST_MESSAGES = 1_000


# ------------------------------------------------------------------------------ what is asked


def joined(content: Any) -> Any:
    """Text that may come in parts, as the API allows."""
    if isinstance(content, list) and all(isinstance(part, Mapping) for part in content):
        if any(part.get("type") != "text" for part in content):
            raise ValueError("only text can be read")
        return "\n".join(str(part.get("text", "")) for part in content)
    return content


def listed(stop: Any) -> Any:
    return [stop] if isinstance(stop, str) else stop


class Said(BaseModel):
    """A message of a request."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(joined)]

    def message(self) -> Message:
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": self.content}


class StreamOptions(BaseModel):
    include_usage: bool = False


class PlainText(BaseModel):
    type: Literal["text"]


Zero = Annotated[float, Field(ge=0, le=0)]
End = Annotated[str, StringConstraints(min_length=1, max_length=1_000)]


class Asked(BaseModel):
    """The body of a request."""

    messages: Annotated[list[Said], Field(min_length=1, max_length=MOST_MESSAGES)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=HIGHEST_TEMPERATURE)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Annotated[list[End], Field(max_length=4), BeforeValidator(listed)] | None = None
    # What can't be done may stand there only if it is asked not to be.
    n: Literal[1] | None = None
    frequency_penalty: Zero | None = None
    presence_penalty: Zero | None = None
    logprobs: Literal[False] | None = None
    response_format: PlainText | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None

    @model_validator(mode="after")
    def _can_be_answered(self) -> Asked:
        if any(said.message()["role"] == "system" for said in self.messages[1:]):
            raise ValueError("a system message can only be the first one")
        last = self.messages[-1]
        if last.role != "user" or not last.content.strip():
            raise ValueError("the last message must be the user's, and must say something")
        return self

    def with_system(self, usual: str) -> list[Message]:
        """The messages, and before them the usual system prompt if none is given; "" is none."""
        messages = [said.message() for said in self.messages]
        if messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": usual})
        return messages if messages[0]["content"].strip() else messages[1:]

    def sampling(self, usual: Sampling) -> Sampling:
        """The usual sampling but for what the request says."""
        given: dict[str, Any] = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "max_new_tokens": self.max_completion_tokens or self.max_tokens,
            "seed": self.seed,
        }
        return replace(usual, **{name: value for name, value in given.items() if value is not None})


# ------------------------------------------------------------------------------ what comes back


@dataclass(frozen=True)
class Reply:
    """What there is to say of an answer beside the answer, in the API's words."""

    prompt_tokens: int
    forgotten: int  # messages that had no room
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def chunk(self, *choices: Mapping[str, Any], **more: Any) -> str:
        return event({**self._head("chat.completion.chunk"), "choices": choices, **more})

    def whole(self, content: str, end: Finished) -> dict[str, Any]:
        message = {"role": "assistant", "content": content, "refusal": None}
        only = {"index": 0, "message": message, "logprobs": None, "finish_reason": end.reason}
        head = self._head("chat.completion")
        return {**head, "choices": [only], "usage": self.usage(end), "forgotten": self.forgotten}

    def usage(self, end: Finished) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": end.tokens,
            "total_tokens": self.prompt_tokens + end.tokens,
        }

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": MODEL}


def choice(reason: str | None = None, /, **delta: str) -> dict[str, Any]:
    """What a chunk adds to an answer, or why it ended."""
    return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}


def event(content: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


async def server_sent(events: Events, reply: Reply, *, usage: bool) -> AsyncGenerator[str, None]:
    """An answer as server-sent events, each as soon as there is something to tell."""
    yield reply.chunk(choice(role="assistant", content=""), forgotten=reply.forgotten)
    async with aclosing(events):
        try:
            async for made in events:
                if isinstance(made, Waiting):
                    yield f": waiting for {made.before} before you\n\n"
                elif isinstance(made, str):
                    yield reply.chunk(choice(content=made))
                else:
                    yield reply.chunk(choice(made.reason))
                    if usage:
                        yield reply.chunk(usage=reply.usage(made))
                    yield "data: [DONE]\n\n"
        except AnswerFailed as error:
            yield event(failure(error))


def failure(error: AnswerFailed) -> dict[str, Any]:
    return error_body(f"the answer failed: {error}", "server_error")


class EventStream(StreamingResponse):
    """Closes what it reads from, however it ends: at once, not when it is collected."""

    media_type = "text/event-stream"

    async def stream_response(self, send: Send) -> None:
        async with aclosing(self.body_iterator):  # type: ignore[type-var]
            await super().stream_response(send)


async def gathered(events: Events) -> tuple[str, Finished]:
    """A whole answer, once it is there."""
    pieces: list[str] = []
    async with aclosing(events):
        async for made in events:
            if isinstance(made, str):
                pieces.append(made)
            elif isinstance(made, Finished):
                end = made
    return "".join(pieces), end


async def whole(events: Events, reply: Reply, request: Request) -> Response:
    """A response with the whole answer; it is given up if nobody waits for it any more."""
    answer = asyncio.ensure_future(gathered(events))
    hung_up = asyncio.ensure_future(request.receive())  # there's nothing else left to come
    await asyncio.wait((answer, hung_up), return_when=asyncio.FIRST_COMPLETED)
    hung_up.cancel()
    if not answer.done():
        answer.cancel()
        return Response(status_code=204)
    try:
        return JSONResponse(reply.whole(*answer.result()))
    except AnswerFailed as error:
        return JSONResponse(failure(error), 500)


# ------------------------------------------------------------------------------ the routes


def routes(line: Line) -> APIRouter:
    """The API's two routes that a chat needs."""
    router, started = APIRouter(prefix="/v1"), int(time.time())

    @router.post("/chat/completions")
    async def complete(asked: Asked, request: Request) -> Response:
        speaker = line.speaker
        messages, sampling = asked.with_system(speaker.system), asked.sampling(speaker.sampling)
        try:
            prompt, kept = await asyncio.to_thread(
                prompt_of, speaker, messages, sampling.max_new_tokens
            )
        except ValueError as error:
            return refusal(400, str(error), "context_length_exceeded")
        reply = Reply(len(prompt), len(messages) - len(kept))
        events = line.answer(prompt, sampling, asked.stop or ())
        if not asked.stream:
            return await whole(events, reply, request)
        options = asked.stream_options or StreamOptions()
        return EventStream(server_sent(events, reply, usage=options.include_usage))

    @router.get("/models")
    async def list_models() -> dict[str, Any]:
        model = {"id": MODEL, "object": "model", "created": started, "owned_by": MODEL}
        return {"object": "list", "data": [model]}

    return router
