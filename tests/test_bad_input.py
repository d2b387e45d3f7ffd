"""Bad input: one plain sentence to each problem, exit code 2, and not a file of a run touched."""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import pickle
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import conftest
import pytest
import torch
from conftest import Workshop, write_lines

import chat
import prepare_sft_data
import train_chat_pretrain
import train_dpo
import train_pretrain
import train_sft
from hamner import checkpoints, training
from hamner.errors import run

torch.set_num_threads(1)  # more would wait for each other where cores are shared
Command = tuple[types.ModuleType, tuple[str, ...]]
STAGES: dict[str, Command] = {
    "base": (train_pretrain, ("--device", "cpu")),
    "anneal": (train_pretrain, ("--device", "cpu", "--stage", "anneal")),
    "chat": (train_chat_pretrain, ("--device", "cpu")),
    "sft": (train_sft, ("--device", "cpu")),
    "dpo": (train_dpo, ("--device", "cpu")),
}
SCRIPTS: dict[str, Command] = {
    **STAGES, "prepare": (prepare_sft_data, ()), "talk": (chat, ("--cpu", "--prompt", "hello")),
}  # fmt: skip
BEFORE = {"anneal": "base", "chat": "anneal", "sft": "chat", "dpo": "sft"}


def call(command: Command, *arguments: str) -> int:
    """Run a script's main in this process; its exit code."""
    module, own = command
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(sys, "argv", ["x", *own, *arguments])
        run(module.main)
    return int(stop.value.code or 0)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """A workshop in which all five stages were run, in a few steps each."""
    folder = tmp_path_factory.mktemp("finished")
    raw = inspect.unwrap(conftest.raw)(inspect.unwrap(conftest.data)(folder))
    raw["common"].update(validate_every=2, log_every=1)
    for stage in STAGES:
        raw[stage]["prompts"] = []
    workshop = Workshop(folder, raw)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(training, "peak_flops", lambda *_: None)
        assert call(SCRIPTS["prepare"], "--recipe", str(workshop.recipe)) == 0
        for command in STAGES.values():
            assert call(command, "--recipe", str(workshop.recipe), "--steps", "3") == 0
    return workshop


@pytest.fixture
def copied(finished: Workshop, tmp_path: Path) -> Workshop:
    """The same in a folder of the test's own, to be damaged; data included."""
    for name in ("checkpoints", "logs", "texts", "sft"):
        shutil.copytree(finished.folder / name, tmp_path / name)
    raw = copy.deepcopy(finished.raw)
    raw["data_dir"] = str(tmp_path / "texts")
    raw["sft"]["data"]["folder"] = str(tmp_path / "sft")
    return Workshop(tmp_path, raw)


def snapshot(folder: Path) -> dict[str, str]:
    """Names, sizes and hashes of everything below checkpoints/ and logs/."""
    found = {}
    for part in ("checkpoints", "logs"):
        for path in sorted((folder / part).rglob("*")):
            content = path.read_bytes() if path.is_file() else b""
            digest = hashlib.sha256(content).hexdigest()
            found[str(path.relative_to(folder))] = f"{len(content)} {digest}"
    return found


Refused = Callable[..., str]


@pytest.fixture
def refused(
    finished: Workshop, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Refused:
    """Runs a script that must refuse its input; gives the error, without 'error: '."""

    def refused(name: str, *arguments: str, shop: Workshop = finished) -> str:
        monkeypatch.chdir(shop.folder)
        before = snapshot(shop.folder)
        capsys.readouterr()
        if "--recipe" not in arguments:
            arguments = ("--recipe", str(shop.recipe), *arguments)
        assert call(SCRIPTS[name], *arguments) == 2
        assert snapshot(shop.folder) == before, "files of a run were changed"
        return plain(capsys.readouterr().err)

    return refused


def plain(error: str) -> str:
    """The error, after checking that it is sentences and no traceback."""
    first, *others = error.removesuffix("\n").split("\n")
    assert first.startswith("error: ") and "Traceback" not in error
    assert all(line.startswith("       ") and line[7] != " " for line in others), error
    return "\n".join(line[7:] for line in (first, *others))


def changed(finished: Workshop, tmp_path: Path, *path: str | int, value: Any) -> str:
    """A recipe like that of the workshop but for one value; the file it stands in."""
    raw = copy.deepcopy(finished.raw)
    place: Any = raw
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    return str(Workshop(tmp_path, raw).recipe)


# ------------------------------------------------------------------------------ recipes


@pytest.mark.parametrize("name", [*STAGES, "prepare"])
def test_a_misspelt_key_is_named_with_the_nearest_right_one(
    name: str, refused: Refused, finished: Workshop, tmp_path: Path
) -> None:
    recipe = changed(finished, tmp_path, "common", "optimizer", "weight_decy", value=0.1)
    assert refused(name, "--recipe", recipe) == (
        f"{recipe}: common.optimizer.weight_decy: unknown key (did you mean 'weight_decay'?)"
    )


@pytest.mark.parametrize("more", [(), ("--fresh",), ("--plan",)])
@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("base", "stepz"), 3, "base.stepz: unknown key (did you mean 'steps'?)"),
        (
            ("base", "sources", 1, "weight"),
            -0.4,
            "base.sources[1].weight: must be > 0, got -0.4",
        ),
        (
            ("base", "sources", 1, "weight"),
            0.5,
            "base: the weights of sources must sum to 1, they sum to 1.1",
        ),
        (
            ("base", "sources", 1, "name"),
            "boks",
            "base.sources[1].name: no source is called 'boks' (did you mean 'books'?)",
        ),
        (("base", "steps"), "many", "base.steps: "),
        (("precision",), "fp8", "precision: "),
        (("model", "hidden_size"), 33, "hidden_size (33) must be an even multiple of "),
        (("base", "sequence_length"), 97, "base.sequence_length (97) must not exceed "),
    ],
)
def test_a_wrong_value_is_named_with_its_place_and_nothing_is_touched(
    path: tuple[str | int, ...],
    value: Any,
    message: str,
    more: tuple[str, ...],
    refused: Refused,
    finished: Workshop,
    tmp_path: Path,
) -> None:
    recipe = changed(finished, tmp_path, *path, value=value)
    error = refused("base", "--recipe", recipe, *more)
    assert error.startswith(f"{recipe}: ") and message in error
    assert "\n" not in error


def test_all_problems_are_reported_at_once_a_line_to_each(
    refused: Refused, finished: Workshop
) -> None:
    error = refused(
        "chat", "--set", "chat.sources[0].weight=-1", "--set", "sft.epoch=3", "--set", "seed=x"
    )
    lines = error.split("\n")
    assert len(lines) == 3
    assert all(line.startswith(f"{finished.recipe.name}: ") for line in lines), error
    for text in ("chat.sources[0].weight: must be > 0", "sft.epoch: unknown key", "seed: "):
        assert text in error


@pytest.mark.parametrize("override", ["base.steps", "base.steps.x=1", "base.sources[7].weight=1"])
def test_an_override_that_fits_nowhere_is_quoted(override: str, refused: Refused) -> None:
    assert refused("base", "--set", override).startswith(f"--set {override}: ")


def test_the_steps_of_the_command_line_are_checked_too(refused: Refused) -> None:
    assert "base.steps: must be >= 0, got -5" in refused("base", "--steps", "-5")
    assert "sft.steps: must be >= 1, got 0" in refused("sft", "--steps", "0")


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_unknown_recipe_is_named_with_the_known_ones(name: str, refused: Refused) -> None:
    error = refused(name, "--recipe", "tinny")
    assert error.startswith("no recipe 'tinny' (did you mean 'tiny'?): give one of ")
    assert "v4" in error and "\n" not in error


@pytest.mark.parametrize("text", ["a: [1", "just words", "", "- a list", "a: b: c", "\x00"])
def test_a_recipe_that_is_no_recipe_is_a_plain_error(
    text: str, refused: Refused, tmp_path: Path
) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text, encoding="utf-8")
    error = refused("base", "--recipe", str(path))
    assert error.startswith(f"{path}: ") and "\n" not in error


# ------------------------------------------------------------------------------ data


ALL = ("web", "books", "talk", "pairs")
READS = {  # what a stage with nothing before it done can't go without
    "base": ("web", "books"),
    "anneal": ("web", "books"),
    "chat": ("talk", "web"),
    "prepare": ("talk",),
    "dpo": ("pairs",),
}


def begun_before(shop: Workshop, stage: str) -> None:
    """Take away this stage's run and those of later ones, so that it would begin."""
    later = list(STAGES)[list(STAGES).index(stage) :] if stage in STAGES else []
    for name in later:
        shutil.rmtree(shop.folder / "checkpoints/micro" / name)


@pytest.mark.parametrize("name", READS)
def test_missing_data_is_named_with_what_to_do(
    name: str, refused: Refused, copied: Workshop
) -> None:
    begun_before(copied, name)
    for source in READS[name]:
        (copied.folder / f"texts/{source}.jsonl").unlink()
    error = refused(name, shop=copied)
    lines = error.split("\n")
    assert len(lines) == len(READS[name])
    for source, line in zip(READS[name], lines, strict=True):
        assert line == (
            f"source {source!r}: no file matches {copied.folder}/texts/{source}.jsonl; put it "
            "there (data/README.md says what writes it), or say where your data lies with "
            "--set data_dir=FOLDER"
        )


BLANK = {"text": "  ", "messages": [], "chosen": [], "rejected": []}


@pytest.mark.parametrize("name", READS)
@pytest.mark.parametrize("rows", [[], [BLANK]])
def test_an_empty_source_is_named(
    rows: list[dict[str, Any]], name: str, refused: Refused, copied: Workshop
) -> None:
    begun_before(copied, name)
    source = READS[name][0]
    write_lines(copied.folder / f"texts/{source}.jsonl", rows)
    assert f"source {source!r}" in refused(name, shop=copied)


def test_a_line_that_is_no_json_is_named(refused: Refused, copied: Workshop) -> None:
    begun_before(copied, "base")
    path = copied.folder / "texts/web.jsonl"
    path.write_text('{"text": "good"}\n{"text": \n', encoding="utf-8")
    assert refused("base", shop=copied).startswith(f"{path}, line 2: not valid JSON ")


def test_missing_prepared_conversations_are_named_with_the_command(
    refused: Refused, copied: Workshop
) -> None:
    shutil.rmtree(copied.folder / "sft")
    error = refused("sft", shop=copied)
    assert error.startswith(f"{copied.folder}/sft/train.jsonl doesn't exist: run `python prepare_")


@pytest.mark.parametrize(
    "name",
    STAGES,
)
def test_fresh_with_missing_data_moves_nothing(
    name: str, refused: Refused, copied: Workshop
) -> None:
    shutil.rmtree(copied.folder / "texts")
    shutil.rmtree(copied.folder / "sft")
    refused(name, "--fresh", shop=copied)


# ------------------------------------------------------------------------------ checkpoints


def latest(shop: Workshop, stage: str) -> Path:
    return shop.folder / f"checkpoints/micro/{stage}/latest.pt"


def cut_in_half(path: Path) -> None:
    """A new file with the first half of the old one: step files share the content of latest.pt."""
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[: len(content) // 2])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.unlink()
    path.write_bytes(content)


def damage_all(shop: Workshop, stage: str) -> str:
    """Damage every checkpoint of a stage; its folder."""
    for path in latest(shop, stage).parent.glob("*.pt"):
        cut_in_half(path)
    return f"checkpoints/micro/{stage}"


@pytest.mark.parametrize("damage", [cut_in_half, flip_a_bit])
@pytest.mark.parametrize("name", STAGES)
def test_a_damaged_checkpoint_is_named_and_the_newest_good_one_taken(
    name: str,
    damage: Callable[[Path], None],
    copied: Workshop,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(copied.folder)
    monkeypatch.setattr(training, "peak_flops", lambda *_: None)
    recipe = ("--recipe", str(copied.recipe))
    assert call(STAGES[name], *recipe, "--steps", "5") == 0  # beside step 3 there is step 5 now
    path = latest(copied, name)
    damage(path)
    damage(path.with_name("step_0000005.pt"))
    capsys.readouterr()
    assert call(STAGES[name], *recipe, "--steps", "4") == 0
    out = capsys.readouterr().out
    folder = f"checkpoints/micro/{name}"
    assert f"\n{folder}/step_0000005.pt is damaged (" in f"\n{out}"
    assert out.startswith(f"{folder}/latest.pt is damaged (")
    assert "): falling back to step_0000003.pt\n" in out
    assert f"from {folder}/step_0000003.pt (stage {name}, step 3)" in out
    assert checkpoints.load(path)["step"] == 4


@pytest.mark.parametrize("name", STAGES)
def test_where_every_checkpoint_is_damaged_the_folder_is_named_and_left_alone(
    name: str, refused: Refused, copied: Workshop
) -> None:
    folder = damage_all(copied, name)
    error = refused(name, shop=copied)
    assert error.startswith(f"every checkpoint in {folder} is damaged and was not touched (")
    assert "latest.pt: " in error and "step_0000003.pt: " in error and "\n" not in error


@pytest.mark.parametrize("name", BEFORE)
def test_a_previous_stage_all_of_whose_checkpoints_are_damaged_is_named(
    name: str, refused: Refused, copied: Workshop
) -> None:
    begun_before(copied, name)
    folder = damage_all(copied, BEFORE[name])
    error = refused(name, shop=copied)
    assert error.startswith(f"every checkpoint in {folder} is damaged and was not touched (")


@pytest.mark.parametrize("name", STAGES)
def test_a_checkpoint_given_by_name_has_no_other_to_fall_back_to(
    name: str, refused: Refused, copied: Workshop
) -> None:
    path = f"checkpoints/micro/{name}/latest.pt"
    cut_in_half(copied.folder / path)
    error = refused(name, "--checkpoint", path, shop=copied)
    assert error.startswith(f"{path} is damaged or cut short, and was not touched")


def test_chat_names_checkpoints_that_were_cut_short(refused: Refused, copied: Workshop) -> None:
    files = list(latest(copied, "dpo").parent.glob("*.pt"))
    for path in files:  # while one is whole, chat.py takes that one
        cut_in_half(path)
    error = refused("talk", shop=copied)
    assert "every checkpoint in checkpoints/micro/dpo is damaged" in error and "best.pt: " in error


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("this was executed",))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize(
    "kind",
    ["empty", "text", "pickle", "code", "foreign", "old format", "hollow"],
)
@pytest.mark.parametrize("name", ["chat", "talk"])
def test_a_file_that_is_no_checkpoint_is_refused_and_never_executed(
    name: str,
    kind: str,
    refused: Refused,
    finished: Workshop,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "given.pt"
    match kind:
        case "empty":
            path.touch()
        case "text":
            path.write_text("this is no checkpoint " * 50)
        case "pickle":
            path.write_bytes(pickle.dumps({"format": 1}))
        case "code":
            torch.save({"format": checkpoints.FORMAT, "model": Evil()}, path)
        case "foreign":
            torch.save({"weights": torch.zeros(3)}, path)
        case "hollow":
            torch.save({"format": checkpoints.FORMAT}, path)
        case "old format":
            checkpoint = checkpoints.load(latest(finished, "chat"))
            torch.save({**checkpoint, "format": checkpoints.FORMAT - 1}, path)
    more = ("--fresh",) if name == "chat" else ()
    error = refused(name, "--checkpoint", str(path), *more)
    assert error.startswith(f"{path} is ") and "\n" not in error
    assert "this was executed" not in error + capsys.readouterr().out


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("more", [(), ("--fresh",)])
def test_a_checkpoint_file_that_does_not_exist_is_named(
    more: tuple[str, ...], name: str, refused: Refused
) -> None:
    assert refused(name, "--checkpoint", "nowhere/x.pt", *more) == "no checkpoint at nowhere/x.pt"


@pytest.mark.parametrize("name", STAGES)
def test_a_checkpoint_of_another_architecture_is_refused_with_what_differs(
    name: str, refused: Refused, finished: Workshop, tmp_path: Path
) -> None:
    recipe = changed(finished, tmp_path, "model", "hidden_size", value=64)
    error = refused(name, "--recipe", recipe)
    assert "another model than the recipe describes: hidden_size 32 (recipe: 64)" in error
    assert "\n" not in error


@pytest.mark.parametrize("name", BEFORE)
def test_fresh_from_a_checkpoint_of_another_architecture_moves_nothing(
    name: str, refused: Refused, finished: Workshop, tmp_path: Path
) -> None:
    recipe = changed(finished, tmp_path, "model", "num_hidden_layers", value=3)
    error = refused(name, "--recipe", recipe, "--fresh")
    assert "num_hidden_layers 2 (recipe: 3)" in error


@pytest.mark.parametrize("fresh", [False, True])
def test_a_vocabulary_that_does_not_fit_is_refused(
    fresh: bool, refused: Refused, copied: Workshop
) -> None:
    if not fresh:
        begun_before(copied, "base")
    copied.raw["model"]["vocab_size"] = 300
    copied.write()
    error = refused("base", *(["--fresh"] if fresh else []), shop=copied)
    assert error.startswith("the tokenizer has 320 tokens, model.vocab_size is 300: ")


@pytest.mark.parametrize("name", BEFORE)
def test_a_stage_without_the_one_before_it_says_what_to_run_first(
    name: str, refused: Refused, copied: Workshop
) -> None:
    shutil.rmtree(copied.folder / "checkpoints/micro" / name)
    shutil.rmtree(copied.folder / "checkpoints/micro" / BEFORE[name])
    commands = {
        "anneal": "python train_pretrain.py --fresh",
        "chat": "python train_pretrain.py --stage anneal",
        "sft": "python train_chat_pretrain.py",
        "dpo": "python train_sft.py",
    }
    assert refused(name, shop=copied) == (
        f"stage {name} starts from a checkpoint of stage {BEFORE[name]}, and there is none in "
        f"checkpoints/micro/{BEFORE[name]}: run `{commands[name]} --recipe {copied.recipe}` first, "
        "or name another with --checkpoint"
    )


@pytest.mark.parametrize("name", BEFORE)
def test_fresh_without_the_stage_before_it_moves_nothing(
    name: str, refused: Refused, copied: Workshop
) -> None:
    shutil.rmtree(copied.folder / "checkpoints/micro" / BEFORE[name])
    assert f"there is none in checkpoints/micro/{BEFORE[name]}" in refused(
        name, "--fresh", shop=copied
    )


@pytest.mark.parametrize("name", ["anneal", "sft"])
def test_another_checkpoint_to_start_from_does_not_overwrite_a_run(
    name: str, refused: Refused, finished: Workshop
) -> None:
    other = f"checkpoints/micro/{BEFORE[name]}/latest.pt"
    error = refused(name, "--checkpoint", other)
    assert error.startswith(f"checkpoints/micro/{name} already holds a run: add --fresh to ")


@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_the_best_checkpoint_of_a_stage_can_not_be_continued_and_says_so(
    name: str, refused: Refused, finished: Workshop
) -> None:
    best = f"checkpoints/micro/{name}/best.pt"
    assert best in refused(name, "--checkpoint", best)


# ------------------------------------------------------------------------------ devices


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("more", [(), ("--fresh",)])
def test_a_device_that_is_not_there_is_named(
    more: tuple[str, ...], name: str, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert refused(name, "--device", "cuda", *more) == (
        "--device cuda: there is no such device here; leave it to auto"
    )


# ------------------------------------------------------------------------------ as a process


def test_the_script_itself_exits_with_code_2_and_a_sentence(copied: Workshop) -> None:
    damage_all(copied, "base")
    before = snapshot(copied.folder)
    process = copied.start("train_pretrain.py")
    out, error = process.communicate(timeout=120)
    assert process.returncode == 2
    assert all(line.endswith("falling back to step_0000003.pt") for line in out.splitlines())
    assert plain(error).startswith("every checkpoint in checkpoints/micro/base is damaged")
    assert snapshot(copied.folder) == before


def test_the_same_input_without_its_fault_is_accepted(
    copied: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the tests above refuse, they refuse for the reason that they name."""
    monkeypatch.chdir(copied.folder)
    monkeypatch.setattr(training, "peak_flops", lambda *_: None)
    recipe = ("--recipe", str(copied.recipe))
    for name, command in STAGES.items():
        more = ("--fresh",) if name == "base" else ()
        assert call(command, *recipe, "--steps", "4", *more) == 0
        saved = checkpoints.load(latest(copied, name))
        assert saved["step"] == 4
    rows = (copied.folder / "logs/micro/dpo_samples.jsonl").read_text().splitlines()
    assert all(json.loads(row) for row in rows)
