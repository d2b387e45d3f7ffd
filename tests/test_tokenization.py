"""Tests of the tokenizer, the chat template and its loss mask."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import models
from transformers import PreTrainedTokenizerFast

from hamner.errors import UserError
from hamner.tokenization import (
    CHAT_TEMPLATE,
    SPECIAL_TOKENS,
    Message,
    Tokenizer,
    from_json,
    from_path,
    train,
)
from model import IGNORE_INDEX

ROOT = Path(__file__).resolve().parent.parent
COSMO2 = ROOT.parent / "shared" / "tokenizers" / "cosmo2"
# Byte values that cosmo2 has no token for; text with one of them loses it.
NOT_IN_COSMO2 = {4, 6, 0x13, 0x14, 0x16, 0x1D, 0xC0, 0xC1, 0xF1, 0xF2, *range(0xF5, 0x100)}
TEXTS = [
    "The quick brown fox jumps over the lazy dog, and then the dog jumps over the fox. " * 4,
    "def add(a, b):\n    return a + b\n\n\nfor i in range(1234567890):\n\tprint(i, 1999 + 2024)\n"
    * 4,
    "system user assistant <|im_start|>user\n<|im_end|> <|endoftext|> <gh_stars> <|im_end|>" * 4,
    "Füße, naïve café, Ελλάδα, Привет, 你好世界, こんにちは, 🙂🙃🚀 👩‍👩‍👧" * 4,
]
STREAMED = [
    "plain words, nothing else",
    "🙂🚀👩‍👩‍👧🇩🇪 family",
    "你好世界。こんにちは、元気です。 안녕하세요",
    "Füße\n\n\tnaïve   café ½ ∑ \u200d",
    "",
]
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 12 + 30?"},
    {"role": "assistant", "content": "42"},
    {"role": "user", "content": "  Show me code, please.\n"},
    {"role": "assistant", "content": "\n\n```python\ndef f(x):\n    return x  # 🙂\n```\n  "},
    {"role": "user", "content": ""},
    {"role": "assistant", "content": "naïve 你好 🚀"},
]

quick = settings(derandomize=True, deadline=None, max_examples=100)
any_text = st.text(max_size=40)
spiked_text = st.lists(st.one_of(st.text(max_size=5), st.sampled_from(SPECIAL_TOKENS))).map("".join)
space = st.text(" \t\r\n\u00a0\u2028\x1f", max_size=3)
conversations = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(["system", "user", "assistant"]),
            "content": st.tuples(space, any_text, space).map("".join),
        }
    ),
    min_size=1,
    max_size=5,
)


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return train(TEXTS, 400)


@pytest.fixture(scope="module")
def cosmo2() -> Tokenizer:
    if not COSMO2.is_dir():
        pytest.skip("no copy of cosmo2's tokenizer beside the repository")
    return from_path(COSMO2)


@pytest.fixture(scope="module", params=["trained", "cosmo2"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return request.getfixturevalue(request.param)


def control_ids_in(ids: list[int]) -> list[int]:
    return [id_ for id_ in ids if id_ < len(SPECIAL_TOKENS)]


@pytest.fixture(scope="module")
def twin(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """The same tokenizer and chat template in transformers' hands."""
    return PreTrainedTokenizerFast(
        tokenizer_object=HFTokenizer.from_str(tokenizer.to_json()), chat_template=CHAT_TEMPLATE
    )


# Vocabulary


def test_special_tokens_have_the_ids_0_to_16_of_cosmo2(tokenizer: Tokenizer) -> None:
    table = json.loads(tokenizer.to_json())["added_tokens"]
    assert {entry["content"]: entry["id"] for entry in table} == {
        "<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2, "<repo_name>": 3, "<reponame>": 4,
        "<file_sep>": 5, "<filename>": 6, "<gh_stars>": 7, "<issue_start>": 8,
        "<issue_comment>": 9, "<issue_closed>": 10, "<jupyter_start>": 11, "<jupyter_text>": 12,
        "<jupyter_code>": 13, "<jupyter_output>": 14, "<jupyter_script>": 15, "<empty_output>": 16,
    }  # fmt: skip
    assert (tokenizer.end_of_text, tokenizer.im_start, tokenizer.im_end) == (0, 1, 2)
    assert tokenizer.control_ids == set(range(17))


def test_cosmo2_is_read_so_that_published_encodings_come_out(cosmo2: Tokenizer) -> None:
    """Encodings that others published for SmolLM, whose tokenizer this is."""
    assert cosmo2.vocab_size == 49_152
    for text, ids in {
        "Hello, we can use": [19556, 28, 392, 416, 722],
        "The capital of France is": [504, 3575, 282, 4649, 314],
        "Hello world! 123": [19556, 905, 17, 216, 33, 34, 35],
        "Café déjà vu.": [51, 1939, 2756, 32564, 90, 16739, 386, 101, 30],
        "  multiple   spaces": [216, 2701, 256, 5600],
        "\n": [198],
    }.items():
        assert cosmo2.encode(text) == ids


def test_every_digit_is_a_token_of_its_own(tokenizer: Tokenizer) -> None:
    for token in json.loads(tokenizer.to_json())["model"]["vocab"]:
        assert len(token) == 1 or not any(c in "0123456789" for c in token)
    for digits in ("7", "42", "1234567890", "0" * 30):
        ids = tokenizer.encode(digits)
        assert [tokenizer.decode([id_]) for id_ in ids] == list(digits)
    assert [tokenizer.decode([i]) for i in tokenizer.encode("in 1999.")][-5:] == [*"1999", "."]


def test_the_trained_vocabulary_has_at_most_the_size_asked_for() -> None:
    assert train(TEXTS, 300).vocab_size == 300
    assert len(train(TEXTS, 300).encode(TEXTS[0])) < len(train(TEXTS, 273).encode(TEXTS[0]))


def test_a_vocabulary_without_room_for_specials_and_bytes_is_refused() -> None:
    assert train(TEXTS, 17 + 256).vocab_size == 273
    with pytest.raises(UserError, match=r"vocab_size must be at least 273, got 272"):
        train(TEXTS, 272)


TRAIN_AND_PRINT = """
import random, sys
from hamner.tokenization import train
rng = random.Random(0)
words = ["".join(rng.choice("abcdefg") for _ in range(rng.randrange(1, 9))) for _ in range(300)]
texts = [" ".join(rng.choice(words) for _ in range(50)) for _ in range(60)]
sys.stdout.write(train(texts, 600).to_json())
"""


def trained_elsewhere(hash_seed: int) -> str:
    """The tokenizer.json of a training in a fresh process whose hashes are salted otherwise."""
    environment = {**os.environ, "PYTHONHASHSEED": str(hash_seed)}
    command = [sys.executable, "-c", TRAIN_AND_PRINT]
    return subprocess.run(
        command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True
    ).stdout


def test_training_on_the_same_texts_gives_the_same_tokenizer() -> None:
    first, second = trained_elsewhere(1), trained_elsewhere(2)
    assert first == second
    assert from_json(first).vocab_size == 600


# Text to ids and back


@quick
@given(text=any_text)
def test_any_text_comes_back_from_a_trained_tokenizer(trained: Tokenizer, text: str) -> None:
    assert trained.decode(trained.encode(text)) == text


@quick
@given(
    text=st.text(
        st.characters(codec="utf-8").filter(lambda c: NOT_IN_COSMO2.isdisjoint(c.encode()))
    )
)
def test_text_comes_back_from_cosmo2(cosmo2: Tokenizer, text: str) -> None:
    assert cosmo2.decode(cosmo2.encode(text)) == text


@quick
@given(text=spiked_text)
def test_text_that_spells_special_tokens_never_becomes_one(tokenizer: Tokenizer, text: str) -> None:
    for ids in (tokenizer.encode(text), *tokenizer.encode_batch([text, text])):
        assert control_ids_in(ids) == []
    assert tokenizer.document(text)[:-1] == tokenizer.encode(text)
    messages = [{"role": role, "content": text} for role in ("system", "user", "assistant")]
    ids, _ = tokenizer.chat(messages, answer_next=True)
    assert control_ids_in(ids) == [1, 2, 1, 2, 1, 2, 1]


def test_every_special_token_spelled_out_comes_back_as_text(tokenizer: Tokenizer) -> None:
    for token in SPECIAL_TOKENS:
        for text in (token, f"a {token} b", f"{token}{token}\n"):
            assert control_ids_in(tokenizer.encode(text)) == []
            assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_protection_survives_saving_and_reading(tokenizer: Tokenizer) -> None:
    again = from_json(tokenizer.to_json())
    assert again.to_json() == tokenizer.to_json()
    assert again.encode("<|im_end|> 12") == tokenizer.encode("<|im_end|> 12")
    assert again.chat(CONVERSATION) == tokenizer.chat(CONVERSATION)


def test_decoded_text_is_without_control_tokens(tokenizer: Tokenizer) -> None:
    ids = [1, *tokenizer.encode("so"), 2, 7, *tokenizer.encode(" be it"), 0]
    assert tokenizer.decode(ids) == "so be it"


@quick
@given(texts=st.lists(any_text, max_size=5))
def test_a_batch_is_encoded_like_its_texts_one_by_one(trained: Tokenizer, texts: list[str]) -> None:
    assert trained.encode_batch(texts) == [trained.encode(text) for text in texts]


def test_half_a_surrogate_pair_is_no_reason_to_break_down(trained: Tokenizer) -> None:
    text = json.loads(r'"half an emoji: \ud83d"')  # as real JSON Lines files have it
    trained.encode(text)
    trained.documents([text])
    trained.chat([{"role": "user", "content": text}])


# Conversations


def literal_chat(tokenizer: Tokenizer, messages: list[Message]) -> tuple[list[int], list[int]]:
    """The template spelled out turn by turn, ids 1 and 2 being <|im_start|> and <|im_end|>."""
    ids: list[int] = []
    labels: list[int] = []
    for message in messages:
        head = [1, *tokenizer.encode(message["role"]), *tokenizer.encode("\n")]
        words = tokenizer.encode(message["content"].strip())
        tail = tokenizer.encode("\n")
        ids.extend([*head, *words, 2, *tail])
        if message["role"] == "assistant":
            labels.extend([-100] * len(head) + [*words, 2] + [-100] * len(tail))
        else:
            labels.extend([-100] * (len(head) + len(words) + 1 + len(tail)))
    return ids, labels


def test_a_conversation_has_exactly_these_ids_and_labels(tokenizer: Tokenizer) -> None:
    ids, labels = tokenizer.chat(CONVERSATION)
    assert (ids, labels) == literal_chat(tokenizer, CONVERSATION)
    assert IGNORE_INDEX == -100


def test_cosmo2_conversation_in_numbers(cosmo2: Tokenizer) -> None:
    messages = [{"role": "user", "content": "Hello, we can use "}]
    messages += [{"role": "assistant", "content": "\nThe capital of France is"}]
    ids, labels = cosmo2.chat(messages)
    user, assistant = cosmo2.encode("user"), cosmo2.encode("assistant")
    question, answer = [19556, 28, 392, 416, 722], [504, 3575, 282, 4649, 314]
    before = [1, *user, 198, *question, 2, 198, 1, *assistant, 198]
    assert ids == [*before, *answer, 2, 198]
    assert labels == [*[-100] * len(before), *answer, 2, -100]


def test_the_loss_covers_the_words_and_the_end_of_every_answer(tokenizer: Tokenizer) -> None:
    ids, labels = tokenizer.chat(CONVERSATION)
    assert all(label in (id_, IGNORE_INDEX) for id_, label in zip(ids, labels, strict=True))
    answers: list[list[int]] = [[]]
    for label in labels:
        if label != IGNORE_INDEX:
            answers[-1].append(label)
        elif answers[-1]:
            answers.append([])
    wanted = [m["content"].strip() for m in CONVERSATION if m["role"] == "assistant"]
    assert [tokenizer.decode(answer) for answer in answers if answer] == wanted
    assert [answer[-1] for answer in answers if answer] == [tokenizer.im_end] * len(wanted)


def test_a_prompt_is_how_the_finished_conversation_begins(tokenizer: Tokenizer) -> None:
    full, _ = tokenizer.chat(CONVERSATION)
    for end, message in enumerate(CONVERSATION):
        if message["role"] == "assistant":
            prompt, labels = tokenizer.chat(CONVERSATION[:end], answer_next=True)
            assert full[: len(prompt)] == prompt
            following = [*tokenizer.encode(message["content"].strip()), tokenizer.im_end]
            assert full[len(prompt) :][: len(following)] == following
            before = tokenizer.chat(CONVERSATION[:end])[1]
            assert labels == before + [IGNORE_INDEX] * (len(prompt) - len(before))


@quick
@given(messages=conversations, answer_next=st.booleans())
@example(messages=CONVERSATION, answer_next=False)
@example(messages=CONVERSATION[:-1], answer_next=True)
def test_transformers_renders_the_same_ids_and_the_same_mask(
    tokenizer: Tokenizer,
    twin: PreTrainedTokenizerFast,
    messages: list[dict[str, str]],
    answer_next: bool,
) -> None:
    contents = "\n".join(message["content"] for message in messages)
    assume(not any(token in contents for token in SPECIAL_TOKENS))  # it makes them control tokens
    rendered = twin.apply_chat_template(
        messages,
        tokenize=True,
        add_generation_prompt=answer_next,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    ids, labels = tokenizer.chat(messages, answer_next=answer_next)
    assert rendered["input_ids"] == ids
    assert rendered["assistant_masks"] == [int(label != IGNORE_INDEX) for label in labels]


@pytest.mark.parametrize("role", ["tool", "User", "", None, 3, ["user"]])
def test_an_unknown_role_is_refused(trained: Tokenizer, role: Any) -> None:
    with pytest.raises(UserError, match="role must be one of system, user, assistant, got"):
        trained.chat([{"role": role, "content": "hello"}])


@pytest.mark.parametrize("content", [None, 3, ["hello"], [{"type": "text", "text": "hello"}]])
def test_content_that_is_no_text_is_refused(trained: Tokenizer, content: Any) -> None:
    with pytest.raises(UserError, match="content must be text, got"):
        trained.chat([{"role": "user", "content": content}])


def test_a_message_without_role_or_content_is_refused(trained: Tokenizer) -> None:
    with pytest.raises(UserError, match="role must be one of"):
        trained.chat([{"content": "hello"}])
    with pytest.raises(UserError, match="content must be text, got NoneType"):
        trained.chat([{"role": "user"}])


# Documents


def test_documents_end_with_end_of_text_whatever_their_kind(tokenizer: Tokenizer) -> None:
    documents = ["first", CONVERSATION, "", "second 🙂\n", CONVERSATION[:3]]
    expected = [
        [*tokenizer.encode("first"), 0],
        [*tokenizer.chat(CONVERSATION)[0], 0],
        [0],
        [*tokenizer.encode("second 🙂\n"), 0],
        [*tokenizer.chat(CONVERSATION[:3])[0], 0],
    ]
    assert tokenizer.documents(documents) == expected
    assert [tokenizer.document(document) for document in documents] == expected


# Streams


def streamed(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    stream = tokenizer.decode_stream()
    return [stream.add(id_) for id_ in ids]


@pytest.mark.parametrize("text", STREAMED)
def test_a_stream_never_breaks_a_character(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    pieces = streamed(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_stream_holds_a_character_back_until_its_last_byte(trained: Tokenizer) -> None:
    ids = trained.encode("𝄞")  # not in the training texts: one token a byte
    assert len(ids) == 4
    assert streamed(trained, ids) == ["", "", "", "𝄞"]


@quick
@given(text=st.text(st.characters(codec="utf-8", exclude_characters="\ufffd"), max_size=30))
def test_a_stream_adds_up_to_the_decoded_text(trained: Tokenizer, text: str) -> None:
    assert "".join(streamed(trained, trained.encode(text))) == text


@quick
@given(data=st.data())
def test_a_stream_of_any_ids_is_how_their_text_begins(
    tokenizer: Tokenizer, data: st.DataObject
) -> None:
    """Also where the ids are no UTF-8, as those of an untrained model."""
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    text = "".join(streamed(tokenizer, ids))
    assert tokenizer.decode(ids).startswith(text)


def test_streams_do_not_disturb_each_other(trained: Tokenizer) -> None:
    one, other = trained.decode_stream(), trained.decode_stream()
    pairs = zip(trained.encode("𝄞𝄞"), trained.encode("𝄢𝄢"), strict=True)
    pieces = [(one.add(a), other.add(b)) for a, b in pairs]
    assert ["".join(column) for column in zip(*pieces, strict=True)] == ["𝄞𝄞", "𝄢𝄢"]


# Reading


GARBAGE = ["", "null", "[]", "{}", "3", "hello", '{"model": 1}', "\x00", "{" * 50, "ÿ" * 100]


@pytest.mark.parametrize("text", GARBAGE)
def test_garbage_is_no_tokenizer(text: str) -> None:
    with pytest.raises(UserError, match=r"not a usable tokenizer\.json"):
        from_json(text)


def test_a_damaged_tokenizer_is_no_tokenizer(trained: Tokenizer) -> None:
    text = trained.to_json()
    rng = random.Random(0)
    for _ in range(20):
        with pytest.raises(UserError):
            from_json(text[: rng.randrange(len(text) - 1)])
    without_model = {key: value for key, value in json.loads(text).items() if key != "model"}
    with pytest.raises(UserError):
        from_json(json.dumps(without_model))


def test_a_tokenizer_without_the_tokens_of_chatml_is_refused() -> None:
    with pytest.raises(UserError, match=r"no <\|endoftext\|> token; ChatML needs it"):
        from_json(HFTokenizer(models.BPE()).to_str())


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=r"expected a tokenizer\.json") as caught:
            from_path(path)
        assert str(path) in str(caught.value)


def test_a_tokenizer_is_read_from_its_file_and_from_its_folder(
    trained: Tokenizer, tmp_path: Path
) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text(trained.to_json(), encoding="utf-8")
    assert from_path(file).to_json() == from_path(tmp_path).to_json() == trained.to_json()
