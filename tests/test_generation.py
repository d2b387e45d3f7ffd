"""Tests of sampling: each step against a plain account of it in Python, and the whole by use."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hamner.generation import (
    Sampling,
    choose,
    filtered,
    fit_context,
    generate_batch,
    generate_ids,
    generate_text,
    penalise,
)
from hamner.tokenization import Message, Tokenizer, train
from model import KVCache, ModelConfig, Output, Transformer

CONFIG = ModelConfig(
    vocab_size=300,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=80,
)
GREEDY = Sampling(
    temperature=0.0, top_k=0, top_p=1.0, repetition_penalty=1.0, max_new_tokens=60, seed=0
)
FREE = replace(GREEDY, temperature=1.0)
PROMPT = [5, 17, 42, 99, 123, 7]

quick = settings(derandomize=True, deadline=None, max_examples=200)
# Different from each other and far enough apart that rounding can't reorder them.
distinct_logits = st.lists(
    st.integers(-400, 400).map(lambda n: n / 50), min_size=1, max_size=20, unique=True
)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small run fastest on one thread, above all where other programs run too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model() -> Transformer:
    """Random, with weights so large that its answers wander about."""
    torch.manual_seed(0)
    model = Transformer(CONFIG)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=1.3 / math.sqrt(parameter.shape[1]))
    return model


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train(["the dog and the cat and the dog again, hello there " * 5, "é 🙂 你好"], 300)


class Scripted(Transformer):
    """Says the ids of a script, one after the other, whatever it is asked."""

    def __init__(self, script: Sequence[int], prompt_length: int):
        super().__init__(CONFIG)
        self.script, self.prompt_length = script, prompt_length

    def forward(self, input_ids: Tensor, *args: Any, cache: KVCache, **options: Any) -> Output:
        cache.length += input_ids.shape[1]
        logits = torch.zeros(1, 1, CONFIG.vocab_size)
        logits[0, 0, self.script[cache.length - self.prompt_length]] = 50.0
        return Output(logits=logits)


def scripted_answer(script: Sequence[int], stop: Sequence[int], sampling: Sampling) -> list[int]:
    return list(generate_ids(Scripted(script, len(PROMPT)), PROMPT, sampling, stop))


def marked(ids: Sequence[int], size: int) -> Tensor:
    """(1, size), True at the ids."""
    found = torch.zeros(1, size, dtype=torch.bool)
    found[0, list(ids)] = True
    return found


def choose_one(
    logits: Tensor, said: Sequence[int], sampling: Sampling, generator: torch.Generator
) -> int:
    """The next id by logits (V), after `said`."""
    return int(choose(logits[None], marked(said, len(logits)), sampling, generator))


def answer(model: Transformer, sampling: Sampling, prompt: Sequence[int] = PROMPT) -> list[int]:
    return list(generate_ids(model, prompt, sampling, stop=()))


# The whole


def test_greedy_answers_equal_a_plain_loop_without_cache(model: Transformer) -> None:
    ids = list(PROMPT)
    with torch.no_grad():
        for _ in range(60):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert answer(model, GREEDY) == ids[len(PROMPT) :]
    assert len(set(ids)) > 10  # not a loop of a few tokens, in which much would look alike


def test_sampled_answers_equal_a_plain_loop_without_cache(model: Transformer) -> None:
    sampling = Sampling(0.8, 40, 0.9, 1.3, max_new_tokens=40, seed=11)
    generator = torch.Generator().manual_seed(11)
    said: list[int] = []
    with torch.no_grad():
        for _ in range(40):
            logits = model(torch.tensor([PROMPT + said])).logits[0, -1]
            said.append(choose_one(logits, said, sampling, generator))
    assert answer(model, sampling) == said


def test_the_seed_decides_the_answer(model: Transformer) -> None:
    first = answer(model, replace(FREE, seed=1))
    torch.rand(3)  # what others draw in between makes no difference
    assert answer(model, replace(FREE, seed=1)) == first
    assert answer(model, replace(FREE, seed=2)) != first


def test_without_a_seed_answers_differ(model: Transformer) -> None:
    assert answer(model, replace(FREE, seed=None)) != answer(model, replace(FREE, seed=None))


def test_without_a_seed_the_randomness_of_the_rest_of_the_program_is_left_alone(
    model: Transformer,
) -> None:
    torch.manual_seed(5)
    expected = torch.rand(4)
    torch.manual_seed(5)
    answer(model, replace(FREE, seed=None, max_new_tokens=2))
    assert torch.equal(torch.rand(4), expected)


def test_a_seeded_answer_leaves_the_randomness_of_the_rest_alone(model: Transformer) -> None:
    before = torch.get_rng_state()
    answer(model, FREE)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("stop", [[50], [60, 50], {50, 70}])
def test_a_stop_id_ends_the_answer_and_is_not_part_of_it(stop: Any) -> None:
    assert scripted_answer([40, 41, 42, 50, 43, 60], stop, GREEDY) == [40, 41, 42]
    assert scripted_answer([50, 41], stop, GREEDY) == []


def test_an_answer_ends_after_max_new_tokens(model: Transformer) -> None:
    for count in (0, 1, 7):
        short = answer(model, replace(GREEDY, max_new_tokens=count))
        assert short == answer(model, GREEDY)[:count]
        assert len(short) == count


def test_an_answer_ends_where_the_context_is_full(model: Transformer) -> None:
    endless = replace(GREEDY, max_new_tokens=10_000)
    for length in (6, 77, 79):
        prompt = (PROMPT * 20)[:length]
        assert len(answer(model, endless, prompt)) == 80 - length


@pytest.mark.parametrize("length", [0, 80, 81])
def test_a_prompt_without_room_for_an_answer_is_refused(model: Transformer, length: int) -> None:
    with pytest.raises(ValueError, match=f"a prompt of {length} tokens leaves no room"):
        answer(model, GREEDY, [9] * length)


def test_the_penalty_looks_at_the_answer_and_not_at_the_prompt() -> None:
    again_and_again = [PROMPT[0]] * 20
    penalised = replace(FREE, repetition_penalty=1e6, max_new_tokens=20)
    said = scripted_answer(again_and_again, (), penalised)
    assert said[0] == PROMPT[0]  # it would be one of 300 equally likely ids
    assert said.count(PROMPT[0]) < 4


def test_the_consumer_keeps_its_gradient_mode_between_tokens(model: Transformer) -> None:
    inside: list[bool] = []
    handle = model.register_forward_hook(lambda *_: inside.append(torch.is_grad_enabled()))
    tokens = generate_ids(model, PROMPT, replace(GREEDY, max_new_tokens=4), ())
    for _ in tokens:
        assert torch.is_grad_enabled()
    with torch.no_grad():
        for _ in generate_ids(model, PROMPT, replace(GREEDY, max_new_tokens=4), ()):
            assert not torch.is_grad_enabled()
    abandoned = generate_ids(model, PROMPT, GREEDY, ())
    next(abandoned)
    abandoned.close()
    handle.remove()
    assert torch.is_grad_enabled()
    assert inside == [False] * 9


# Side by side


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Twenty, of 1 to 20 ids."""
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(0, 300, (n,), generator=generator).tolist() for n in range(1, 21)]


def test_cached_batched_and_uncached_answers_are_the_same_for_200_tokens(
    model: Transformer, prompts: list[list[int]]
) -> None:
    long = Transformer(replace(CONFIG, max_position_embeddings=220))
    long.load_state_dict(model.state_dict())
    sampling = replace(GREEDY, max_new_tokens=200)
    batched = generate_batch(long, prompts, sampling, stop=())
    assert batched == [list(generate_ids(long, prompt, sampling, ())) for prompt in prompts]
    assert {len(ids) for ids in batched} == {200}
    for prompt, ids in zip(prompts, batched, strict=True):
        with torch.no_grad():  # all positions at once: each id is the likeliest after those before
            logits = long(torch.tensor([prompt + ids])).logits[0]
        assert logits.argmax(-1).tolist()[len(prompt) - 1 : -1] == ids
    assert len({tuple(ids[-20:]) for ids in batched}) > 10  # they went different ways


def test_answers_side_by_side_stop_each_at_its_own_end(
    model: Transformer, prompts: list[list[int]]
) -> None:
    whole = [list(generate_ids(model, prompt, GREEDY, ())) for prompt in prompts]
    stop = {id_ for id_, _ in Counter(id_ for ids in whole for id_ in ids).most_common(8)}
    expected = [list(generate_ids(model, prompt, GREEDY, stop)) for prompt in prompts]
    assert len({len(ids) for ids in expected}) > 5 and [] in expected
    assert generate_batch(model, prompts, GREEDY, stop) == expected


def test_each_answer_side_by_side_is_drawn_and_penalised_for_itself(model: Transformer) -> None:
    penalised = replace(FREE, top_k=1, repetition_penalty=1e6, max_new_tokens=20)
    both = generate_batch(model, [PROMPT, PROMPT[::-1]], penalised, ())
    assert both == [answer(model, penalised), answer(model, penalised, PROMPT[::-1])]
    same = generate_batch(model, [PROMPT] * 6, FREE, ())
    assert len({tuple(ids) for ids in same}) == 6
    assert generate_batch(model, [PROMPT] * 6, FREE, ()) == same
    assert generate_batch(model, [], FREE, ()) == []


def test_answers_side_by_side_end_where_the_longest_prompt_fills_the_context(
    model: Transformer,
) -> None:
    endless = replace(GREEDY, max_new_tokens=10_000)
    assert [len(ids) for ids in generate_batch(model, [[1] * 70, [2]], endless, ())] == [10, 10]
    with pytest.raises(ValueError, match="a prompt of 0 tokens leaves no room"):
        generate_batch(model, [[1], []], GREEDY, ())


# Repetition penalty


@quick
@given(
    values=st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=12),
    data=st.data(),
    penalty=st.floats(1.0, 3.0),
)
def test_the_penalty_lowers_the_logits_of_the_given_ids_alone(
    values: list[float], data: st.DataObject, penalty: float
) -> None:
    ids = data.draw(st.lists(st.integers(0, len(values) - 1), max_size=20))
    logits = torch.tensor(values)
    (found,) = penalise(logits[None], marked(ids, len(values)), penalty)
    expected = [
        (x / penalty if x > 0 else x * penalty) if i in ids else x for i, x in enumerate(values)
    ]
    torch.testing.assert_close(found, torch.tensor(expected))
    assert logits.tolist() == values  # the argument stays as it was


def test_the_penalty_lowers_positive_and_negative_logits() -> None:
    logits = torch.tensor([4.0, -4.0, 0.0, 4.0, -4.0])
    (found,) = penalise(logits[None], marked([0, 1, 2, 0], 5), 2.0)
    assert found.tolist() == [2.0, -8.0, 0.0, 4.0, -4.0]
    assert penalise(logits[None], marked([], 5), 2.0)[0].tolist() == logits.tolist()


def test_control_ids_are_never_penalised(model: Transformer) -> None:
    penalised = replace(FREE, repetition_penalty=1e6, max_new_tokens=20, top_k=1)
    assert len(set(answer(model, penalised))) == 20  # nothing comes twice
    free = answer(model, replace(FREE, top_k=1, max_new_tokens=60))
    repeated = [id_ for id_, count in Counter(free).items() if count > 1]
    assert repeated, "the greedy answer should repeat something"
    spared = list(generate_ids(model, PROMPT, replace(penalised, max_new_tokens=60), (), repeated))
    assert max(Counter(spared)[id_] for id_ in repeated) > 1


# Filters


def left(logits: Tensor, *how: float) -> Tensor:
    """The logits (V), with -inf for what `filtered` doesn't leave."""
    logits, ids = filtered(logits[None], *how)  # type: ignore[arg-type]
    return torch.full((int(ids.max()) + 1,), -torch.inf).index_copy(0, ids[0], logits[0])


def allowed(logits: Tensor) -> set[int]:
    return set((logits > -torch.inf).nonzero().flatten().tolist())


def softmax(values: Sequence[float]) -> list[float]:
    top = max(values)
    weights = [math.exp(value - top) for value in values]
    return [weight / sum(weights) for weight in weights]


def literal_filter(values: Sequence[float], top_k: int, top_p: float) -> dict[int, float]:
    """What may be drawn, and how likely each is before the rest is left out, likeliest first."""
    order = sorted(range(len(values)), key=lambda i: -values[i])
    order = order[:top_k] if top_k else order
    likelihood = softmax([values[i] for i in order])
    kept: dict[int, float] = {}
    for i, p in zip(order, likelihood, strict=True):
        if sum(kept.values()) >= top_p:
            break
        kept[i] = p
    return kept


@quick
@given(values=distinct_logits, top_k=st.integers(0, 25))
def test_top_k_leaves_the_k_likeliest(values: list[float], top_k: int) -> None:
    found = left(torch.tensor(values), top_k, 1.0)
    assert allowed(found) == set(literal_filter(values, top_k, 1.1))
    assert all(found[i] == torch.tensor(values)[i] for i in allowed(found))


@quick
@given(values=distinct_logits, top_k=st.integers(0, 25), top_p=st.floats(0.01, 1.0))
def test_top_p_leaves_the_fewest_that_reach_p_together(
    values: list[float], top_k: int, top_p: float
) -> None:
    kept = literal_filter(values, top_k, top_p if top_p < 1 else 1.1)
    sums = [sum(list(kept.values())[: n + 1]) for n in range(len(kept))]
    assume(all(abs(total - top_p) > 1e-5 for total in sums) or top_p == 1)  # beyond rounding
    assert allowed(left(torch.tensor(values), top_k, top_p)) == set(kept)


@quick
@given(values=distinct_logits, min_p=st.floats(0.01, 1.0))
def test_min_p_leaves_what_is_likely_enough_beside_the_likeliest(
    values: list[float], min_p: float
) -> None:
    likelihood = softmax(values)
    ratios = [p / max(likelihood) for p in likelihood]
    assume(all(abs(ratio - min_p) > 1e-5 or ratio == 1 for ratio in ratios))
    expected = {i for i, ratio in enumerate(ratios) if ratio >= min_p}
    assert allowed(left(torch.tensor(values), 0, 1.0, min_p)) == expected


def test_of_equals_top_k_leaves_no_more_than_k() -> None:
    logits = torch.tensor([1.0, 2.0, 1.0, 1.0, 0.0])
    found = allowed(left(logits, 3, 1.0))
    assert len(found) == 3 and 1 in found and 4 not in found


def test_filters_by_hand() -> None:
    logits = torch.tensor([0.1, 0.5, 0.15, 0.25]).log()
    assert allowed(left(logits, 0, 1.0)) == {0, 1, 2, 3}
    assert allowed(left(logits, 2, 1.0)) == {1, 3}
    assert allowed(left(logits, 9, 1.0)) == {0, 1, 2, 3}
    assert allowed(left(logits, 0, 0.01)) == {1}
    assert allowed(left(logits, 0, 0.49)) == {1}
    assert allowed(left(logits, 0, 0.7)) == {1, 3}
    assert allowed(left(logits, 0, 0.8)) == {1, 2, 3}
    assert allowed(left(logits, 0, 1.0, 0.3)) == {1, 2, 3}  # from 0.15 on
    assert allowed(left(logits, 0, 0.7, 0.51)) == {1}
    assert allowed(left(logits, 2, 0.6)) == {1}  # of these two, the likelier has 2/3


# The draw

LOGITS = [2.0, -1.0, 0.5, 3.0, 1.5, 0.0, 2.5, -3.0]


def draws(sampling: Sampling, said: Sequence[int] = (), count: int = 4_000) -> Counter[int]:
    generator = torch.Generator().manual_seed(3)
    logits = torch.tensor(LOGITS)
    return Counter(choose_one(logits, said, sampling, generator) for _ in range(count))


def chi_square(found: Counter[int], expected: dict[int, float]) -> float:
    """Pearson's statistic of the counts against probabilities."""
    count = found.total()
    return sum((found[i] - count * p) ** 2 / (count * p) for i, p in expected.items())


def distribution(values: Sequence[float], temperature: float, top_k: int) -> dict[int, float]:
    order = sorted(range(len(values)), key=lambda i: -values[i])[:top_k]
    return dict(zip(order, softmax([values[i] / temperature for i in order]), strict=True))


def test_draws_follow_the_exact_distribution() -> None:
    found = draws(replace(FREE, temperature=0.7, top_k=5))
    expected = distribution(LOGITS, 0.7, 5)
    assert found.keys() == expected.keys() == {0, 2, 3, 4, 6}
    assert chi_square(found, expected) < 18.5  # 4 degrees of freedom: beyond it 1 in 1,000
    assert chi_square(found, distribution(LOGITS, 0.8, 5)) > 18.5  # so a wrong one would show


def test_draws_follow_the_exact_distribution_under_a_penalty() -> None:
    said = [3, 1, 3]
    found = draws(replace(FREE, temperature=0.7, top_k=5, repetition_penalty=1.3), said)
    expected = distribution([2.0, -1.3, 0.5, 3.0 / 1.3, 1.5, 0.0, 2.5, -3.0], 0.7, 5)
    assert found.keys() == expected.keys()
    assert chi_square(found, expected) < 18.5
    assert chi_square(found, distribution(LOGITS, 0.7, 5)) > 18.5


def test_draws_side_by_side_follow_each_its_own_distribution() -> None:
    logits = torch.tensor([LOGITS, LOGITS[::-1]])
    generator, said = torch.Generator().manual_seed(3), torch.zeros(2, 8, dtype=torch.bool)
    sampling = replace(FREE, temperature=0.7, top_k=5)
    rounds = [choose(logits, said, sampling, generator).tolist() for _ in range(4_000)]
    for row, values in enumerate((LOGITS, LOGITS[::-1])):
        found = Counter(ids[row] for ids in rounds)
        expected = distribution(values, 0.7, 5)
        assert found.keys() == expected.keys()
        assert chi_square(found, expected) < 18.5  # 4 degrees of freedom: beyond it 1 in 1,000


def test_draws_follow_the_exact_distribution_with_top_p() -> None:
    found = draws(replace(FREE, temperature=2.0, top_p=0.7))
    kept = literal_filter([value / 2.0 for value in LOGITS], 0, 0.7)  # the temperature comes first
    expected = {i: p / sum(kept.values()) for i, p in kept.items()}
    assert found.keys() == expected.keys() == {0, 3, 4, 6}
    assert chi_square(found, expected) < 16.3  # 3 degrees of freedom: beyond it 1 in 1,000


@quick
@given(
    values=distinct_logits,
    data=st.data(),
    top_k=st.integers(0, 5),
    top_p=st.floats(0.01, 1.0),
    penalty=st.floats(1.0, 100.0),
)
def test_temperature_zero_takes_the_likeliest_whatever_else_is_set(
    values: list[float], data: st.DataObject, top_k: int, top_p: float, penalty: float
) -> None:
    said = data.draw(st.lists(st.integers(0, len(values) - 1)))
    sampling = Sampling(0.0, top_k, top_p, penalty, max_new_tokens=1)
    chosen = choose_one(torch.tensor(values), said, sampling, torch.Generator())
    assert chosen == values.index(max(values))


@pytest.mark.parametrize("temperature", [1e-6, 1e-3])
def test_a_low_temperature_is_close_to_greedy(temperature: float) -> None:
    assert draws(replace(FREE, temperature=temperature), count=50) == {3: 50}


def test_a_temperature_next_to_zero_is_greedy_too() -> None:
    assert draws(replace(FREE, temperature=1e-39), count=50) == {3: 50}


# Text


@pytest.mark.parametrize("text", ["the dog", "é 🙂🙂 你好 𝄞 the cat", "\n\n  hello", ""])
@pytest.mark.parametrize("end", ["im_end", "end_of_text"])
def test_text_is_streamed_up_to_the_end_token(tokenizer: Tokenizer, text: str, end: str) -> None:
    ids = tokenizer.encode(text)
    script = [*ids, getattr(tokenizer, end), *tokenizer.encode(" never said")]
    model = Scripted(script, len(PROMPT))
    pieces = list(generate_text(model, tokenizer, PROMPT, GREEDY))
    assert "".join(pieces) == tokenizer.decode(ids) == text
    assert "" not in pieces
    assert not any("\ufffd" in piece for piece in pieces)


def test_text_comes_while_it_is_made(tokenizer: Tokenizer) -> None:
    script = [*tokenizer.encode("hello there"), tokenizer.im_end]
    model = Scripted(script, len(PROMPT))
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    seen = [len(calls) for _ in generate_text(model, tokenizer, PROMPT, GREEDY)]
    assert seen == list(range(1, len(script)))


def test_text_of_a_random_model_is_that_of_its_ids(
    model: Transformer, tokenizer: Tokenizer
) -> None:
    for seed in range(5):
        sampling = replace(FREE, seed=seed)
        stop = (tokenizer.im_end, tokenizer.end_of_text)
        ids = list(generate_ids(model, PROMPT, sampling, stop))
        text = "".join(generate_text(model, tokenizer, PROMPT, sampling))
        decoded = tokenizer.decode(ids)
        assert decoded.startswith(text)
        assert len(text) > len(decoded) - 4  # of an unfinished character nothing is shown


# Making a conversation fit

SYSTEM = {"role": "system", "content": "be brief"}


def turn(number: int) -> list[Message]:
    return [
        {"role": "user", "content": f"question {number} " + "and the dog " * number},
        {"role": "assistant", "content": f"answer {number}"},
    ]


LAST: Message = {"role": "user", "content": "and the cat?"}
TURNS = [turn(1), turn(3), turn(2)]


def conversation(system: bool, first_turn: int) -> list[Message]:
    turns = [message for one in TURNS[first_turn:] for message in one]
    return [*([SYSTEM] if system else []), *turns, LAST]


@pytest.mark.parametrize("system", [True, False])
def test_the_oldest_turns_go_until_the_rest_fits(tokenizer: Tokenizer, system: bool) -> None:
    candidates = [conversation(system, first) for first in range(4)]
    prompts = [tokenizer.chat(messages, answer_next=True)[0] for messages in candidates]
    sizes = [len(prompt) for prompt in prompts]
    assert sizes == sorted(sizes, reverse=True)
    for room in range(sizes[-1], sizes[0] + 3):
        longest = next(i for i, size in enumerate(sizes) if size <= room)
        found = fit_context(tokenizer, candidates[0], room)
        assert found == (prompts[longest], candidates[longest])


@pytest.mark.parametrize("system", [True, False])
def test_a_last_turn_that_does_not_fit_is_refused(tokenizer: Tokenizer, system: bool) -> None:
    shortest = len(tokenizer.chat(conversation(system, 3), answer_next=True)[0])
    for messages in (conversation(system, 0), conversation(system, 3)):
        with pytest.raises(ValueError, match=f"{shortest} tokens where {shortest - 1} fit"):
            fit_context(tokenizer, messages, shortest - 1)


def test_the_callers_messages_stay_as_they_were(tokenizer: Tokenizer) -> None:
    messages = conversation(True, 0)
    fit_context(tokenizer, messages, 60)
    assert messages == conversation(True, 0)


def test_a_conversation_without_a_question_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError):
        fit_context(tokenizer, [SYSTEM], 100)
