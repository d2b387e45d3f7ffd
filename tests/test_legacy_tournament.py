"""The tournament: its score, who goes on, the same tokens for all, memory, resuming, its field."""

from __future__ import annotations

import csv
import gc
import hashlib
import inspect
import json
import math
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import conftest
import matplotlib.image
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, Workshop
from torch import Tensor, nn

from hamner import checkpoints, training
from hamner.batches import MicroBatch
from hamner.errors import run
from hamner.machine import Machine
from hamner.recipe import check_recipe, load_recipe
from hamner.stage import Start, open_mix
from hamner.tokenization import from_json
from hamner.training import Trainer
from legacy import tournament, tournament_measure, tournament_runs
from legacy.tournament_report import draw
from legacy.tournament_results import Results, Run, bits_at, equal_times, scores, survivors, table
from legacy.tournament_rules import architecture_entrant, load_rules, variant_entrant
from legacy.tournament_runs import balanced_loss, is_out_of_memory, shared_out
from legacy.variants import VariantConfig

torch.set_num_threads(1)  # more would wait for each other where cores are shared
gc.freeze()  # the tournament collects garbage after each run; the libraries aren't any
STEPS = (4, 3, 2)
ROUNDS = (
    "[{steps: 4, survivors: 2, learning_rate: 0.003, warmup: 2}, "
    "{steps: 3, survivors: 2, learning_rate: 0.002, warmup: 0}, "
    "{steps: 2, survivors: 1, learning_rate: 0.001, warmup: 0}]"
)
TINY = [
    "shrink=16", "sequence_length=32", "sequences_per_step=4", "micro_batch=2",
    "held_out_sequences=6", "log_every=1", "validate_every=1", "checkpoint_every=2",
]  # fmt: skip
PLAYERS = ["v01", "v03", "v07"]
SEEDS = [7, 8]


def call(*arguments: str) -> int:
    """Run the tournament in this process; its exit code."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(sys, "argv", ["x", *arguments])
        run(tournament.main)
    return int(stop.value.code or 0)


class Arena:
    """A folder with a recipe, in which tournaments are played."""

    def __init__(self, folder: Path):
        raw = inspect.unwrap(conftest.raw)(inspect.unwrap(conftest.data)(folder))
        self.workshop = Workshop(folder, raw)
        self.folder = folder

    def play(
        self,
        *options: str,
        rounds: str = ROUNDS,
        players: str = "v01,v03,v07",
        draw: Callable[..., list[Path]] = lambda *_: [],
    ) -> int:
        rules = [f"tournament.{rule}" for rule in [*TINY, f"rounds={rounds}"]]
        sets = [part for rule in rules for part in ("--set", rule)]
        given = ["--recipe", str(self.workshop.recipe), "--device", "cpu", *sets]
        given += ["--variants", players] if players else []
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(self.folder)
            patch.setattr(training, "peak_flops", lambda *_: None)
            patch.setattr(tournament, "draw", draw)
            return call(*given, *options)

    def path(self, field: str = "variants") -> Path:
        return self.folder / f"logs/micro/tournament/{field}/results.json"

    def results(self, field: str = "variants") -> dict[str, Any]:
        return json.loads(self.path(field).read_text())

    def timeless(self) -> dict[str, Any]:
        """The results without what a clock has to do with."""
        found = self.results()
        for one in found["runs"]:
            one.pop("seconds")
            one["curve"] = [[step, bits] for step, _, bits in one["curve"]]
        for row in found["table"]:
            row.pop("tokens_per_second")
            for score in row["scores"]:
                score.pop("at_equal_time")
        return found

    def clear(self) -> None:
        for name in ("logs", "checkpoints"):
            shutil.rmtree(self.folder / name, ignore_errors=True)


class Trained:
    """The tokens of every training step that the tournament takes, in order, by run."""

    def __init__(self) -> None:
        self.seen: dict[str, list[str]] = {}
        self.now = ""

    def watch(self, patch: pytest.MonkeyPatch) -> None:
        opened, balanced = tournament_runs.opened, tournament_runs.balanced_loss

        def watched_opened(ground: Any, entrant: Any, seed: int, number: int) -> Start:
            self.now = f"{entrant.name} {seed} {number}"
            return opened(ground, entrant, seed, number)

        def watched_loss(load_balancing: float) -> Any:
            loss = balanced(load_balancing)

            def watched(model: nn.Module, batch: MicroBatch) -> Any:
                if model.training:
                    self.seen.setdefault(self.now, []).append(digest(batch["input_ids"]))
                return loss(model, batch)

            return watched

        patch.setattr(tournament_runs, "opened", watched_opened)
        patch.setattr(tournament_runs, "balanced_loss", watched_loss)


def digest(ids: Tensor) -> str:
    return hashlib.md5(ids.numpy().tobytes()).hexdigest()


@pytest.fixture(scope="module")
def arena(tmp_path_factory: pytest.TempPathFactory) -> Arena:
    return Arena(tmp_path_factory.mktemp("arena"))


@pytest.fixture(scope="module")
def trained() -> Trained:
    return Trained()


@pytest.fixture(scope="module")
def played(arena: Arena, trained: Trained) -> Arena:
    """A whole tournament: three variants, three rounds, two seeds."""
    with pytest.MonkeyPatch.context() as patch:
        trained.watch(patch)
        assert arena.play("--seeds", "2") == 0
    return arena


@pytest.fixture
def fresh_arena(tmp_path: Path) -> Arena:
    return Arena(tmp_path)


# ------------------------------------------------------------------------------ a whole one


def test_the_best_by_held_out_bits_per_byte_go_on(played: Arena) -> None:
    found = played.results()
    players = set(PLAYERS)
    for number, count in enumerate((2, 2, 1)):
        runs = [one for one in found["runs"] if one["round"] == number]
        assert {(one["entrant"], one["seed"]) for one in runs} == {
            (name, seed) for name in players for seed in SEEDS
        }
        mean = {
            name: sum(one["bits_per_byte"] for one in runs if one["entrant"] == name) / 2
            for name in players
        }
        players = set(sorted(players, key=mean.__getitem__)[:count])
    rows = found["table"]
    assert [row["rank"] for row in rows] == [1, 2, 3]
    assert {rows[0]["entrant"]} == players
    assert [row["verdict"] for row in rows] == ["winner", "out in round 3", "out in round 1"]
    assert [len(row["scores"]) for row in rows] == [3, 3, 1]
    mine = [one["bits_per_byte"] for one in found["runs"]
            if one["entrant"] == rows[0]["entrant"] and one["round"] == 2]  # fmt: skip
    assert rows[0]["scores"][2]["mean"] == pytest.approx(sum(mine) / 2)
    assert rows[0]["scores"][2]["spread"] == pytest.approx(abs(mine[0] - mine[1]) / math.sqrt(2))


def test_the_score_is_that_of_the_held_out_text_and_of_nothing_else(played: Arena) -> None:
    """Counted once more, from the winner's weights, with the documents that training never saw."""
    found = played.results()
    name = found["table"][0]["entrant"]
    folder = played.folder / f"checkpoints/micro/tournament/variants/{name}_seed7_round3"
    saved = checkpoints.load(folder / "latest.pt")
    model = VariantConfig(**saved["model_config"]).build().eval()
    model.load_state_dict(saved["model"])
    tokenizer = from_json(saved["tokenizer"])
    recipe = check_recipe(played.workshop.raw, "test")
    texts: list[tuple[str, int]] = [("web", 4), ("books", 2)]  # 0.6 and 0.4 of six sequences
    nats, size = 0.0, 0
    for source, count in texts:
        stream = tournament_runs.open_stream(source, recipe, held_out=True)
        tokens = [t for document in stream.in_order() for t in tokenizer.document(document)]
        for begin in range(0, 32 * count, 32):
            row = tokens[begin : begin + 32]
            with torch.no_grad():
                logits = model(torch.tensor([row])).logits[0, :-1]
            nats += float(F.cross_entropy(logits, torch.tensor(row[1:]), reduction="sum"))
            size += len(tokenizer.decode(row[1:]).encode())
    score = next(one["bits_per_byte"] for one in found["runs"]
                 if (one["entrant"], one["seed"], one["round"]) == (name, 7, 2))  # fmt: skip
    assert score == pytest.approx(nats / math.log(2) / size, rel=1e-4)
    assert found["settings"]["held_out"] == {"sequences": 6, "predicted": 6 * 31, "bytes": size}


def test_all_train_on_the_same_tokens_in_one_stream(played: Arena, trained: Trained) -> None:
    """Round after round, as a single base stage of the recipe would read them."""
    recipe = check_recipe(played.workshop.raw, "test")
    part = recipe.base.model_copy(
        update={"sequence_length": 32, "sequences_per_step": 4, "micro_batch": 2}
    )
    folder = next((played.folder / "checkpoints/micro/tournament/variants").glob("v*"))
    tokenizer = from_json(checkpoints.load(folder / "latest.pt")["tokenizer"])
    streams = []
    for seed in SEEDS:
        seeded = recipe.model_copy(update={"seed": seed, "base": part})
        start: Any = Start("base", seeded, "", Machine(torch.device("cpu")), None, tokenizer,
                           None, None)  # type: ignore[arg-type]  # fmt: skip
        mix = open_mix(start, part, {}, None)
        whole = [digest(m["input_ids"]) for _ in range(9) for m in next(mix).micro_batches]
        mix.close()
        streams.append(whole)
        for name in PLAYERS:
            mine = [d for n in range(3) for d in trained.seen.get(f"{name} {seed} {n}", [])]
            assert len(mine) in (2 * 4, 2 * 9) and mine == whole[: len(mine)]
    assert streams[0] != streams[1]


def test_each_round_has_a_cosine_of_its_own_and_keeps_the_momenta(played: Arena) -> None:
    winner = played.results()["table"][0]["entrant"]
    logs = played.folder / "logs/micro/tournament/variants"
    rates = []
    for number in (1, 2, 3):
        with open(logs / f"{winner}_seed8_round{number}_metrics.csv", newline="") as file:
            rates.append([float(row["learning_rate"]) for row in csv.DictReader(file)])
    assert rates[0] == pytest.approx([0.0015, 0.003, 0.003, 0.0015])  # two steps of warm-up
    assert rates[1] == pytest.approx([0.002, 0.0015, 0.0005])
    assert rates[2] == pytest.approx([0.001, 0.0005])
    folder = played.folder / f"checkpoints/micro/tournament/variants/{winner}_seed8_round3"
    parts = checkpoints.load(folder / "latest.pt")["optimizer"]["parts"]
    assert {int(state["step"]) for state in parts[0]["state"].values()} == {sum(STEPS)}


def test_only_the_winners_checkpoints_stay(played: Arena) -> None:
    winner = played.results()["table"][0]["entrant"]
    folders = (played.folder / "checkpoints/micro/tournament/variants").glob("v*")
    left = {f"{winner}_seed{seed}_round3" for seed in SEEDS}
    second = played.results()["table"][1]["entrant"]
    assert {path.name for path in folders} == left, f"{second} was discarded too late"


def test_the_balance_is_logged_and_no_part_of_the_loss(played: Arena) -> None:
    runs = {one["entrant"]: one for one in played.results()["runs"] if one["round"] == 0}
    assert runs["v07"]["balance"] >= 1
    assert runs["v01"]["balance"] is None
    path = played.folder / "logs/micro/tournament/variants/v07_seed7_round1_metrics.csv"
    with open(path, newline="") as file:
        first = next(csv.DictReader(file))
    assert float(first["loss"]) == pytest.approx(math.log(320), abs=0.1)  # knows nothing
    assert float(first["balance"]) > 1


def test_it_says_and_shows_what_came_of_it(
    played: Arena, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    assert played.play("--seeds", "2", draw=draw) == 0  # all of it is there already
    out = capsys.readouterr().out
    rows = played.results()["table"]
    for row in rows:
        line = next(line for line in reversed(out.splitlines()) if f" {row['entrant']} " in line)
        assert row["verdict"] in line and f"{row['scores'][-1]['mean']:.4f} ±" in line
    assert "0.1M 0.0M" in out and "round 3 of 3" not in out
    for name in ("curves", "rankings"):
        pixels = matplotlib.image.imread(played.path().with_name(f"{name}.png"))
        assert pixels.shape[0] > 200 and pixels[..., :3].std() > 0.02, f"{name}.png is empty"
    monkeypatch.setenv("COLUMNS", "80")
    assert played.play("--seeds", "2") == 0
    narrow = capsys.readouterr().out.splitlines()[-20:]
    assert max(len(line) for line in narrow[:-1]) <= 80
    for row in rows:
        for score in row["scores"]:
            assert any(f"{score['mean']:.4f} " in line for line in narrow)
            assert any(f"±{score['spread']:.4f} " in line for line in narrow)


# ------------------------------------------------------------------------------ going on


class Killed(BaseException):
    """Nobody catches it, as nobody catches kill -9."""


def killing(patch: pytest.MonkeyPatch, after: int) -> None:
    """Kill the tournament after so many training steps, and before it writes down a run."""
    left, step, add = [after], Trainer._step, Results.add

    def counted_step(self: Trainer, batch: Any) -> None:
        step(self, batch)
        left[0] -= 1
        if left[0] == 0:
            raise Killed

    def counted_add(self: Results, found: Run) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise Killed
        add(self, found)

    patch.setattr(Trainer, "_step", counted_step)
    patch.setattr(Results, "add", counted_add)


def test_killed_again_and_again_it_comes_to_the_same(played: Arena, fresh_arena: Arena) -> None:
    shutil.copytree(played.folder / "texts", fresh_arena.folder / "texts", dirs_exist_ok=True)
    kills = 0
    while True:
        with pytest.MonkeyPatch.context() as patch:
            killing(patch, after=13)
            try:
                assert fresh_arena.play("--seeds", "2") == 0
                break
            except Killed:
                kills += 1
    assert kills >= 4
    assert fresh_arena.timeless() == played.timeless()


def test_more_seeds_play_only_what_is_new(played: Arena, fresh_arena: Arena) -> None:
    shutil.copytree(played.folder, fresh_arena.folder, dirs_exist_ok=True)
    before = {key_of(one): one for one in played.results()["runs"]}
    winner = played.results()["table"][0]["entrant"]
    assert fresh_arena.play("--seeds", "3", players=winner) == 0
    after = {key_of(one): one for one in fresh_arena.results()["runs"]}
    assert set(after) - set(before) == {(winner, 9, number) for number in range(3)}
    assert all(after[key] == one for key, one in before.items())
    assert [row["entrant"] for row in fresh_arena.results()["table"]] == [winner]


def key_of(one: dict[str, Any]) -> tuple[str, int, int]:
    return one["entrant"], one["seed"], one["round"]


def test_what_was_discarded_is_played_again_if_it_is_needed(
    played: Arena, fresh_arena: Arena
) -> None:
    """Who went out goes on after all: the third of three is the only one of one."""
    shutil.copytree(played.folder, fresh_arena.folder, dirs_exist_ok=True)
    out = played.results()["table"][2]["entrant"]
    assert fresh_arena.play("--seeds", "1", players=out) == 0
    after = {key_of(one): one["bits_per_byte"] for one in fresh_arena.results()["runs"]}
    assert {(out, 7, 1), (out, 7, 2)} <= set(after)
    for one in played.results()["runs"]:
        assert after[key_of(one)] == one["bits_per_byte"]


def test_other_rules_than_it_was_played_under_are_refused(
    played: Arena, capsys: pytest.CaptureFixture[str]
) -> None:
    before = played.path().read_bytes()
    wider = "tournament.variants.v01.intermediate_size=1600"
    options = ["--set", "tournament.load_balancing=0.5", "--set", wider]
    assert played.play(*options) == 2
    error = capsys.readouterr().err
    assert "load_balancing is 0.5, and was 0.01" in error and "--fresh" in error
    assert "v01.intermediate_size is 100, and was 96" in error
    assert played.path().read_bytes() == before


def test_a_finished_run_whose_log_is_gone_is_told(
    played: Arena, fresh_arena: Arena, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(played.folder, fresh_arena.folder, dirs_exist_ok=True)
    for path in (fresh_arena.folder / "logs").rglob("*"):
        if path.is_file():
            path.unlink()
    winner = played.results()["table"][0]["entrant"]
    folder = fresh_arena.folder / "checkpoints/micro/tournament/variants"
    (folder / f"{winner}_seed7_round3").rename(folder / f"{winner}_seed7_round1")
    whole = ROUNDS.replace("steps: 4", "steps: 2")  # what the third round was
    assert fresh_arena.play("--seeds", "1", players=winner, rounds=whole) == 2
    assert "_seed7_round1_metrics.csv, which tells how a finished run" in capsys.readouterr().err


def test_fresh_moves_the_old_one_aside(played: Arena, fresh_arena: Arena) -> None:
    shutil.copytree(played.folder, fresh_arena.folder, dirs_exist_ok=True)
    one = "[{steps: 1, survivors: 1, learning_rate: 0.001, warmup: 0}]"
    assert fresh_arena.play("--fresh", "--seeds", "1", rounds=one, players="v01") == 0
    aside = list(fresh_arena.path().parent.parent.glob("variants.old-*/results.json"))
    assert len(aside) == 1 and aside[0].read_bytes() == played.path().read_bytes()
    assert len(fresh_arena.results()["runs"]) == 1


# ------------------------------------------------------------------------------ failures

SHORT = "[{steps: 2, survivors: 2, learning_rate: 0.001, warmup: 0}, " + (
    "{steps: 1, survivors: 1, learning_rate: 0.001, warmup: 0}]"
)


class Greedy:
    """Lets one variant run out of memory in its second step; looks at what is still held."""

    def __init__(self, greedy: str, error: BaseException):
        self.greedy, self.error = greedy, error
        self.models: list[tuple[str, weakref.ref[nn.Module]]] = []
        self.held: list[str] = []  # earlier models that lived when a new one was made

    def watch(self, patch: pytest.MonkeyPatch) -> None:
        make = tournament_runs.new_model

        def watched(entrant: Any, seed: int) -> nn.Module:
            self.held += [name for name, model in self.models if model() is not None]
            model = make(entrant, seed)
            self.models.append((entrant.name, weakref.ref(model)))
            if entrant.name == self.greedy:
                model.register_forward_pre_hook(self.hook())
            return model

        patch.setattr(tournament_runs, "new_model", watched)

    def hook(self) -> Callable[..., None]:
        calls: Iterator[int] = iter(range(100))

        def before(module: nn.Module, given: Any) -> None:
            if module.training and next(calls) == 3:  # two micro-batches a step
                raise type(self.error)(*self.error.args)  # new: it holds on to what it passes

        return before


def test_who_runs_out_of_memory_is_out_and_the_rest_goes_on(
    fresh_arena: Arena, capsys: pytest.CaptureFixture[str]
) -> None:
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
    greedy = Greedy("v03", error)
    with pytest.MonkeyPatch.context() as patch:
        greedy.watch(patch)
        assert fresh_arena.play("--seeds", "2", rounds=SHORT) == 0
    rows = fresh_arena.results()["table"]
    assert [(row["entrant"], row["rank"]) for row in rows][2] == ("v03", None)
    assert rows[2]["verdict"] == "out of memory in round 1"
    failures = [one for one in fresh_arena.results()["runs"] if one["failure"]]
    assert len(failures) == 1, "its second seed was played in vain"
    assert failures[0]["failure"] == str(error)
    assert [name for name, _ in greedy.models] == 2 * ["v01"] + ["v03"] + 2 * ["v07"] + [
        name for row in sorted(rows[:2], key=lambda r: r["scores"][0]["mean"])
        for name in 2 * [row["entrant"]]
    ]  # fmt: skip
    assert greedy.held == [], "a model was still there when the next one came"
    assert fresh_arena.play("--seeds", "2", rounds=SHORT) == 0  # and it isn't tried again
    assert "out of memory" in capsys.readouterr().out


def test_any_other_error_is_no_defeat(fresh_arena: Arena) -> None:
    with pytest.MonkeyPatch.context() as patch:
        Greedy("v03", RuntimeError("mat1 and mat2 shapes cannot be multiplied")).watch(patch)
        with pytest.raises(RuntimeError, match="mat1 and mat2"):
            fresh_arena.play("--seeds", "1", rounds=SHORT, players="v01,v03")
    assert {one["entrant"] for one in fresh_arena.results()["runs"]} == {"v01"}
    assert fresh_arena.play("--seeds", "1", rounds=SHORT, players="v01,v03") == 0
    assert len(fresh_arena.results()["table"]) == 2


def test_if_nobody_is_left_it_says_so(
    fresh_arena: Arena, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        Greedy("v01", torch.OutOfMemoryError("no room")).watch(patch)
        assert fresh_arena.play(players="v01", rounds=SHORT) == 2
    assert "all ran out of memory; try --set tournament.grad" in capsys.readouterr().err


def test_only_a_lack_of_memory_is_one() -> None:
    assert is_out_of_memory(MemoryError())
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)  # a CPU's allocator has no error of its own
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"))
    assert not is_out_of_memory(RuntimeError("shapes cannot be multiplied"))


# ------------------------------------------------------------------------------ comparing


def a_run(name: str, bits: float, seed: int = 0, number: int = 0, **more: Any) -> Run:
    return Run(name, seed, number, bits_per_byte=bits, **{"seconds": 1.0, "tokens": 8, **more})


def test_bits_at_a_time_lie_on_the_line_between_validations() -> None:
    curve = [(10, 2.0, 4.0), (20, 4.0, 3.0), (30, 8.0, 1.0)]
    assert bits_at(curve, 3.0) == pytest.approx(3.5)
    assert bits_at(curve, 5.0) == pytest.approx(2.5)
    assert bits_at(curve, 2.0) == 4.0 and bits_at(curve, 8.0) == 1.0
    assert bits_at(curve, 1.0) is None and bits_at(curve, 9.0) is None


def test_at_equal_time_the_slow_one_is_taken_in_the_middle() -> None:
    fast = [(5, 1.0, 4.0), (10, 2.0, 3.0)]
    slow = [(5, 1.5, 3.0), (10, 3.0, 2.4)]
    runs = [a_run("fast", 3.0, curve=fast), a_run("slow", 2.4, curve=slow)]
    assert list(scores(runs, 0)) == ["slow", "fast"]
    found = equal_times(runs, 0)
    assert found["fast"] == 3.0 and found["slow"] == pytest.approx(2.8)
    later = [a_run("fast", 2.0, number=1, curve=[(20, 4.0, 2.0)]),
             a_run("slow", 1.0, number=1, curve=[(20, 7.0, 1.0)])]  # fmt: skip
    assert equal_times([*runs, *later], 1)["slow"] == pytest.approx(2.4 - 1.4 / 4)
    assert equal_times([*runs, *later], 0) == found


def test_a_later_failure_does_not_change_who_went_on() -> None:
    curve = [(1, 1.0, 1.0)]
    first = [a_run(name, bits, curve=curve) for name, bits in (("a", 1.0), ("b", 2.0), ("c", 3.0))]
    runs = [*first, a_run("b", 1.0, number=1, curve=curve), Run("a", 0, 1, failure="no room")]
    assert survivors(runs, 0, 2) == ["a", "b"]
    rows = table(runs, ["a", "b", "c"], [2, 1])
    found = [(row.entrant, row.rank, row.verdict, len(row.scores)) for row in rows]
    assert found == [
        ("b", 1, "winner", 2),
        ("c", 2, "out in round 1", 1),
        ("a", None, "out of memory in round 2", 1),
    ]


def test_who_diverges_comes_last() -> None:
    runs = [
        a_run("a", math.inf, curve=[(1, 1.0, math.inf)]),
        a_run("b", 9.0, curve=[(1, 2.0, 9.0)]),
    ]
    assert survivors(runs, 0, 2) == ["b", "a"]


def test_held_out_sequences_are_shared_out_by_weight() -> None:
    assert shared_out(10, [0.6, 0.4]) == [6, 4]
    assert shared_out(7, [0.5, 0.3, 0.2]) == [4, 2, 1]
    assert shared_out(3, [0.98, 0.01, 0.01]) == [2, 1, 1]  # nobody is left out


def test_the_balance_has_a_gradient_and_no_value() -> None:
    rules = load_rules(small=False, overrides=["tournament.shrink=16"])
    model = variant_entrant("v07", load_recipe("v4", ["model.vocab_size=64"]), rules).config.build()
    ids = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(0))
    gate = model.model.layers[0].mlp.gate.weight  # type: ignore[index,union-attr]
    found = []
    for weight in (0.0, 1.0):
        loss, sums = balanced_loss(weight)(model, {"input_ids": ids})
        found.append((loss.item(), torch.autograd.grad(loss, gate)[0]))
        assert 1 <= float(sums["balance"]) / 30 < 8
    assert found[0][0] == found[1][0] == model(ids, ids, reduction="sum").loss.item()
    assert not torch.allclose(found[0][1], found[1][1])


# ------------------------------------------------------------------------------ the field

ARCHITECTURES = list(load_rules(small=False).architectures)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture_has_the_winners_parameters(name: str) -> None:
    for small, recipe in ((False, load_recipe("v4")), (True, load_recipe("tiny"))):
        rules = load_rules(small=small)
        winner = variant_entrant("v02", recipe, rules)
        found = architecture_entrant(name, recipe, rules, winner)
        assert found.config.hidden_size == winner.config.hidden_size
        assert found.parameters == pytest.approx(winner.parameters, rel=0.02 if small else 0.01)


def test_architectures_meet_the_winner(
    played: Arena, fresh_arena: Arena, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(played.folder, fresh_arena.folder, dirs_exist_ok=True)
    winner = played.results()["table"][0]["entrant"]
    one = "[{steps: 2, survivors: 1, learning_rate: 0.001, warmup: 0}]"
    options = ["--field", "architectures", "--seeds", "1"]
    assert fresh_arena.play(*options, rounds=one, players="mamba,rwkv4") == 0
    assert f"the winner is {winner}" in capsys.readouterr().out
    found = fresh_arena.results("architectures")
    assert list(found["entrants"]) == [winner, "mamba", "rwkv4"]
    assert sorted(row["rank"] for row in found["table"]) == [1, 2, 3]
    assert all(2 < row["scores"][0]["mean"] < 8 for row in found["table"])
    assert fresh_arena.play(*options, "--plan", "--against", "v09", players="mamba") == 0
    assert "v09 deep narrow" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("mamba.config=legacy.architectures.mamba:Nothing", "there is no 'legacy.arch"),
        ("mamba.config=hamner.recipe:Recipe", "no config of a language model"),
        ("mamba.widths=[intermediate_siz]", "MambaConfig has no intermediate_siz (did you mean"),
        ("mamba.options={state_size: few}", "architectures.mamba: "),
    ],
)
def test_an_architecture_that_there_is_not_is_refused(
    arena: Arena, option: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--field", "architectures", "--plan", "--set", f"tournament.architectures.{option}"]
    assert arena.play(*options, players="mamba") == 2
    assert words in capsys.readouterr().err


# ------------------------------------------------------------------------------ before it


def test_the_plan_needs_no_data(
    arena: Arena, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    assert call("--plan", "rtx3090", "--seeds", "1", "--variants", "v02,v06") == 0
    out = capsys.readouterr().out
    dense, experts = (next(x for x in out.splitlines() if f"v0{n}" in x).split() for n in (2, 6))
    assert dense[3:] == "163.6M all 1.1 2.4 3 min 5 min 10 min".split()
    assert experts[3:7] == "516.0M 176.3M 1.1 7.7".split()


def test_measuring_takes_steps_and_writes_nothing(
    fresh_arena: Arena, capsys: pytest.CaptureFixture[str]
) -> None:
    """And one after the other: who is measured has the memory alone, and may run out of it."""
    greedy = Greedy("v08", torch.OutOfMemoryError("no room"))
    with pytest.MonkeyPatch.context() as patch:
        greedy.watch(patch)
        patch.setattr(tournament_measure, "new_model", tournament_runs.new_model)
        assert fresh_arena.play("--measure", "2", players="v05,v08,v01") == 0
    out = capsys.readouterr().out
    assert "4 x 32 tokens a step" in out and greedy.held == []
    lines = {name: next(x for x in out.splitlines() if x.strip().startswith(f"{name} "))
             for name in ("v01", "v05", "v08")}  # fmt: skip
    for name in ("v01", "v05"):
        assert float(lines[name].split()[-2].replace(",", "")) > 10
    assert "out of memory" in lines["v08"]
    assert not list(fresh_arena.folder.glob("logs")) + list(fresh_arena.folder.glob("checkpoints"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--variants", "v01,v1"], "nobody is called 'v1' (did you mean 'v10'?)"),
        (["--field", "architectures", "--against", "v2"], "no variant is called 'v2' (did you me"),
        (["--set", "tournament.roundz=[]"], "roundz: unknown key (did you mean 'rounds'?)"),
        (["--set", "tournament.shrink=5"], "shrink 5: hidden_size (512) is no multiple of it"),
        (["--set", "tournament.rounds[0].steps=0"], "rounds[0].steps: must be"),
        (["--set", "tournament.rounds[9].steps=1"], "there is no [9] in a list of 3"),
        (["--set", "tournament.log_every=30"], "validate_every (50) must be a multiple of log_e"),
        (["--set", "tournament.winner=v77"], "no variant is called 'v77'"),
        (["--set", "tournament.variants.v05.num_active_experts=9"], "must be from 1 to num_expe"),
        (["--device", "cuda:9"], "there is no such device here"),
        (["--cap", "24", "--measure", "1", "--device", "cpu"], "--cap limits CUDA memory"),
    ],
)
def test_bad_input_gets_one_plain_sentence(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("--recipe", "tiny", *arguments) == 2
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error


def test_it_is_run_from_the_repositorys_folder(tmp_path: Path) -> None:
    script = ROOT / "legacy" / "tournament.py"
    found = subprocess.run(
        [sys.executable, str(script), "--recipe", "tiny", "--small", "--plan", "--variants", "v02"],
        cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    assert "v02 dense medium" in found.stdout and not list(tmp_path.iterdir())
