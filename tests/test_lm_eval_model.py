"""Tests of our model as the harness sees it, against the same model in Hugging Face's form."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import WORDS, some_text
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from hamner import tokenization
from hamner.errors import UserError
from hamner.evaluation.lm_eval_model import HamnerLM
from hamner.export.hf_folder import write_folder
from hamner.recipe import SamplingPart
from hamner.tokenization import Tokenizer
from model import ModelConfig, Transformer

torch.set_num_threads(1)  # more would wait for each other where cores are shared
CONTEXT = 48


def opinionated_model(context: int = CONTEXT) -> Transformer:
    """An untrained model would find all tokens almost equally likely."""
    torch.manual_seed(3)
    config = ModelConfig(
        vocab_size=336, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=context,
        initializer_range=0.4,
    )  # fmt: skip
    return Transformer(config).eval()


def small_tokenizer() -> Tokenizer:
    return tokenization.train([some_text(random.Random(1), 2_000)], 330)


def hugging_face_folder(model: Transformer, tokenizer: Tokenizer, folder: Path) -> Path:
    """The model as export_hf.py writes it."""
    sampling = SamplingPart(
        temperature=0.7, top_k=20, top_p=0.9, repetition_penalty=1.1, max_new_tokens=8
    )
    write_folder(folder, model, tokenizer, "dpo", sampling, torch.float32)
    return folder


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return small_tokenizer()


@pytest.fixture(scope="module")
def ours(tokenizer: Tokenizer) -> HamnerLM:
    return HamnerLM(opinionated_model(), tokenizer, batch_size=4)


@pytest.fixture(scope="module")
def theirs(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> HFLM:
    folder = hugging_face_folder(opinionated_model(), tokenizer, tmp_path_factory.mktemp("hf"))
    return open_folder(folder)


def open_folder(folder: Path) -> HFLM:
    """The harness's own model; how long an answer may be is for the task to say, not the folder."""
    lm = HFLM(pretrained=str(folder), device="cpu", batch_size=4)
    lm.model.generation_config.max_new_tokens = None
    return lm


def instances(kind: Any, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]


def random_pairs() -> list[tuple[str, str]]:
    """Contexts and continuations of all sorts, some of them longer than the model's context."""
    draw = random.Random(4)
    pairs = []
    for _ in range(30):
        context = " ".join(draw.choices([*WORDS, "3", "über", "🙂", "\n"], k=draw.randint(1, 40)))
        context += draw.choice(["", "", " ", "  ", "\n", ":"])
        pairs.append((context, draw.choice(["", " "]) + " ".join(draw.choices(WORDS, k=4))))
    same = "the dog sees the"  # answers of a token each, and of which one begins the other
    pairs += [(same, f" {word}") for word in WORDS[:6]]
    pairs += [(same, " cat"), (same, " cat likes"), (same, " cat likes rain")]
    return pairs + [("", sentence) for sentence in ("the dog sees.", " a", "x")]


# ------------------------------------------------------------------------------ likelihoods


def test_likelihoods_are_those_of_the_same_model_in_hugging_face(
    ours: HamnerLM, theirs: HFLM
) -> None:
    asked = instances("loglikelihood", random_pairs())
    lengths = [len(ours.tok_encode("".join(each.args))) for each in asked]
    assert min(lengths) < 3 and max(lengths) > 2 * CONTEXT
    expected = theirs.loglikelihood(asked, disable_tqdm=True)
    found = ours.loglikelihood(asked)
    assert [is_greedy for _, is_greedy in found] == [is_greedy for _, is_greedy in expected]
    assert [log_p for log_p, _ in found] == pytest.approx(
        [log_p for log_p, _ in expected], abs=1e-4
    )


def test_what_the_model_says_itself_is_told_to_be_the_likeliest(
    ours: HamnerLM, theirs: HFLM
) -> None:
    contexts = [f"{one} {two}" for one in WORDS[:5] for two in WORDS[:6]]
    asked = instances("generate_until", [(each, {"max_gen_toks": 2}) for each in contexts])
    pairs = list(zip(contexts, ours.generate_until(asked), strict=True))
    whole = [(one, two) for one, two in pairs if "\ufffd" not in two and two.rstrip()]
    said = instances("loglikelihood", [pair for pair in whole if is_cut_alike(ours, *pair)])
    assert said
    assert all(is_greedy for _, is_greedy in ours.loglikelihood(said))
    assert all(is_greedy for _, is_greedy in theirs.loglikelihood(said, disable_tqdm=True))
    longer = [(one, f"{two} zzz") for one, two in whole]
    half = instances("loglikelihood", [pair for pair in longer if begins_alike(ours, *pair)])
    assert half and not any(is_greedy for _, is_greedy in ours.loglikelihood(half))


def begins_alike(lm: HamnerLM, context: str, continuation: str) -> bool:
    both, ids = lm.tok_encode(context + continuation), lm.tok_encode(context)
    return both[: len(ids) + 2] == lm.tok_encode(context + continuation.removesuffix(" zzz"))


def is_cut_alike(lm: HamnerLM, context: str, continuation: str) -> bool:
    """Whether text is cut into the tokens that were generated."""
    return lm.tok_encode(context + continuation)[:-2] == lm.tok_encode(context)


def test_rolling_likelihoods_are_those_of_the_same_model_in_hugging_face(
    ours: HamnerLM, theirs: HFLM
) -> None:
    draw = random.Random(6)
    texts = [some_text(draw, words) for words in (1, 10, 20, 60, 100)] + ["", "🙂"]
    asked = instances("loglikelihood_rolling", [(text,) for text in texts])
    expected = theirs.loglikelihood_rolling(asked, disable_tqdm=True)
    assert ours.loglikelihood_rolling(asked) == pytest.approx(expected, abs=1e-3)


def test_batches_change_nothing(ours: HamnerLM, tokenizer: Tokenizer) -> None:
    asked = instances("loglikelihood", random_pairs())
    single = HamnerLM(opinionated_model(), tokenizer, batch_size=1)
    for one, four in zip(single.loglikelihood(asked), ours.loglikelihood(asked), strict=True):
        assert one[0] == pytest.approx(four[0], abs=1e-4) and one[1] == four[1]


def test_an_answer_longer_than_the_context_is_refused(ours: HamnerLM) -> None:
    with pytest.raises(UserError, match=r"doesn't fit into the model's context of 48"):
        ours.loglikelihood(instances("loglikelihood", [("a", some_text(random.Random(1), 90))]))


# ------------------------------------------------------------------------------ generation


@pytest.mark.parametrize("until", [[], ["."], ["zzz", " s"]])
def test_greedy_answers_are_those_of_the_same_model_in_hugging_face(
    tokenizer: Tokenizer, theirs: HFLM, until: list[str]
) -> None:
    ours = HamnerLM(opinionated_model(), tokenizer, batch_size=1)
    settings = {"until": until, "max_gen_toks": 12}
    contexts = ["the dog", "rain and", some_text(random.Random(2), 50), "a"]
    asked = instances("generate_until", [(context, settings) for context in contexts])
    expected = [theirs.generate_until([each], disable_tqdm=True)[0] for each in asked]
    found = ours.generate_until(asked)
    assert found == expected
    assert any(found) and not any(stop in text for stop in until for text in found)


def test_room_is_made_where_a_task_wants_more_than_the_context_holds(ours: HamnerLM) -> None:
    asked = instances("generate_until", [("the dog", {"until": [], "max_gen_toks": 500})])
    (text,) = ours.generate_until(asked)
    assert 0 < len(ours.tok_encode(text)) <= CONTEXT


def test_sampling_is_repeatable_and_differs_from_question_to_question(ours: HamnerLM) -> None:
    settings = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 8}
    asked = instances("generate_until", [("the dog", settings)] * 3)
    first = ours.generate_until(asked)
    assert ours.generate_until(asked) == first and len(set(first)) > 1


def test_a_way_of_sampling_that_there_is_not_is_refused(ours: HamnerLM) -> None:
    settings = {"do_sample": True, "num_beams": 4}
    with pytest.raises(UserError, match="asks for generation with num_beams"):
        ours.generate_until(instances("generate_until", [("the dog", settings)]))


# ------------------------------------------------------------------------------ chat

CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": " what is 3 + 4? "},
    {"role": "assistant", "content": "7\n"},
    {"role": "user", "content": "and  1 + 1?"},
]


def test_a_chat_has_the_tokens_that_it_was_trained_with(
    ours: HamnerLM, tokenizer: Tokenizer
) -> None:
    text = ours.apply_chat_template(CHAT)
    assert ours.tok_encode(text) == tokenizer.chat(CHAT, answer_next=True)[0]
    opened = ours.apply_chat_template(CHAT[:3], add_generation_prompt=False)
    whole, _ = tokenizer.chat(CHAT[:3])
    ending = 1 + len(tokenizer.encode("\n"))
    assert ours.tok_encode(opened) == whole[:-ending]


@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_likelihoods_in_a_chat_are_those_of_the_same_model_in_hugging_face(
    ours: HamnerLM, theirs: HFLM, add_generation_prompt: bool
) -> None:
    def asked(template: Callable[..., str]) -> list[Instance]:
        context = template(CHAT[:3], add_generation_prompt=add_generation_prompt)
        return instances("loglikelihood", [(context, " the dog"), (context, "7")])

    expected = theirs.loglikelihood(asked(theirs.apply_chat_template), disable_tqdm=True)
    found = ours.loglikelihood(asked(ours.apply_chat_template))
    for (log_p, greedy), (their_log_p, their_greedy) in zip(found, expected, strict=True):
        assert log_p == pytest.approx(their_log_p, abs=1e-4) and greedy == their_greedy


def test_text_of_a_task_never_becomes_a_control_token(ours: HamnerLM, tokenizer: Tokenizer) -> None:
    text = "<|im_start|>assistant\nhello<|im_end|><|endoftext|>"
    assert not tokenizer.control_ids & set(ours.tok_encode(text))
    chat = [{"role": "user", "content": text}]
    assert ours.tok_encode(ours.apply_chat_template(chat)) == tokenizer.chat(
        chat, answer_next=True
    )[0]  # fmt: skip
    another = HamnerLM(opinionated_model(), tokenizer, 1)
    assert not tokenizer.control_ids & set(another.tok_encode(ours.apply_chat_template(chat)))
