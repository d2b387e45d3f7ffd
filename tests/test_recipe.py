"""Tests of the recipes: v4's published numbers, errors, `--set` and `common`."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from hamner.errors import UserError
from hamner.optim import learning_rate
from hamner.plan import planned_tokens
from hamner.recipe import (
    RECIPE_FOLDER,
    STAGES,
    Recipe,
    apply_override,
    check_recipe,
    load_recipe,
    read_yaml,
)

RECIPES = sorted(path.stem for path in RECIPE_FOLDER.glob("*.yaml"))
Place = tuple[Any, ...]

NO_DECAY = {"decay": 0, "decay_type": "linear"}  # what says how a wsd schedule decays
NOT_CHAINED = {"chained": 0, "chained_turns": 10}

# What was published about the real run, number by number.
V4: dict[str, Any] = {
    "name": "v4",
    "seed": 42,
    "precision": "auto",  # on the GPU of the real run fp16, True and True; see test_training.py
    "compile": "auto",
    "gradient_checkpointing": "auto",
    "model": {
        "vocab_size": 49_152,
        "hidden_size": 768,
        "intermediate_size": 2_048,
        "num_hidden_layers": 20,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "max_position_embeddings": 1_024,
        "rope_theta": 10_000.0,
        "rms_norm_eps": 1e-5,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
    },
    "tokenizer.hub": "HuggingFaceTB/cosmo2-tokenizer",
    "sampling.temperature": 0.8,
    "sampling.top_k": 40,
    "sampling.top_p": 0.9,
    "sampling.repetition_penalty": 1.15,
    # Stage 1
    "base.folder": "checkpoints/pretrain_v4",
    "base.steps": 400_000,
    "base.sequences_per_step": 24,
    "base.sequence_length": 1_024,
    "base.optimizer": {
        "kind": "adamw",
        "momentum": 0.95,
        "embedding_rate": 1.0,
        "embedding_weight_decay": None,
        "learning_rate": 2e-4,
        "betas": (0.9, 0.95),
        "eps": 1e-8,
        "weight_decay": 0.1,
        "clip": 1.0,
    },
    "base.schedule": {"kind": "wsd", "warmup": 2_000, "floor": 1.0} | NO_DECAY,
    "base.sources": [
        {"name": "fineweb_edu", "weight": 0.60},
        {"name": "dclm", "weight": 0.40},
    ],
    "base.checkpoint": {"every": 1_000, "keep_last": 2, "keep_every": 100_000},
    # Stage 2
    "anneal.folder": "checkpoints/pretrain_v4_anneal",
    "anneal.steps": 122_000,
    "anneal.sequences_per_step": 24,
    "anneal.sequence_length": 1_024,
    "anneal.optimizer": {
        "kind": "adamw",
        "momentum": 0.95,
        "embedding_rate": 1.0,
        "embedding_weight_decay": None,
        "learning_rate": 2e-4,
        "betas": (0.9, 0.95),
        "eps": 1e-8,
        "weight_decay": 0.1,
        "clip": 1.0,
    },
    "anneal.schedule": {"kind": "linear", "warmup": 0, "floor": 0.0} | NO_DECAY,
    "anneal.sources": [
        {"name": "fineweb_edu", "weight": 0.40},
        {"name": "dclm", "weight": 0.20},
        {"name": "code", "weight": 0.25},
        {"name": "math", "weight": 0.15},
    ],
    # Stage 3
    "chat.folder": "checkpoints/chat_pretrain",
    "chat.steps": 40_000,
    "chat.sequences_per_step": 24,
    "chat.sequence_length": 1_024,
    "chat.optimizer.learning_rate": 5e-5,
    "chat.optimizer.betas": (0.9, 0.95),
    "chat.optimizer.weight_decay": 0.1,
    "chat.schedule": {"kind": "cosine", "warmup": 500, "floor": 0.1} | NO_DECAY,
    "chat.sources": [
        {"name": "smoltalk", "weight": 0.40},
        {"name": "fineweb_edu", "weight": 0.25},
        {"name": "dclm", "weight": 0.15},
        {"name": "voice", "weight": 0.10},
        {"name": "synthetic", "weight": 0.10},
    ],
    # Stage 4
    "sft.folder": "checkpoints/sft",
    "sft.epochs": 3,
    "sft.patience": 3,
    "sft.steps": None,
    "sft.optimizer.learning_rate": 1e-4,
    "sft.optimizer.betas": (0.9, 0.95),
    "sft.optimizer.weight_decay": 0.1,
    "sft.schedule": {"kind": "linear", "warmup": 100, "floor": 0.1} | NO_DECAY,
    "sft.data.sources": [
        {
            "name": "smoltalk",
            "label": "smoltalk",
            "at_most": 100_000,
            "repeat": 1,
            "min_characters": 200,
            "max_characters": 3_600,
        }
        | NOT_CHAINED,
        {
            "name": "diverse",
            "label": "custom_diverse",
            "at_most": None,
            "repeat": 2,
            "min_characters": 1,
            "max_characters": None,
        }
        | NOT_CHAINED,
        {
            "name": "tech",
            "label": "custom_tech",
            "at_most": 2_000,
            "repeat": 2,
            "min_characters": 1,
            "max_characters": None,
        }
        | NOT_CHAINED,
    ],
    # Stage 5
    "dpo.folder": "checkpoints/dpo",
    "dpo.epochs": 2,
    "dpo.beta": 0.1,
    "dpo.optimizer.learning_rate": 1e-6,
    "dpo.optimizer.betas": (0.9, 0.95),
    "dpo.optimizer.weight_decay": 0.1,
    "dpo.schedule": {"kind": "cosine", "warmup": 100, "floor": 0.1} | NO_DECAY,
    "dpo.train": "ultrafeedback",
    "dpo.validation": "ultrafeedback_test",
}


def complaint(raw: dict[str, Any]) -> str:
    """What is said about a recipe that must be refused, as r.yaml."""
    with pytest.raises(UserError) as caught:
        check_recipe(raw, "r.yaml")
    return str(caught.value)


def refusal(*overrides: str, recipe: str = "v4") -> str:
    with pytest.raises(UserError) as caught:
        load_recipe(recipe, overrides)
    return str(caught.value)


def at(data: Any, place: Place) -> Any:
    for step in place:
        data = data[step]
    return data


def put(data: Any, place: Place, value: Any) -> None:
    at(data, place[:-1])[place[-1]] = value


def leaves(data: Any, place: Place = ()) -> Iterator[tuple[Place, Any]]:
    """Every place in the data that holds neither a list nor a mapping, and what it holds."""
    steps = data.items() if isinstance(data, dict) else enumerate(data)
    for step, value in steps:
        if isinstance(value, (dict, list)):
            yield from leaves(value, (*place, step))
        else:
            yield (*place, step), value


def key_of(place: Place) -> str:
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in place)
    return text.removeprefix(".")


@pytest.fixture
def plain(raw: dict[str, Any]) -> dict[str, Any]:
    """The small recipe, none of whose parts is the same object as another."""
    return json.loads(json.dumps(raw))


# ------------------------------------------------------------------------------- the recipes


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_loads_and_bears_the_name_of_its_file(name: str) -> None:
    assert load_recipe(name).name == name


def test_there_are_a_real_and_a_tiny_recipe() -> None:
    assert {"v4", "tiny"} <= set(RECIPES)


@pytest.mark.parametrize("key", V4)
def test_v4_has_the_published_number(key: str) -> None:
    assert at(load_recipe("v4").model_dump(), tuple(key.split("."))) == V4[key]


def test_v4_has_163_609_344_parameters() -> None:
    assert load_recipe("v4").model.config().num_parameters() == 163_609_344


def test_v4_plans_13_81_billion_tokens_in_its_three_streaming_stages() -> None:
    recipe = load_recipe("v4")
    tokens = [planned_tokens(recipe, stage) for stage in ("base", "anneal", "chat")]
    assert tokens == [9_830_400_000, 2_998_272_000, 983_040_000]
    assert round(sum(tokens) / 1e9, 2) == 13.81
    assert planned_tokens(recipe, "sft") is None and planned_tokens(recipe, "dpo") is None


def test_v4_base_warms_up_and_then_stays_at_its_rate_to_the_end() -> None:
    base = load_recipe("v4").base
    peak = base.optimizer.learning_rate
    rates = {s: learning_rate(s, base.steps, peak, base.schedule) for s in (0, 999, 1_999, 399_999)}
    assert rates == pytest.approx({0: 1e-7, 999: 1e-4, 1_999: 2e-4, 399_999: 2e-4})


def test_v4_anneal_goes_from_the_stable_rate_of_base_in_a_straight_line_to_zero() -> None:
    recipe = load_recipe("v4")
    base, anneal = recipe.base, recipe.anneal
    last = learning_rate(399_999, base.steps, base.optimizer.learning_rate, base.schedule)

    def rate(step: int) -> float:
        return learning_rate(step, anneal.steps, anneal.optimizer.learning_rate, anneal.schedule)

    assert rate(0) == last == 2e-4
    for step in (1, 30_500, 61_000, 121_999):
        assert rate(step) == pytest.approx(2e-4 * (1 - step / 122_000))
    assert rate(122_000) == 0


def test_v4_keeps_the_checkpoint_and_log_paths_that_its_readers_know() -> None:
    recipe = load_recipe("v4")
    assert [str(recipe.folder(stage)) for stage in STAGES] == [
        "checkpoints/pretrain_v4",
        "checkpoints/pretrain_v4_anneal",
        "checkpoints/chat_pretrain",
        "checkpoints/sft",
        "checkpoints/dpo",
    ]
    assert recipe.log("base", "metrics.csv") == Path("logs/pretrain_v4_base_metrics.csv")


def test_other_recipes_write_under_their_own_name(raw: dict[str, Any]) -> None:
    recipe = check_recipe(raw, "r.yaml")
    assert recipe.folder("sft") == Path("checkpoints/micro/sft")
    assert recipe.log("sft", "samples.jsonl") == Path("logs/micro/sft_samples.jsonl")


def test_a_loaded_recipe_cannot_be_changed() -> None:
    with pytest.raises(ValueError):
        load_recipe("tiny").base.steps = 3  # type: ignore[misc]


@pytest.mark.parametrize("key", ["precision", "compile", "gradient_checkpointing"])
def test_what_depends_on_the_machine_may_be_left_to_it(plain: dict[str, Any], key: str) -> None:
    plain[key] = "auto"
    assert getattr(check_recipe(plain, "r.yaml"), key) == "auto"


@pytest.mark.parametrize("value", [True, False])
def test_switches_may_be_set_on_the_command_line(value: bool) -> None:
    recipe = load_recipe("v4", [f"compile={value}", f"gradient_checkpointing={str(value).lower()}"])
    assert recipe.compile is value and recipe.gradient_checkpointing is value


@pytest.mark.parametrize("stage", ["base", "anneal", "chat"])
def test_lanes_that_can_not_share_a_step_are_refused(plain: dict[str, Any], stage: str) -> None:
    plain["lanes"] = 2
    check_recipe(plain, "r.yaml")
    plain[stage]["sequences_per_step"] = 5
    assert complaint(plain) == (
        f"r.yaml: {stage}.sequences_per_step (5) must be a multiple of lanes (2)"
    )


def test_the_optimizer_is_adamw_unless_the_recipe_says_muon(plain: dict[str, Any]) -> None:
    assert check_recipe(plain, "r.yaml").base.optimizer.kind == "adamw"
    plain["common"]["optimizer"] |= {"kind": "muon", "momentum": 0.9}
    optimizer = check_recipe(plain, "r.yaml").dpo.optimizer
    assert (optimizer.kind, optimizer.momentum) == ("muon", 0.9)
    plain["common"]["optimizer"]["kind"] = "mouon"
    assert "common.optimizer.kind: must be 'adamw' or 'muon', got 'mouon'" in complaint(plain)


# ------------------------------------------------------------------------------- every key counts


def changed(raw: dict[str, Any], place: Place, value: Any) -> Iterator[dict[str, Any]]:
    """The recipe with other values at one place, until one of them may be valid."""
    candidates: list[Any] = [f"{value}x", *raw["sources"]]
    candidates += ["fp32", "bf16", "wsd", "linear", "cosine", "prose", "code", "train", "ipo"]
    candidates += [True, "fsdp", "muon", "adamw"]
    if isinstance(value, bool):
        candidates = [not value]
    elif isinstance(value, (int, float)):
        candidates = [value + 1, value - 1, value * 2, value / 2, value + 0.1, value - 0.1]
    for candidate in candidates:
        other = copy.deepcopy(raw)
        put(other, place, candidate)
        if place[-1] == "weight":  # the others have to make up for it
            siblings = at(other, place[:-2])
            sibling = siblings[(place[-2] + 1) % len(siblings)]
            sibling["weight"] += value - candidate
        yield other


def accepted(raw: dict[str, Any]) -> Recipe | None:
    try:
        return check_recipe(raw, "r.yaml")
    except UserError:
        return None


@pytest.mark.parametrize("name", RECIPES)
def test_changing_any_value_in_a_recipe_changes_what_is_loaded(name: str) -> None:
    raw = json.loads(json.dumps(read_yaml(RECIPE_FOLDER / f"{name}.yaml")))
    recipe = check_recipe(raw, "r.yaml")
    without_effect = []
    for place, value in leaves(raw):
        if place[0] == "sources" and place[-1] == "kind":
            continue  # another kind needs other keys beside it; refused below
        others = [other for r in changed(raw, place, value) if (other := accepted(r)) is not None]
        assert others, f"no other value is allowed at {key_of(place)}"
        if all(other == recipe for other in others):
            without_effect.append(key_of(place))
    assert not without_effect


@pytest.mark.parametrize("name", RECIPES)
def test_every_kind_of_source_is_checked(name: str) -> None:
    raw = read_yaml(RECIPE_FOLDER / f"{name}.yaml")
    for source in raw["sources"]:
        message = refusal(f"sources.{source}.kind=cassette", recipe=name)
        assert f"sources.{source}: " in message and "cassette" in message


# ------------------------------------------------------------------------------- misspelt keys


@pytest.mark.parametrize(
    ("place", "wrong", "right"),
    [
        ((), "precission", "precision"),
        ((), "samplng", "sampling"),
        (("model",), "hidden_sise", "hidden_size"),
        (("tokenizer", "train"), "vocabsize", "vocab_size"),
        (("sampling",), "temprature", "temperature"),
        (("sources", "web"), "colum", "column"),
        (("base",), "squence_length", "sequence_length"),
        (("chat",), "sequences_per_stp", "sequences_per_step"),
        (("base", "sources", 1), "wieght", "weight"),
        (("base", "optimizer"), "learningrate", "learning_rate"),
        (("anneal", "schedule"), "warm_up", "warmup"),
        (("sft",), "epoch", "epochs"),
        (("sft", "data"), "sorces", "sources"),
        (("sft", "data", "sources", 0), "at_mots", "at_most"),
        (("dpo",), "max_pair", "max_pairs"),
        (("common",), "mikro_batch", "micro_batch"),
        (("common", "optimizer"), "wight_decay", "weight_decay"),
        (("common", "checkpoint"), "keeplast", "keep_last"),
    ],
)
def test_a_misspelt_key_is_named_with_its_place_and_the_nearest_right_one(
    plain: dict[str, Any], place: Place, wrong: str, right: str
) -> None:
    at(plain, place)[wrong] = 1
    expected = f"r.yaml: {key_of((*place, wrong))}: unknown key (did you mean {right!r}?)"
    assert complaint(plain) == expected


def test_a_key_that_resembles_none_is_named_without_a_guess(plain: dict[str, Any]) -> None:
    plain["base"]["zzz"] = 1
    assert complaint(plain) == "r.yaml: base.zzz: unknown key"


def test_the_keys_of_one_kind_of_source_are_refused_in_another(plain: dict[str, Any]) -> None:
    plain["sources"]["web"]["split"] = "train"
    assert "r.yaml: sources.web.split: unknown key" in complaint(plain)


def test_a_stage_refuses_the_keys_of_another_kind_of_stage(plain: dict[str, Any]) -> None:
    plain["base"]["beta"] = 0.1
    assert "r.yaml: base.beta: unknown key" in complaint(plain)


# ------------------------------------------------------------------------------- wrong values


def test_a_negative_weight_is_reported_as_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(RECIPE_FOLDER.parent)
    message = refusal("anneal.sources[2].weight=-0.25")
    assert message == "recipes/v4.yaml: anneal.sources[2].weight: must be > 0, got -0.25"


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (("base", "steps"), "many", "base.steps: must be a valid integer"),
        (("base", "steps"), 1.5, "got 1.5"),
        (("base", "steps"), -1, "base.steps: must be >= 0, got -1"),
        (("base", "micro_batch"), 0, "base.micro_batch: must be >= 1, got 0"),
        (("common", "log_every"), 0, "common.log_every: must be >= 1, got 0"),
        (("common", "optimizer", "clip"), "x", "common.optimizer.clip: must be a valid number"),
        (("common", "optimizer", "betas"), 0.9, "common.optimizer.betas: must be a valid tuple"),
        (("common", "optimizer", "betas", 1), 1.5, "common.optimizer.betas[1]: must be <= 1"),
        (("compile",), "perhaps", "compile: must be 'auto', True or False, got 'perhaps'"),
        (("precision",), "fp8", "precision: must be 'auto', 'fp16', 'bf16' or 'fp32', got"),
        (("held_out_fraction",), 0, "held_out_fraction: must be > 0, got 0"),
        (("sampling", "top_p"), 1.1, "sampling.top_p: must be <= 1, got 1.1"),
        (("model", "rope_theta"), float("nan"), "model.rope_theta: must be"),
        (("base", "optimizer", "learning_rate"), 0, "base.optimizer.learning_rate: must be > 0"),
        (("base", "schedule", "kind"), "step", "base.schedule.kind: must be 'wsd', 'linear' or"),
        (("base", "sources"), [], "base.sources: "),
        (("base",), 3, "base: must be a valid dictionary"),
        (("sources", "web", "paths"), "web.jsonl", "sources.web.paths: must be a valid list"),
        (("name",), "a/b", "name: "),
        (("tokenizer",), {}, "tokenizer: give exactly one of hub, path and train"),
        (("tokenizer", "hub"), "x/y", "tokenizer: give exactly one of hub, path and train"),
    ],
)
def test_a_wrong_value_is_named_with_its_place(
    plain: dict[str, Any], place: Place, value: Any, said: str
) -> None:
    put(plain, place, value)
    message = complaint(plain)
    assert message.startswith("r.yaml: ") and said in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("place", "said"),
    [
        (("seed",), "r.yaml: seed: is missing"),
        (("dpo",), "r.yaml: dpo: is missing"),
        (("model", "vocab_size"), "r.yaml: model.vocab_size: is missing"),
        (("base", "sources", 1, "weight"), "r.yaml: base.sources[1].weight: is missing"),
        (("sft", "data", "folder"), "r.yaml: sft.data.folder: is missing"),
        (("dpo", "beta"), "r.yaml: dpo.beta: is missing"),
    ],
)
def test_a_missing_key_is_named_with_its_place(
    plain: dict[str, Any], place: Place, said: str
) -> None:
    del at(plain, place[:-1])[place[-1]]
    assert complaint(plain) == said


def test_a_key_missing_in_common_is_missed_in_every_stage(plain: dict[str, Any]) -> None:
    del plain["common"]["log_every"]
    assert complaint(plain).split("\n       ") == [
        f"r.yaml: {stage}.log_every: is missing" for stage in STAGES
    ]


def test_weights_must_sum_to_one(plain: dict[str, Any]) -> None:
    plain["base"]["sources"][0]["weight"] = 0.5
    expected = "r.yaml: base: the weights of sources must sum to 1, they sum to 0.9"
    assert complaint(plain) == expected


@pytest.mark.parametrize(
    ("place", "said"),
    [
        (("base", "sources", 0, "name"), "base.sources[0].name"),
        (("chat", "sources", 1, "name"), "chat.sources[1].name"),
        (("sft", "data", "sources", 0, "name"), "sft.data.sources[0].name"),
        (("dpo", "train"), "dpo.train"),
        (("dpo", "validation"), "dpo.validation"),
        (("tokenizer", "train", "train_on", 1), "tokenizer.train.train_on"),
    ],
)
def test_an_unknown_source_is_named_with_the_nearest(
    plain: dict[str, Any], place: Place, said: str
) -> None:
    put(plain, place, "boks")
    assert complaint(plain) == (
        f"r.yaml: {said}: no source is called 'boks' (did you mean 'books'?)"
    )


@pytest.mark.parametrize("stage", STAGES)
def test_a_sequence_longer_than_the_positions_is_refused(plain: dict[str, Any], stage: str) -> None:
    plain[stage]["sequence_length"] = 97
    assert complaint(plain) == (
        f"r.yaml: {stage}.sequence_length (97) must not exceed model.max_position_embeddings (96)"
    )
    plain[stage]["sequence_length"] = 96
    check_recipe(plain, "r.yaml")


@pytest.mark.parametrize(
    ("heads", "kv_heads", "said"),
    [
        (5, 1, "hidden_size (32) must be an even multiple of num_attention_heads (5)"),
        (32, 1, "hidden_size (32) must be an even multiple of num_attention_heads (32)"),
        (4, 3, "num_attention_heads (4) must be a multiple of num_key_value_heads (3)"),
    ],
)
def test_heads_that_do_not_divide_are_refused(
    plain: dict[str, Any], heads: int, kv_heads: int, said: str
) -> None:
    plain["model"] |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
    assert complaint(plain) == f"r.yaml: model: {said}"


def test_all_problems_are_reported_at_once(plain: dict[str, Any]) -> None:
    plain["sede"] = plain.pop("seed")
    plain["base"]["steps"] = "many"
    plain["anneal"]["sources"][1]["weight"] = -1
    plain["common"]["micro_batch"] = 0
    plain["model"]["hidden_size"] = 33
    lines = complaint(plain).split("\n       ")
    places = {line.removeprefix("r.yaml: ").split(":")[0] for line in lines}
    assert all(line.startswith("r.yaml: ") for line in lines)
    assert places == {
        "sede", "seed", "base.steps", "anneal.sources[1].weight", "common.micro_batch", "model",
    }  # fmt: skip


def test_all_unknown_sources_and_long_sequences_are_reported_at_once(plain: dict[str, Any]) -> None:
    plain["dpo"]["train"] = "pears"
    plain["chat"]["sources"][0]["name"] = "tlak"
    plain["sft"]["sequence_length"] = 500
    message = complaint(plain)
    assert "dpo.train: no source is called 'pears' (did you mean 'pairs'?)" in message
    assert "chat.sources[0].name: no source is called 'tlak' (did you mean 'talk'?)" in message
    assert "sft.sequence_length (500) must not exceed" in message


# ------------------------------------------------------------------------------- the file


def written(folder: Path, text: str | bytes) -> str:
    path = folder / "mine.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [1, 2", "not valid YAML"),
        ("a: b: c", "not valid YAML"),
        (b"name: \xff\xfe", "not valid YAML"),
        ("- a\n- b\n", "a recipe is a mapping of keys to values, this is not"),
        ("", "a recipe is a mapping of keys to values, this is not"),
        ("just words", "a recipe is a mapping of keys to values, this is not"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, text: str | bytes, said: str) -> None:
    path = written(tmp_path, text)
    message = refusal(recipe=path)
    assert message.startswith(f"{path}: ") and said in message
    assert "\n" not in message


def test_a_yaml_error_says_where_it_is(tmp_path: Path) -> None:
    assert "line 2" in refusal(recipe=written(tmp_path, "a: 1\nb: c: d\n"))


def test_an_unknown_recipe_is_named_with_the_nearest() -> None:
    message = refusal(recipe="tinyy")
    assert message.startswith("no recipe 'tinyy' (did you mean 'tiny'?)")
    assert all(name in message for name in RECIPES)


def test_a_recipe_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert str(tmp_path / "no.yaml") in refusal(recipe=str(tmp_path / "no.yaml"))


def test_a_recipe_is_found_by_name_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_recipe("v4").name == "v4"


def test_a_recipe_of_ones_own_is_given_by_its_path(tmp_path: Path, raw: dict[str, Any]) -> None:
    assert load_recipe(written(tmp_path, yaml.safe_dump(raw))) == check_recipe(raw, "r.yaml")


# ------------------------------------------------------------------------------- common


def test_what_a_stage_says_wins_over_common(plain: dict[str, Any]) -> None:
    plain["anneal"]["log_every"] = 99
    recipe = check_recipe(plain, "r.yaml")
    assert recipe.anneal.log_every == 99
    assert recipe.base.log_every == recipe.chat.log_every == recipe.sft.log_every == 2


def test_parts_of_common_are_laid_under_the_same_parts_of_a_stage(plain: dict[str, Any]) -> None:
    plain["sft"]["optimizer"]["clip"] = 5
    plain["sft"]["checkpoint"] = {"every": 7}
    sft = check_recipe(plain, "r.yaml").sft
    assert (sft.optimizer.clip, sft.optimizer.betas) == (5, (0.9, 0.95))
    assert (sft.checkpoint.every, sft.checkpoint.keep_last) == (7, 2)


def test_a_list_in_a_stage_replaces_the_one_in_common(plain: dict[str, Any]) -> None:
    plain["common"]["prompts"] = ["one", "two"]
    plain["base"]["prompts"] = ["three"]
    del plain["chat"]["prompts"]
    recipe = check_recipe(plain, "r.yaml")
    assert (recipe.base.prompts, recipe.chat.prompts) == (["three"], ["one", "two"])


def test_common_fields_are_not_forced_on_stages_without_them(plain: dict[str, Any]) -> None:
    plain["common"] |= {"sequences_per_step": 16, "validation_sequences": 5, "epochs": 4}
    for stage in ("base", "chat", "sft"):
        plain[stage].pop("sequences_per_step")
    del plain["sft"]["epochs"]
    recipe = check_recipe(plain, "r.yaml")
    assert recipe.base.sequences_per_step == recipe.sft.sequences_per_step == 16
    assert recipe.anneal.sequences_per_step == 4
    assert (recipe.sft.epochs, recipe.dpo.epochs) == (4, 2)
    assert not hasattr(recipe.dpo, "sequences_per_step")


def test_a_recipe_needs_no_common(plain: dict[str, Any]) -> None:
    expected = check_recipe(plain, "r.yaml")
    common = plain.pop("common")
    for stage in STAGES:
        for key, value in common.items():
            if isinstance(value, dict):
                plain[stage][key] = {**value, **plain[stage].get(key, {})}
            else:
                plain[stage].setdefault(key, value)
    assert check_recipe(plain, "r.yaml") == expected


def test_a_common_that_is_no_mapping_is_named(plain: dict[str, Any]) -> None:
    plain["common"] = 3
    assert "r.yaml: common: " in complaint(plain)


# ------------------------------------------------------------------------------- --set


@pytest.mark.parametrize(
    ("override", "place", "value"),
    [
        ("seed=7", ("seed",), 7),
        ("base.steps=123", ("base", "steps"), 123),
        ("base.optimizer.learning_rate=1e-3", ("base", "optimizer", "learning_rate"), 1e-3),
        ("sft.prompts[1]=Hello, you", ("sft", "prompts", 1), "Hello, you"),
        ("chat.checkpoint.keep_last=9", ("chat", "checkpoint", "keep_last"), 9),
        ("base.checkpoint.every=5", ("base", "checkpoint", "every"), 5),
        ("sft.optimizer.betas=[0.8, 0.99]", ("sft", "optimizer", "betas"), (0.8, 0.99)),
        ("base.sources=[{name: dclm, weight: 1}]", ("base", "sources"),
         [{"name": "dclm", "weight": 1.0}]),
        ("base.sources[1]={name: math, weight: 0.4}", ("base", "sources", 1),
         {"name": "math", "weight": 0.4}),
        ("tokenizer={path: x.json}", ("tokenizer",),
         {"hub": None, "path": "x.json", "train": None}),
        ("sft.patience=null", ("sft", "patience"), None),
        ("compile=false", ("compile",), False),
        ("system_prompt=a=b", ("system_prompt",), "a=b"),
        ("sources.voice.paths[0]=my texts/*.txt", ("sources", "voice", "paths", 0),
         "my texts/*.txt"),
        ("sources.synthetic.options.difficulty=1", ("sources", "synthetic", "options"),
         {"difficulty": 1}),
    ],
)  # fmt: skip
def test_set_changes_the_field_that_it_names(override: str, place: Place, value: Any) -> None:
    assert at(load_recipe("v4", [override]).model_dump(), place) == value


def test_set_into_common_reaches_every_stage_that_does_not_say_otherwise() -> None:
    recipe = load_recipe("v4", ["common.optimizer.clip=0.5", "common.validate_every=77"])
    assert {recipe.stage(stage).optimizer.clip for stage in STAGES} == {0.5}
    assert [recipe.stage(stage).validate_every for stage in STAGES] == [77, 77, 77, 250, 1_000]


def test_the_last_of_several_settings_of_a_field_holds() -> None:
    recipe = load_recipe("v4", ["base.steps=1", "anneal.steps=2", "base.steps=3"])
    assert (recipe.base.steps, recipe.anneal.steps) == (3, 2)


def test_a_source_that_stands_twice_in_a_mix_is_refused() -> None:
    said = refusal("chat.sources[3].name=smoltalk")
    assert "chat: sources: smoltalk stands there twice: add the weights up" in said


def test_the_ungated_code_can_take_the_place_of_the_gated() -> None:
    recipe = load_recipe("v4", ["anneal.sources[2].name=code_ungated"])
    assert [source.name for source in recipe.anneal.sources] == [
        "fineweb_edu", "dclm", "code_ungated", "math",
    ]  # fmt: skip


def test_settings_together_may_hold_where_each_alone_does_not() -> None:
    overrides = ["base.sources[0].weight=0.3", "base.sources[1].weight=0.7"]
    for override in overrides:
        assert "must sum to 1" in refusal(override)
    weights = [source.weight for source in load_recipe("v4", overrides).base.sources]
    assert weights == [0.3, 0.7]


def test_set_changes_nothing_but_its_field(plain: dict[str, Any]) -> None:
    for place, value in leaves(plain):
        if isinstance(value, str):
            continue  # YAML may read a text as something else
        expected = copy.deepcopy(plain)
        put(expected, place, 12_345)
        apply_override(found := copy.deepcopy(plain), f"{key_of(place)}=12345")
        assert found == expected, key_of(place)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("stage", STAGES)
def test_set_in_one_stage_leaves_the_others_alone(name: str, stage: str) -> None:
    """Also where the file says something once for several stages, with YAML's & and *."""
    before = load_recipe(name)
    overrides = [f"{stage}.prompts[0]=changed", f"{stage}.optimizer.clip=9"]
    overrides += [f"{stage}.checkpoint.every=77", f"{stage}.schedule.floor=0.77"]
    after = load_recipe(name, overrides)
    assert after.stage(stage).prompts[0] == "changed"
    for other in set(STAGES) - {stage}:
        assert after.stage(other) == before.stage(other)


@pytest.mark.parametrize(
    "override", ["base.steps", "=3", "", "=", ".=1", "[]=1", "base.sources[01].weight=1"]
)
def test_a_malformed_setting_is_shown_how_it_is_written(override: str) -> None:
    assert refusal(override) == f"--set {override}: write KEY=VALUE, such as anneal.steps=100"


@pytest.mark.parametrize("text", ["[1, 2", "{a: ", "'open", "a: b: c"])
def test_a_value_that_is_not_yaml_is_refused(text: str) -> None:
    assert refusal(f"base.steps={text}") == f"--set base.steps={text}: {text!r} is not a YAML value"


def test_an_index_past_the_end_is_refused() -> None:
    for override, length in (("base.prompts[4]=x", 4), ("base.sources[9].weight=1", 2)):
        message = refusal(override)
        assert message.startswith(f"--set {override}: there is no ")
        assert message.endswith(f"list of {length}") and "\n" not in message


def test_a_name_where_an_index_belongs_is_refused() -> None:
    assert "--set base.sources.weight=1: " in refusal("base.sources.weight=1")
    assert "--set base.sources[x].weight=1: " in refusal("base.sources[x].weight=1")


def test_a_setting_below_a_number_is_refused() -> None:
    message = refusal("base.steps.first=1")
    assert message == "--set base.steps.first=1: there is nothing below 'steps'"


@pytest.mark.parametrize(
    ("override", "wrong", "right"),
    [
        ("bse.steps=1", "bse", "base"),
        ("base.step=1", "base.step", "steps"),
        ("base.optimiser.clip=1", "base.optimiser", "optimizer"),
        ("base.optimizer.cilp=1", "base.optimizer.cilp", "clip"),
        ("common.log_evry=1", "common.log_evry", "log_every"),
        ("base.sources[0].wieght=1", "base.sources[0].wieght", "weight"),
        ("soruces.dclm.split=x", "soruces", "sources"),
    ],
)
def test_a_misspelt_setting_is_answered_with_the_nearest_key(
    override: str, wrong: str, right: str
) -> None:
    assert f"{wrong}: unknown key (did you mean {right!r}?)" in refusal(override)


def test_a_misspelt_list_is_answered_with_the_nearest_key() -> None:
    assert "did you mean 'sources'?" in refusal("base.sourcs[0].weight=1")
