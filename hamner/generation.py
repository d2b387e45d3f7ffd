"""Sampling from a model with a KV cache: one answer streamed as text, or many side by side."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

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


# ------------------------------------------------------------------------------ one token


def penalise(logits: Tensor, said: Tensor, penalty: float) -> Tensor:
    """Lower the logits (B, V) of what was said (B, V): positive divided, negative multiplied.

    The penalty of CTRL (arXiv 1909.05858), which divides both; that raises the negative ones.
    """
    return torch.where(said, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def filtered(logits: Tensor, top_k: int, top_p: float, min_p: float = 0.0) -> tuple[Tensor, Tensor]:
    """What of the logits (B, V) may be drawn: logits (B, N), -inf where not, and their ids (B, N).

    Left are the top_k likeliest (of equals, any), of these the fewest that reach the probability
    top_p together (arXiv 1904.09751), of these those at least min_p times as likely as the
    likeliest (arXiv 2407.01082).
    """
    count = logits.shape[-1]
    if 0 < top_k < count or top_p < 1.0:
        logits, ids = logits.topk(min(top_k or count, count))  # the likeliest first
    else:
        ids = torch.arange(count, device=logits.device).expand_as(logits)
    if top_p < 1.0:
        p = logits.softmax(-1)
        logits = logits.masked_fill(p.cumsum(-1) - p >= top_p, -torch.inf)  # the likelier suffice
    if min_p > 0.0:
        least = logits.amax(-1, keepdim=True) + math.log(min_p)
        logits = logits.masked_fill(logits < least, -torch.inf)
    return logits, ids


def choose(logits: Tensor, said: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """The next ids (B), given logits (B, V) and which ids each answer has said so far (B, V).

    Nothing in here waits for the device. The smallest of exponential variables of rates p_i is the
    i-th with probability p_i: a draw from p that asks for no number, as `multinomial` does.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    logits = logits.float()
    if sampling.repetition_penalty != 1.0:
        logits = penalise(logits, said, sampling.repetition_penalty)
    logits = logits - logits.amax(-1, keepdim=True)  # the best one stays at 0
    logits = logits / max(sampling.temperature, 1e-6)
    logits, ids = filtered(logits, sampling.top_k, sampling.top_p, sampling.min_p)
    waits = torch.empty_like(logits).exponential_(generator=generator)
    drawn = (logits.softmax(-1) / waits).argmax(-1, keepdim=True)
    return ids.gather(-1, drawn)[:, 0]


# ------------------------------------------------------------------------------ whole answers


class Decoding:
    """Answers to several prompts, made side by side; each round is one new id for every prompt.

    The prompts go through the model in one pass, the shorter ones padded at their beginning. Rounds
    end after max_new_tokens, or when the longest prompt's answer fills the context. One generator
    serves all, so a seed repeats the answers of the same prompts together.
    """

    def __init__(
        self,
        model: Transformer,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        control: Collection[int] = (),
    ):
        """
        Args:
            control: ids that the repetition penalty spares. It looks at answers, not at prompts.

        Raises:
            ValueError: a prompt is empty or fills the context.
        """
        lengths = [len(prompt) for prompt in prompts]
        room = model.config.max_position_embeddings - max(lengths)
        if not min(lengths) or room < 1:
            worst = max(lengths) if min(lengths) else 0
            raise ValueError(f"a prompt of {worst} tokens leaves no room for an answer")
        weight = model.lm_head.weight
        self._model, self._sampling, self._device = model, sampling, weight.device
        self._left = min(room, sampling.max_new_tokens)
        self._generator = new_generator(sampling.seed, weight.device)
        padded = [[0] * (max(lengths) - len(prompt)) + list(prompt) for prompt in prompts]
        self._new = torch.tensor(padded, device=self._device)  # (B, T), what goes in next
        padding = torch.tensor([max(lengths) - length for length in lengths], device=self._device)
        self._cache = KVCache(
            model.config,
            len(prompts),
            max(lengths) + self._left,
            weight.dtype,
            self._device,
            padding if len(set(lengths)) > 1 else None,
        )
        self._said = torch.zeros(
            len(prompts), model.config.vocab_size, dtype=torch.bool, device=self._device
        )
        self._counts = torch.ones(model.config.vocab_size, dtype=torch.bool, device=self._device)
        self._counts[list(control)] = False
        self._drawn: HostCopy | None = None

    def __iter__(self) -> Decoding:
        return self

    def __next__(self) -> list[int]:
        """The next id of every answer (B).

        A GPU is given the round after this one before this one's ids are waited for.
        """
        if not self._left:
            raise StopIteration
        self._left -= 1
        drawn = self._drawn or self._draw()
        self._drawn = self._draw() if self._device.type == "cuda" and self._left else None
        return drawn.read()

    def _draw(self) -> HostCopy:
        """Put the newest ids through the model and draw those that follow."""
        # no_grad must not leak to whoever consumes the answers between two rounds.
        with torch.no_grad():
            logits = self._model(self._new, cache=self._cache, logits_to_keep=1).logits[:, -1]
            ids = choose(logits, self._said, self._sampling, self._generator)  # (B)
            self._said.scatter_(1, ids[:, None], self._counts[ids][:, None])
        self._new = ids[:, None]
        return HostCopy(ids)

    def keep(self, rows: list[int]) -> None:
        """Go on with these answers alone, in this order."""
        self._cache.keep(rows)
        self._said, self._new = self._said[rows], self._new[rows]
        if self._drawn is not None:
            self._drawn = HostCopy(self._new[:, 0])


class HostCopy:
    """Ids on their way from a device; only `read` waits for them, and for nothing after them."""

    def __init__(self, ids: Tensor):
        self._ids, self._arrived = ids, None
        if ids.device.type == "cuda":
            self._ids = torch.empty(ids.shape, dtype=ids.dtype, pin_memory=True)
            self._ids.copy_(ids, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self) -> list[int]:
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._ids.tolist()


def new_generator(seed: int | None, device: torch.device) -> torch.Generator:
    """A source of randomness of its own, by a seed or by none that is known."""
    generator = torch.Generator(device=device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator


def generate_ids(
    model: Transformer,
    prompt: Sequence[int],
    sampling: Sampling,
    stop: Collection[int],
    control: Collection[int] = (),
) -> Iterator[int]:
    """New ids one by one, until a stop id (not yielded), max_new_tokens, or a full context.

    Args and errors are those of `Decoding`.
    """
    for (id_,) in Decoding(model, [prompt], sampling, control):
        if id_ in stop:
            return
        yield id_


def generate_batch(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    stop: Collection[int],
    control: Collection[int] = (),
) -> list[list[int]]:
    """The answers to all prompts, made side by side; args and errors as for `Decoding`."""
    answers: list[list[int]] = [[] for _ in prompts]
    if not prompts:
        return answers
    decoding = Decoding(model, prompts, sampling, control)
    open_ = list(range(len(prompts)))  # which answers the rows are of
    for ids in decoding:
        going_on = [row for row, id_ in enumerate(ids) if id_ not in stop]
        for row in going_on:
            answers[open_[row]].append(ids[row])
        if not going_on:
            break
        if len(going_on) < len(open_):
            decoding.keep(going_on)
            open_ = [open_[row] for row in going_on]
    return answers


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
    header, _ = tokenizer.chat([], answer_next=True)
    parts = [tokenizer.chat([message])[0] for message in (*system, *rest)]  # a chat is their sum
    before, parts = list(chain(*parts[: len(system)])), parts[len(system) :]
    for begin in begins:
        size = len(before) + sum(map(len, parts[begin:])) + len(header)
        if size <= room:
            return [*before, *chain(*parts[begin:]), *header], [*system, *rest[begin:]]
    too_long = f"the message is too long: {size} tokens where {room} fit"
    raise ValueError(f"{too_long}; say it shorter")
