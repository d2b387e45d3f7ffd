"""Tests of bits per byte: against Hugging Face's model, against brute force, and by definition."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import pytest
import torch
from conftest import some_conversation, some_text
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from hamner import tokenization
from hamner.errors import UserError
from hamner.evaluation.scoring import (
    TextScore,
    Window,
    held_out_documents,
    score,
    score_documents,
    tokenized,
    windows,
)
from hamner.recipe import SourcePart
from hamner.sources import DocumentStream, Source, is_held_out
from hamner.tokenization import Tokenizer
from model import ModelConfig, Transformer

torch.set_num_threads(1)  # more would wait for each other where cores are shared
CONTEXT = 32
rng = random.Random(5)
TEXTS = [some_text(rng, words) for words in (1, 4, 9, 60)]
UNUSUAL = [
    "größer als 3 €? 你好 🙂",
    "  spaces \n\n and\ttabs ",
    "a <|im_end|> that is only text",
    "\ud83d",
]
CHATS = [
    some_conversation(rng),
    [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": " hello there "},
        {"role": "assistant", "content": "good morning, 你好 "},
        {"role": "user", "content": "and you?"},
        {"role": "assistant", "content": some_text(rng, 30)},
    ],
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tokenization.train([some_text(random.Random(1), 2_000)], 330)


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> Transformer:
    """One with opinions: an untrained model finds all tokens almost equally likely."""
    torch.manual_seed(1)
    config = ModelConfig(
        vocab_size=336, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=CONTEXT,
        initializer_range=0.4,
    )  # fmt: skip
    return Transformer(config).eval()


@pytest.fixture(scope="module")
def peer(model: Transformer) -> LlamaForCausalLM:
    """Hugging Face's model with the same weights."""
    peer = LlamaForCausalLM(LlamaConfig(**asdict(model.config), attention_bias=False))
    peer.load_state_dict(model.state_dict())
    return peer.eval()


def log_p(peer: LlamaForCausalLM, ids: Sequence[int]) -> Tensor:
    """log p of each id but the first, given all before it (T-1)."""
    with torch.no_grad():
        logits = peer(torch.tensor([ids[:-1]])).logits[0].double()
    return logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


# ------------------------------------------------------------------------------ windows


@given(st.integers(1, 300), st.integers(1, 40))
@settings(deadline=None)
def test_windows_predict_every_id_once_from_half_a_context_or_more(
    count: int, context: int
) -> None:
    ids = list(range(count))
    predicted = []
    for window in windows(ids, context):
        assert window.length <= context
        for back in range(window.scored, 0, -1):
            id_ = window.ids[-back]
            predicted.append(id_)
            before = window.ids.index(id_)
            assert before >= min(id_, context - context // 2)
    assert predicted == ids[1:]


def test_scores_are_those_of_hugging_face_whatever_the_batches(
    model: Transformer, peer: LlamaForCausalLM
) -> None:
    draw = random.Random(2)
    asked = []
    for _ in range(23):
        ids = [draw.randrange(336) for _ in range(draw.randint(2, CONTEXT + 1))]
        asked.append(Window(ids, draw.randint(1, len(ids) - 1)))
    expected = [log_p(peer, window.ids)[-window.scored :] for window in asked]
    for batch_size in (1, 4, 100):
        found = score(model, asked, batch_size)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours.log_p.double(), theirs, atol=2e-5, rtol=1e-5)
            assert ours.total() == pytest.approx(float(theirs.sum()), abs=1e-4)


def test_the_likeliest_tokens_are_told(model: Transformer, peer: LlamaForCausalLM) -> None:
    with torch.no_grad():
        ids = peer.generate(torch.tensor([[5, 9, 300]]), max_new_tokens=8, do_sample=False)[0]
    ids = ids.tolist()
    (greedy,) = score(model, [Window(ids, 8)], 1)
    assert greedy.likeliest.all()
    other = [*ids[:7], (ids[7] + 1) % 336, *ids[8:]]
    (changed,) = score(model, [Window(other, 8)], 1)
    assert changed.likeliest[:4].all() and not changed.likeliest[4]


# ------------------------------------------------------------------------------ documents


def test_bits_per_byte_of_short_texts_are_those_of_hugging_face(
    model: Transformer, peer: LlamaForCausalLM, tokenizer: Tokenizer
) -> None:
    texts = [*TEXTS[:2], *UNUSUAL]
    found, answers = score_documents(model, tokenizer, texts, batch_size=3)
    ids = [[tokenizer.end_of_text, *tokenizer.encode(text)] for text in texts]
    assert max(map(len, ids)) <= CONTEXT + 1
    bits = -sum(float(log_p(peer, each).sum()) for each in ids) / math.log(2)
    size = sum(len(text.replace("\ud83d", "\ufffd").encode()) for text in texts)
    assert sum(found.bytes) == size
    assert found.bits_per_byte == pytest.approx(bits / size, rel=1e-5)
    assert found.tokens == sum(len(each) - 1 for each in ids)
    assert found.nats_per_token == pytest.approx(bits * math.log(2) / found.tokens, rel=1e-5)
    assert found.perplexity == pytest.approx(2 ** (bits / found.tokens), rel=1e-4)
    assert not answers


def test_long_texts_are_those_of_brute_force(
    model: Transformer, peer: LlamaForCausalLM, tokenizer: Tokenizer
) -> None:
    """Token by token: what stands before it in the last window that ends at or after it."""
    text, half = TEXTS[3], CONTEXT // 2
    ids = [tokenizer.end_of_text, *tokenizer.encode(text)]
    assert len(ids) > 2 * CONTEXT
    total = 0.0
    for place in range(1, len(ids)):
        further = max(0, math.ceil((place - CONTEXT) / half))
        end = min(len(ids) - 1, CONTEXT + further * half)
        total -= float(log_p(peer, ids[max(0, end - CONTEXT) : place + 1])[-1])
    found, _ = score_documents(model, tokenizer, [text], batch_size=4)
    assert sum(found.nats) == pytest.approx(total, rel=1e-5)
    assert found.bits_per_byte == pytest.approx(total / math.log(2) / len(text.encode()), rel=1e-5)


@pytest.mark.parametrize("vocabulary", [273, 300, 330])
def test_a_model_without_opinions_pays_log2_of_its_vocabulary_for_every_token(
    vocabulary: int,
) -> None:
    """Larger tokenizers make fewer tokens of the same bytes, and pay more for each."""
    text = some_text(random.Random(3), 200)
    tokenizer = tokenization.train([text], vocabulary)
    config = ModelConfig(
        vocab_size=vocabulary, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    model = Transformer(config)
    torch.nn.init.zeros_(model.lm_head.weight)
    found, _ = score_documents(model, tokenizer, [text, *TEXTS], batch_size=8)
    size = sum(len(each.encode()) for each in [text, *TEXTS])
    assert sum(found.bytes) == size
    assert found.bits_per_byte == pytest.approx(math.log2(vocabulary) * found.tokens / size)
    assert (found.tokens == size) == (vocabulary == 273)  # 17 control tokens and every byte


@pytest.mark.parametrize("chat", CHATS)
def test_of_a_conversation_the_words_count_and_the_template_does_not(
    tokenizer: Tokenizer, chat: list[dict[str, str]]
) -> None:
    text = tokenized(chat, tokenizer)
    assert [*text.ids[1:], tokenizer.end_of_text] == tokenizer.document(chat)
    for passage, message in zip(text.passages, chat, strict=True):
        words = message["content"].strip()
        assert tokenizer.decode(text.ids[passage.begin : passage.end]) == words
        assert passage.bytes == len(words.encode())
        assert passage.answer == (message["role"] == "assistant")
    _, labels = tokenizer.chat(chat)
    trained_on = [id_ for id_ in labels if id_ not in (-100, tokenizer.im_end)]
    parts = [text.ids[p.begin : p.end] for p in text.answers().passages]
    assert [id_ for part in parts for id_ in part] == trained_on


def test_the_assistants_words_are_scored_by_themselves_too(
    model: Transformer, peer: LlamaForCausalLM, tokenizer: Tokenizer
) -> None:
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "dog 你"}]
    everything, answers = score_documents(model, tokenizer, [chat, "a text", chat], batch_size=2)
    ids, labels = tokenizer.chat(chat)
    given = log_p(peer, [tokenizer.end_of_text, *ids])
    said = torch.tensor([label not in (-100, tokenizer.im_end) for label in labels])
    assert sum(answers.nats) == pytest.approx(-2 * float(given[said].sum()), rel=1e-5)
    assert list(answers.bytes) == [len("dog 你".encode())] * 2
    assert len(everything.bytes) == 3 and everything.tokens > answers.tokens


def test_a_message_without_text_is_refused(model: Transformer, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="content must be text"):
        score_documents(model, tokenizer, [[{"role": "user", "content": None}]], 1)


# ------------------------------------------------------------------------------ the error


def test_the_error_of_equally_long_documents_is_that_of_a_mean() -> None:
    bits = [3.0, 5.0, 4.0, 8.0, 1.0]
    found = TextScore([each * math.log(2) for each in bits], [10] * 5, tokens=25)
    assert found.bits_per_byte == pytest.approx(0.42)
    expected = statistics.stdev(bits) / 10 / math.sqrt(5)
    assert found.standard_error == pytest.approx(expected)
    assert TextScore([1.0], [10], 3).standard_error is None


def test_long_documents_weigh_more_and_agreeing_ones_leave_no_error() -> None:
    found = TextScore([10 * math.log(2), 200 * math.log(2)], [10, 200], tokens=50)
    assert found.bits_per_byte == pytest.approx(1.0)
    assert found.standard_error == pytest.approx(0.0, abs=1e-9)


# ------------------------------------------------------------------------------ held out


class Counted(Source):
    """Numbered texts, of which it remembers how many were read."""

    read = 0

    def rows(self, epoch: int, position: Any) -> Any:
        for number in range(100_000):
            self.read += 1
            yield {"text": f"number {number} of many"}, number + 1


def test_whole_held_out_documents_are_read_until_they_are_enough() -> None:
    source = Counted()
    stream = DocumentStream("counted", source, SourcePart(), 1, 0.05, held_out=True)
    found = held_out_documents(stream, 500)
    assert all(is_held_out(document, 0.05) for document in found)
    sizes = [len(document) for document in found]
    assert sum(sizes[:-1]) < 500 <= sum(sizes)
    assert source.read < 3_000
    again = DocumentStream("counted", Counted(), SourcePart(), 1, 0.05, held_out=True)
    assert held_out_documents(again, 500) == found
