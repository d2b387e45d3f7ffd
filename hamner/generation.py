"""Sampling from a model with a KV cache, token by token, streamed as text."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hamner.tokenization import Message, Tokenizer
from model import KVCache, Transformer


@dataclass(frozen=True)
class Sampling:
    """How to choose the next token. Temperature 0 takes the likeliest and nothing else counts."""

    temperature: float
    top_k: int  # 0 is off
    top_p: float  # 1 is off
    repetition_penalty: float  # 1 is off
    max_new_tokens: int
    seed: int | None = None
    min_p: float = 0.0  # 0 is off


def penalise(logits: Tensor, ids: Sequence[int], penalty: float) -> Tensor:
    """Lower the logits (V) of ids: positive ones divided, negative multiplied (1909.05858)."""
    if penalty == 1.0 or not ids:
        return logits
    index = torch.tensor(sorted(set(ids)), device=logits.device)
    chosen = logits[index]
    return logits.index_copy(0, index, torch.where(chosen > 0, chosen / penalty, chosen * penalty))


def filtered(logits: Tensor, top_k: int, top_p: float, min_p: float = 0.0) -> Tensor:
    """Logits (V) with -inf for what may not be drawn.

    Left are the top_k likeliest (of equals, any), of these the fewest that reach the probability
    top_p together (1904.09751), of these those at least min_p times as likely as the likeliest
    (2407.01082).
    """
    if 0 < top_k < logits.numel():
        best, index = logits.topk(top_k)
        logits = torch.full_like(logits, -torch.inf).index_copy(0, index, best)
    if top_p < 1.0:
        ordered, index = logits.sort(descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)  # of the likelier ones
        logits = logits.scatter(0, index, ordered.masked_fill(before >= top_p, -torch.inf))
    if min_p > 0.0:
        logits = logits.masked_fill(logits < logits.max() + math.log(min_p), -torch.inf)
    return logits


def choose(
    logits: Tensor, answer: Sequence[int], sampling: Sampling, generator: torch.Generator
) -> int:
    """The next id, given logits (V) and the ids that the answer consists of so far."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    logits = penalise(logits.float(), answer, sampling.repetition_penalty)
    logits = (logits - logits.max()) / max(sampling.temperature, 1e-6)  # the best one stays at 0
    logits = filtered(logits, sampling.top_k, sampling.top_p, sampling.min_p)
    return int(torch.multinomial(logits.softmax(-1), 1, generator=generator))


def generate_ids(
    model: Transformer,
    prompt: Sequence[int],
    sampling: Sampling,
    stop: Collection[int],
    control: Collection[int] = (),
) -> Iterator[int]:
    """New ids one by one, until a stop id (not yielded), max_new_tokens, or a full context.

    The repetition penalty looks at the answer alone, not at the prompt, and not at `control` ids.

    Raises:
        ValueError: the prompt is empty or fills the context.
    """
    room = model.config.max_position_embeddings - len(prompt)
    if not prompt or room < 1:
        raise ValueError(f"a prompt of {len(prompt)} tokens leaves no room for an answer")
    weight = model.lm_head.weight
    generator = torch.Generator(device=weight.device)
    if sampling.seed is None:
        generator.seed()
    else:
        generator.manual_seed(sampling.seed)
    count = min(room, sampling.max_new_tokens)
    cache = KVCache(model.config, 1, len(prompt) + count, weight.dtype, weight.device)
    answer: list[int] = []  # what the penalty looks at
    new = list(prompt)
    for _ in range(count):
        # no_grad stands inside: it must not leak to whoever consumes the generator between tokens
        with torch.no_grad():
            ids = torch.tensor([new], device=weight.device)
            logits = model(ids, cache=cache, logits_to_keep=1).logits[0, -1]
            id_ = choose(logits, answer, sampling, generator)
        if id_ in stop:
            return
        if id_ not in control:
            answer.append(id_)
        new = [id_]
        yield id_


def generate_text(
    model: Transformer, tokenizer: Tokenizer, prompt: Sequence[int], sampling: Sampling
) -> Iterator[str]:
    """The continuation of a prompt as pieces of text, up to `<|im_end|>` or `<|endoftext|>`."""
    stream = tokenizer.decode_stream()
    stop = (tokenizer.im_end, tokenizer.end_of_text)
    for id_ in generate_ids(model, prompt, sampling, stop, tokenizer.control_ids):
        text = stream.add(id_)
        if text:
            yield text


def fit_context(
    tokenizer: Tokenizer, messages: Sequence[Message], room: int
) -> tuple[list[int], list[Message]]:
    """Prompt ids of a conversation, made to fit into `room` tokens, and the messages they hold.

    A turn is a user message and all that follows it up to the next. The oldest go first; the
    system prompt and the last turn stay.

    Raises:
        ValueError: system prompt and last turn alone don't fit, or there is no user message.
    """
    system = [message for message in messages[:1] if message["role"] == "system"]
    rest = list(messages[len(system) :])
    begins = [i for i, message in enumerate(rest) if message["role"] == "user"]
    if not begins:
        raise ValueError("a prompt needs a user message")
    for begin in begins:
        kept = [*system, *rest[begin:]]
        ids, _ = tokenizer.chat(kept, answer_next=True)
        if len(ids) <= room:
            return ids, kept
    too_long = f"the message is too long: {len(ids)} tokens where {room} fit"
    raise ValueError(f"{too_long}; say it shorter")
