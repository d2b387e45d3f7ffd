"""How likely a model finds text: log-probabilities of tokens, bits per byte of documents.

Bits per byte are the -log2 p of a document's tokens, summed up, by the number of its bytes in
UTF-8. Tokenizers cut the same text into more or fewer tokens, so that losses per token can't be
compared between them; bits per byte can.

Each document is scored by itself, whole, as in training after an `<|endoftext|>`. One that is
longer than the context is read in windows half a context apart: every token is predicted once, from
at least half a context of what stands before it. Only tokens that stand for bytes of the document
are counted: the `<|endoftext|>` and, in conversations, ChatML's tokens and the roles' names are
there to be read, and cost nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TextIO

import torch
from torch import Tensor
from tqdm import tqdm

from hamner.sources import Document, DocumentStream, said
from hamner.tokenization import Tokenizer, whole_characters
from model import Transformer

HEAD_TOKENS = 1_024  # logits of so many tokens exist at once


# ------------------------------------------------------------------------------- tokens


@dataclass(frozen=True)
class Window:
    """What a model reads at once; it is to predict the last `scored` ids, each from all before."""

    ids: Sequence[int]
    scored: int

    @property
    def length(self) -> int:
        """How many ids go into the model: the last is only predicted."""
        return len(self.ids) - 1


@dataclass(frozen=True)
class TokenScores:
    """Of the tokens that a window asks for, in order."""

    log_p: Tensor  # (scored), natural logarithms
    likeliest: Tensor  # (scored), whether no other token was likelier

    def total(self) -> float:
        return float(self.log_p.double().sum())


def windows(ids: Sequence[int], context: int) -> list[Window]:
    """Windows that predict each id but the first once, none reading more than `context` ids."""
    found, predicted = [], 1
    end = min(len(ids), context + 1)
    while predicted < len(ids):
        found.append(Window(ids[max(0, end - context - 1) : end], end - predicted))
        predicted, end = end, min(len(ids), end + max(1, context // 2))
    return found


def score(
    model: Transformer,
    asked: Sequence[Window],
    batch_size: int,
    progress: TextIO | None = None,
    label: str = "",
) -> list[TokenScores]:
    """Scores of all windows, in their order; `progress` is a terminal to draw a bar on."""
    order = sorted(range(len(asked)), key=lambda number: -len(asked[number].ids))
    found: dict[int, TokenScores] = {}
    with bar(len(asked), label, progress) as shown:
        for begin in range(0, len(order), batch_size):
            numbers = order[begin : begin + batch_size]
            scores = score_batch(model, [asked[number] for number in numbers])
            found.update(zip(numbers, scores, strict=True))
            shown.update(len(numbers))
    return [found[number] for number in range(len(asked))]


def bar(total: int, label: str, progress: TextIO | None) -> tqdm:
    """A bar that goes again when it is full; none where there is no terminal."""
    hidden = progress is None or not progress.isatty()
    return tqdm(total=total, desc=label, leave=False, file=progress, disable=hidden)


@torch.no_grad()
def score_batch(model: Transformer, batch: Sequence[Window]) -> list[TokenScores]:
    """Windows side by side, shorter ones filled up on the right, where causal attention sees none.

    The head computes logits at the places that are asked for alone.
    """
    device = model.lm_head.weight.device
    inputs = torch.zeros(len(batch), max(1, *(w.length for w in batch)), dtype=torch.long)
    for row, window in zip(inputs, batch, strict=True):
        row[: window.length] = torch.tensor(window.ids[:-1], dtype=torch.long)
    counts = [window.scored for window in batch]
    rows = torch.arange(len(batch)).repeat_interleave(torch.tensor(counts))
    places = torch.cat([torch.arange(w.length - w.scored, w.length) for w in batch])
    targets = torch.tensor([id_ for w in batch for id_ in w.ids[len(w.ids) - w.scored :]])
    hidden = model.model(inputs.to(device), None, None)  # (B, T, C)
    hidden = hidden[rows.to(device), places.to(device)]  # (N, C)
    parts = zip(hidden.split(HEAD_TOKENS), targets.to(device).split(HEAD_TOKENS), strict=True)
    scores = [head_scores(model, part, ids) for part, ids in parts]
    log_p = torch.cat([each for each, _ in scores]).cpu().split(counts)
    likeliest = torch.cat([each for _, each in scores]).cpu().split(counts)
    return [TokenScores(*pair) for pair in zip(log_p, likeliest, strict=True)]


def head_scores(model: Transformer, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """log p (N) of targets (N) after hidden (N, C), and whether each was the likeliest (N)."""
    logits = model.lm_head(hidden).float()  # (N, V)
    log_p = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    return log_p, logits.argmax(-1) == targets


# ------------------------------------------------------------------------------- documents


@dataclass(frozen=True)
class Passage:
    """Tokens begin to end of a document that stand for so many bytes of its text."""

    begin: int
    end: int
    bytes: int
    answer: bool  # an assistant says it


@dataclass(frozen=True)
class Tokenized:
    """A document's ids, an `<|endoftext|>` first, and the passages of text among them."""

    ids: list[int]
    passages: list[Passage]

    def answers(self) -> Tokenized:
        """The same document, with the assistant's words as its only passages."""
        return Tokenized(self.ids, [passage for passage in self.passages if passage.answer])


def tokenized(document: Document, tokenizer: Tokenizer) -> Tokenized:
    """A text as it is; a conversation rendered by the chat template, its messages the passages."""
    ids = [tokenizer.end_of_text]
    if isinstance(document, str):
        ids += tokenizer.encode(document)
        return Tokenized(ids, [Passage(1, len(ids), utf8_bytes(document), answer=False)])
    passages = []
    ending = 1 + len(tokenizer.encode("\n"))  # <|im_end|> and the new line
    for message in document:
        ids += tokenizer.chat([message])[0]
        content, end = message["content"].strip(), len(ids) - ending
        begin = end - len(tokenizer.encode(content))
        answer = message["role"] == "assistant"
        passages.append(Passage(begin, end, utf8_bytes(content), answer))
    return Tokenized(ids, passages)


def utf8_bytes(text: str) -> int:
    return len(whole_characters(text).encode())


def ratio_error(above: Sequence[float], below: Sequence[float]) -> float | None:
    """The standard error of sum(above) / sum(below), of pairs drawn at random; None for one."""
    count, ratio = len(above), sum(above) / sum(below)
    if count < 2:
        return None
    squares = sum((a - ratio * b) ** 2 for a, b in zip(above, below, strict=True))
    return math.sqrt(squares * count / (count - 1)) / sum(below)


@dataclass(frozen=True)
class TextScore:
    """How well a model foresees some documents; of each, its nats and its bytes."""

    nats: Sequence[float]
    bytes: Sequence[int]
    tokens: int  # of all documents

    @property
    def bits_per_byte(self) -> float:
        return sum(self.nats) / math.log(2) / sum(self.bytes)

    @property
    def standard_error(self) -> float | None:
        """Of the bits per byte, as a ratio of sums over documents drawn at random."""
        error = ratio_error(self.nats, self.bytes)
        return None if error is None else error / math.log(2)

    @property
    def nats_per_token(self) -> float:
        return sum(self.nats) / self.tokens

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats_per_token)

    def __bool__(self) -> bool:
        return self.tokens > 0


def score_documents(
    model: Transformer,
    tokenizer: Tokenizer,
    documents: Sequence[Document],
    batch_size: int,
    progress: TextIO | None = None,
    label: str = "",
) -> tuple[TextScore, TextScore]:
    """The score of documents, and that of the assistant's words in them (empty if there are none).

    Raises:
        UserError: a conversation with a message that has no known role or no text.
    """
    texts = [tokenized(document, tokenizer) for document in documents]
    context = model.config.max_position_embeddings
    parts = [windows(text.ids, context) for text in texts]
    scores = iter(score(model, [w for part in parts for w in part], batch_size, progress, label))
    log_p = []
    for part in parts:
        own = [next(scores).log_p.double() for _ in part]
        log_p.append(torch.cat([torch.zeros(1, dtype=torch.double), *own]))
    return summed(texts, log_p), summed([text.answers() for text in texts], log_p)


def summed(texts: Sequence[Tokenized], log_p: Sequence[Tensor]) -> TextScore:
    """The score of the documents' passages, given log p of each document's ids (T)."""
    nats, sizes, tokens = [], [], 0
    for text, each in zip(texts, log_p, strict=True):
        if text.passages:
            nats.append(-sum(float(each[p.begin : p.end].sum()) for p in text.passages))
            sizes.append(sum(passage.bytes for passage in text.passages))
            tokens += sum(passage.end - passage.begin for passage in text.passages)
    return TextScore(nats, sizes, tokens)


def held_out_documents(stream: DocumentStream, size: int) -> list[Document]:
    """Whole documents of a stream's first epoch, until they have so many bytes together."""
    documents: list[Document] = []
    for document in stream.in_order():
        documents.append(document)
        words = [document] if isinstance(document, str) else [said(m)[1] for m in document]
        size -= sum(map(utf8_bytes, words))
        if size <= 0:
            break
    return documents
