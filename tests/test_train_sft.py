"""Stage 4: what becomes of conversations, what carries loss, and when the run stops early."""

from __future__ import annotations

import csv
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Workshop, some_text, write_lines

import prepare_sft_data
import train_sft
from hamner import checkpoints, tokenization, training
from hamner.batches import Batch, Example, PackedBatches, pack, packed_batch
from hamner.errors import UserError, run
from hamner.recipe import Recipe, check_recipe
from hamner.tokenization import Tokenizer
from hamner.training import Trainer, language_modelling
from model import IGNORE_INDEX, Transformer
from train_sft import fit, read_conversations

torch.set_num_threads(1)  # more would wait for each other where cores are shared
Turns = list[dict[str, str]]
Call = Callable[..., int]
ROOM = 96


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    rng = random.Random(3)
    return tokenization.train([some_text(rng, 40) for _ in range(50)], 320)


def turns(*contents: str, system: str | None = None) -> Turns:
    """User and assistant by turns, after a system prompt if one is given."""
    roles = ("user", "assistant")
    spoken = [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]
    return [{"role": "system", "content": system}, *spoken] if system else spoken


def varied_conversations(count: int, seed: int = 0) -> list[Turns]:
    rng = random.Random(seed)
    return [
        turns(
            *(some_text(rng, rng.randint(1, 4)) for _ in range(2 * rng.randint(1, 2))),
            system=rng.choice((None, "be brief")),
        )
        for _ in range(count)
    ]


def examples_of(conversations: list[Turns], tokenizer: Tokenizer, room: int) -> list[Example]:
    found = [fit(tokenizer, messages, room) for messages in conversations]
    return [example for example in found if example is not None]


# ------------------------------------------------------------------------------ fit


@pytest.mark.parametrize("system", [None, "be brief"])
@pytest.mark.parametrize("last", [(), ("and a question without an answer",)])
def test_a_long_conversation_keeps_whole_turns_and_ends_with_an_answer(
    system: str | None, last: tuple[str, ...], tokenizer: Tokenizer
) -> None:
    messages = turns(
        "the dog", "a cat", "old tree", "the river and the sea", "b", "c", *last, system=system
    )
    ends = [i + 1 for i, message in enumerate(messages) if message["role"] == "assistant"]
    whole = {end: tokenizer.chat(messages[:end]) for end in ends}
    lengths = [len(ids) for ids, _ in whole.values()]
    for room in range(1, max(lengths) + 5):
        fitting = [end for end in ends if len(whole[end][0]) <= room]
        example = fit(tokenizer, messages, room)
        if not fitting:
            assert example is None
            continue
        assert example is not None
        ids, labels = whole[fitting[-1]]
        assert example.input_ids.tolist() == ids
        assert example.labels.tolist() == labels
        assert [label for label in labels if label != IGNORE_INDEX][-1] == tokenizer.im_end


def test_a_conversation_without_an_answer_gives_no_example(tokenizer: Tokenizer) -> None:
    assert fit(tokenizer, turns("a question", system="be brief"), ROOM) is None
    assert fit(tokenizer, [], ROOM) is None


# ------------------------------------------------------------------------------ reading


def prepared(path: Path, conversations: list[Turns], **fields: Any) -> Path:
    return write_lines(path, [{"messages": messages, **fields} for messages in conversations])


def test_conversations_without_an_assistant_turn_are_refused_and_counted(
    tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = some_text(random.Random(1), 60)
    path = prepared(
        tmp_path / "train.jsonl",
        [
            turns("q", "a"),
            turns("a question alone"),
            turns(system="only this"),
            [],
            turns(long, "an answer that lies too far back"),
            turns("q", "a", "q", long),
        ],
    )
    found = read_conversations(path, tokenizer, ROOM, "unused")
    assert (len(found.examples), found.without_answer, found.shortened) == (2, 4, 1)
    train_sft.report(path, found, ROOM)
    assert capsys.readouterr().out == (
        f"{path}: 2 conversations, 1 of them cut to whole turns within 96 tokens; 4 refused, no "
        "assistant turn within 96 tokens\n"
    )


def test_a_file_without_any_answer_is_an_error(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = prepared(tmp_path / "train.jsonl", [turns("q"), turns("q")])
    with pytest.raises(UserError, match="not one conversation with an answer to learn from"):
        read_conversations(path, tokenizer, ROOM, "unused")


GOOD = json.dumps({"messages": turns("q", "a")})
MALFORMED = {
    "not JSON": '{"messages": [',
    "no object": "[1, 2]",
    "no messages": '{"text": "q"}',
    "messages null": '{"messages": null}',
    "messages a text": '{"messages": "hello"}',
    "messages texts": '{"messages": ["hello", "there"]}',
    "no role": '{"messages": [{"content": "a"}]}',
    "unknown role": '{"messages": [{"role": "bot", "content": "q"}, '
    '{"role": "assistant", "content": "a"}]}',
    "content no text": '{"messages": [{"role": "assistant", "content": 7}]}',
    "no content": '{"messages": [{"role": "assistant"}]}',
    "first message a text": '{"messages": ["q", {"role": "assistant", "content": "a"}]}',
    "repeat a word": GOOD[:-1] + ', "repeat": "often"}',
    "repeat null": GOOD[:-1] + ', "repeat": null}',
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_a_malformed_line_is_named_by_file_and_number(
    kind: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text(f"{GOOD}\n{GOOD}\n{MALFORMED[kind]}\n{GOOD}\n", encoding="utf-8")
    with pytest.raises(UserError) as error:
        read_conversations(path, tokenizer, ROOM, "unused")
    assert str(error.value).startswith(f"{path}, line 3: ")


# ------------------------------------------------------------------------------ the loss


@pytest.fixture
def recipe(raw: dict[str, Any]) -> Recipe:
    return check_recipe(raw, "test")


def new_model(recipe: Recipe, seed: int = 1) -> Transformer:
    """A model with weights so large that every token's loss is another."""
    torch.manual_seed(seed)
    model = Transformer(recipe.model.config())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def test_the_answers_and_nothing_else_carry_loss(tokenizer: Tokenizer) -> None:
    varied = varied_conversations(12)
    conversations = [c for c in varied if len(tokenizer.chat(c)[0]) <= ROOM]
    examples = examples_of(conversations, tokenizer, ROOM)
    rows = pack([len(example) for example in examples], ROOM)
    assert max(len(row) for row in rows) > 1
    batch = packed_batch([[examples[i] for i in row] for row in rows], ROOM, 2)
    order = [conversations[i] for row in rows for i in row]
    wanted = [
        id_
        for messages in order
        for message in messages
        if message["role"] == "assistant"
        for id_ in [*tokenizer.encode(message["content"].strip()), tokenizer.im_end]
    ]
    labels = torch.cat([micro["labels"].flatten() for micro in batch.micro_batches])
    ids = torch.cat([micro["input_ids"].flatten() for micro in batch.micro_batches])
    assert labels[labels != IGNORE_INDEX].tolist() == wanted
    assert torch.equal(labels[labels != IGNORE_INDEX], ids[labels != IGNORE_INDEX])
    assert batch.weight == len(wanted)


def test_the_loss_of_packed_rows_is_that_of_each_conversation_alone(
    recipe: Recipe, tokenizer: Tokenizer
) -> None:
    model = new_model(recipe)
    examples = examples_of(varied_conversations(12), tokenizer, ROOM)
    rows = pack([len(example) for example in examples], ROOM)
    assert 2 < len(rows) < len(examples), "not packed"
    batch = packed_batch([[examples[i] for i in row] for row in rows], ROOM, 2)
    packed = [language_modelling(model, micro)[0] for micro in batch.micro_batches]
    loss = torch.stack(packed).sum() / batch.weight
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    alone, count = torch.zeros(()), 0
    for example in examples:
        ids = torch.from_numpy(example.input_ids).long()
        log_p = model(ids[None]).logits[0].log_softmax(-1)
        for t in range(1, len(ids)):
            if example.labels[t] != IGNORE_INDEX:
                alone, count = alone - log_p[t - 1, ids[t]], count + 1
    (alone / count).backward()
    assert count == batch.weight
    assert float(loss.detach()) == pytest.approx(float(alone.detach()) / count, abs=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-5, rtol=1e-4)


def summed(model: Transformer, batch: Batch) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss of a batch's micro-batches, and the gradients that they leave, summed up."""
    model.zero_grad()
    loss = 0.0
    for micro in batch.micro_batches:
        part = language_modelling(model, micro)[0] / batch.weight
        part.backward()
        loss += float(part.detach())
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss, {name: gradient.clone() for name, gradient in gradients.items()}


@pytest.mark.parametrize("rows_left", [6, 4, 1])
@pytest.mark.parametrize("ranks", [2, 3])
def test_losses_and_gradients_of_the_ranks_add_up_to_those_of_one(
    ranks: int, rows_left: int, recipe: Recipe, tokenizer: Tokenizer
) -> None:
    model = new_model(recipe)
    examples = examples_of(varied_conversations(24), tokenizer, ROOM)
    rows = pack([len(example) for example in examples], ROOM)[:rows_left]
    step = [[examples[i] for i in row] for row in rows]
    loss, gradients = summed(model, packed_batch(step, ROOM, 2))
    parts = [
        summed(model, packed_batch(step, ROOM, 2, rank=rank, ranks=ranks)) for rank in range(ranks)
    ]
    assert sum(part for part, _ in parts) == pytest.approx(loss, rel=1e-6)
    for name, gradient in gradients.items():
        total = torch.stack([found[name] for _, found in parts]).sum(0)
        torch.testing.assert_close(total, gradient, atol=1e-6, rtol=1e-4)


def test_a_rank_without_a_row_gets_a_filler_that_adds_nothing(
    recipe: Recipe, tokenizer: Tokenizer
) -> None:
    """It computes like the others, for they wait for it, and has a gradient for every weight."""
    model = new_model(recipe)
    (example,) = examples_of([turns("a question", "an answer")], tokenizer, ROOM)
    filler = packed_batch([[example]], ROOM, 2, rank=1, ranks=2)
    assert [micro["num_labels"] for micro in filler.micro_batches] == [0]
    loss, gradients = summed(model, filler)
    assert loss == 0
    assert gradients.keys() == dict(model.named_parameters()).keys()
    assert all(not gradient.any() for gradient in gradients.values())


def test_an_epoch_shows_each_conversation_as_often_as_its_repeat_says(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    conversations = varied_conversations(6)
    path = write_lines(
        tmp_path / "train.jsonl",
        [{"messages": m, "repeat": 1 + i % 3} for i, m in enumerate(conversations)],
    )
    found = read_conversations(path, tokenizer, ROOM, "unused")
    assert found.repeats == [1, 2, 3, 1, 2, 3]
    batches = PackedBatches(
        found.examples, found.repeats, epochs=2, row_length=ROOM, rows_per_step=2, micro_batch=1,
        seed=1,
    )  # fmt: skip
    shown = [number for epoch, row in batches.plan for number in row]
    assert [shown.count(i) for i in range(6)] == [2, 4, 6, 2, 4, 6]


# ------------------------------------------------------------------------------ whole runs


@pytest.fixture
def call(workshop: Workshop, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> Call:
    """Runs stage 4 in this process, after a chat checkpoint with untrained weights."""
    monkeypatch.chdir(workshop.folder)
    monkeypatch.setattr(training, "peak_flops", lambda *_: None)
    recipe = check_recipe(workshop.raw, "test")
    chat = checkpoints.make_checkpoint(
        new_model(recipe, 4),
        tokenizer,
        "chat",
        recipe.model_dump(mode="json"),
        step=5,
        steps=5,
        position=dict(vars(training.Position(step=5))),
    )
    checkpoints.write_whole(recipe.folder("chat") / "latest.pt", chat)

    def call(*arguments: str, main: Callable[[], int] = train_sft.main) -> int:
        workshop.write()
        options = ["--recipe", str(workshop.recipe)]
        options += ["--device", "cpu"] if main is train_sft.main else []
        monkeypatch.setattr(sys, "argv", ["x", *options, *arguments])
        with pytest.raises(SystemExit) as stop:
            run(main)
        return int(stop.value.code or 0)

    return call


@pytest.fixture
def data_ready(call: Call) -> None:
    assert call(main=prepare_sft_data.main) == 0


def folder(workshop: Workshop) -> Path:
    return workshop.folder / "checkpoints/micro/sft"


def metrics(workshop: Workshop) -> list[dict[str, str]]:
    with open(workshop.folder / "logs/micro/sft_metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_without_prepared_data_the_error_says_what_to_run_first(
    call: Call, workshop: Workshop, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call() == 2
    assert capsys.readouterr().err == (
        f"error: {workshop.folder}/sft/train.jsonl doesn't exist: run "
        f"`python prepare_sft_data.py --recipe {workshop.recipe}` first\n"
    )


def scripted(monkeypatch: pytest.MonkeyPatch, losses: list[float]) -> None:
    """Let validations, the two batches before the first step aside, give these losses."""
    left = iter(losses)

    def validate(self: Trainer, limit: int | None = None) -> dict[str, float]:
        return {} if limit else {"val_loss": next(left)}

    monkeypatch.setattr(Trainer, "_validate", validate)


@pytest.mark.usefixtures("data_ready")
@pytest.mark.parametrize("interrupted", [False, True])
def test_the_run_stops_after_patience_validations_without_improvement(
    interrupted: bool,
    call: Call,
    workshop: Workshop,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    scripted(monkeypatch, [3.0, 2.9, 3.1, 2.5, 2.6, 2.5, 2.7, 2.4, 2.3])
    workshop.raw["sft"].update(
        patience=3, validate_every=2, checkpoint={"every": 2, "keep_last": 99}, prompts=[]
    )
    if interrupted:  # how many validations went by without improvement must outlive the process
        assert call("--steps", "10") == 0
    assert call() == 0
    output = capsys.readouterr().out
    assert "sft: no better validation loss than 2.5000 in 3 validations, stopping early" in output
    assert [row["val_loss"] for row in metrics(workshop)][-4:] == ["2.5", "2.6", "2.5", "2.7"]
    assert metrics(workshop)[-1]["step"] == "14"
    latest, best = (checkpoints.load(folder(workshop) / f"{n}.pt") for n in ("latest", "best"))
    assert latest["step"] == 14
    assert best["step"] == 8
    model = checkpoints.load(folder(workshop) / "step_0000008.pt")["model"]
    assert all(torch.equal(model[name], best["model"][name]) for name in model)

    files = sorted(folder(workshop).iterdir())
    assert call() == 0
    output = capsys.readouterr().out
    assert "sft: nothing left to do" in output and "stopped early at step 14 of " in output
    assert sorted(folder(workshop).iterdir()) == files
    assert len(metrics(workshop)) == 7


@pytest.mark.usefixtures("data_ready")
def test_without_patience_the_run_goes_to_its_end(
    call: Call, workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, [2.0] * 99)
    workshop.raw["sft"].update(validate_every=2, prompts=[])
    assert call("--steps", "14") == 0
    assert checkpoints.load(folder(workshop) / "latest.pt")["step"] == 14
    assert checkpoints.load(folder(workshop) / "best.pt")["step"] == 2


@pytest.mark.usefixtures("data_ready")
def test_the_best_checkpoint_has_the_lowest_validation_loss_that_was_measured(
    call: Call, workshop: Workshop, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    workshop.raw["sft"].update(validate_every=3, prompts=[])
    # From step 10 on so large that what has been learnt is lost, whatever the rounding.
    monkeypatch.setattr(training, "learning_rate", lambda step, *_: 0.05 if step < 9 else 4.0)
    assert call("--steps", "18") == 0
    measured = {row["step"]: float(row["val_loss"]) for row in metrics(workshop) if row["val_loss"]}
    lowest = min(measured, key=lambda step: measured[step])
    assert list(measured) == ["3", "6", "9", "12", "15", "18"]
    assert measured[lowest] < min(measured["3"], measured["18"]) - 0.1, "this shows nothing"
    path = folder(workshop) / "best.pt"
    best = checkpoints.load(path)
    assert str(best["step"]) == lowest

    model = checkpoints.load_model(best, path).eval()
    held_out = [
        json.loads(line)["messages"]
        for line in (workshop.folder / "sft/validation.jsonl").read_text().splitlines()
    ]
    examples = examples_of(held_out, tokenizer, ROOM)
    batch = packed_batch([[example] for example in examples], ROOM, 4)
    with torch.no_grad():
        losses = [language_modelling(model, micro)[0] for micro in batch.micro_batches]
    loss = float(torch.stack(losses).sum()) / batch.weight
    assert loss == pytest.approx(measured[lowest], rel=1e-5)


@pytest.mark.usefixtures("data_ready")
def test_training_lowers_the_validation_loss(call: Call, workshop: Workshop) -> None:
    assert call() == 0
    losses = [float(row["val_loss"]) for row in metrics(workshop) if row["val_loss"]]
    assert losses[-1] < losses[0] - 0.2
    assert metrics(workshop)[-1]["epoch"] == "2"


@pytest.mark.usefixtures("data_ready")
def test_a_run_that_goes_on_with_another_batch_size_still_comes_to_an_end(
    call: Call, workshop: Workshop
) -> None:
    workshop.raw["sft"].update(prompts=[])
    assert call("--steps", "10") == 0
    assert call("--set", "sft.sequences_per_step=2") in (0, 2)


@pytest.mark.usefixtures("data_ready")
@pytest.mark.parametrize("change", ["order", "repeat"])
def test_a_resume_with_other_conversations_is_refused(
    change: str, call: Call, workshop: Workshop, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("--steps", "4") == 0
    path = Path(workshop.raw["sft"]["data"]["folder"]) / "train.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    if change == "order":
        rows.reverse()
    else:
        rows[0]["repeat"] = 3
    write_lines(path, rows)
    capsys.readouterr()
    assert call() == 2
    assert f"error: {path} is not what this run began with" in capsys.readouterr().err
