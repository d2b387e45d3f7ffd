"""The benchmarks at minute shapes: their tables, what they compare, what they refuse."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, some_conversation, write_lines

sys.path.insert(0, str(ROOT / "benchmarks"))

import common
import decode
import gpu_report
import sft_packing
import train_step

from hamner.batches import make_example
from hamner.errors import UserError
from hamner.files import write_report
from hamner.recipe import load_recipe
from model import IGNORE_INDEX, ModelConfig, Transformer

TINY = ModelConfig(
    vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=96,
)  # fmt: skip
SETTINGS = load_recipe("tiny").base.optimizer.model_copy(update={"learning_rate": 1e-2})
CPU = torch.device("cpu")


def job(**changes: Any) -> train_step.Job:
    usual = {"batch": 2, "length": 16, "precision": "fp32", "device": CPU}
    return train_step.Job(TINY, SETTINGS, **{**usual, **changes})


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One thread, and nothing is compiled: that takes a compiler and half a minute."""
    measure = common.matmul_flops
    monkeypatch.setattr(train_step, "matmul_flops", lambda *a: measure(*a, seconds=0.01))
    monkeypatch.setenv("COLUMNS", "80")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.compiler.set_stance("force_eager"):
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def recipe_file(tmp_path: Path, raw: dict[str, Any]) -> Path:
    path = tmp_path / "micro.yaml"
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return path


@pytest.fixture
def call(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Run a benchmark's main on the small recipe; what it printed. Checks the code."""

    def called(module: Any, *arguments: str, code: int = 0) -> str:
        command = [module.__name__, "--recipe", str(recipe_file), "--device", "cpu", *arguments]
        monkeypatch.setattr(sys, "argv", command)
        assert module.main() == code
        return capsys.readouterr().out

    return called


def cells(output: str, first: str) -> list[str]:
    """The cells of the table's row that begins so."""
    row = next(line for line in output.splitlines() if line.strip().split("  ")[0] == first)
    return row.strip()[len(first) :].split()


def shown_and_kept(output: str, path: Path, group: str, figure: str, form: str) -> list[str]:
    """A figure of every row, as the file has it; the table begins its rows with the same."""
    report = json.loads(path.read_text(encoding="utf-8"))
    assert report["torch"] == torch.__version__ and report["options"]["rounds"] == 2
    kept = {name: row for name, row in report[group].items() if row.get("problem", "") == ""}
    assert f"written to {path}" in output and len(kept) > 1
    for name, row in kept.items():
        assert len(row.get("rounds") or row["speeds"]) == 2
        assert cells(output, name)[0] == format(row[figure], form)
    return list(kept)


def test_a_folder_to_write_to_is_refused_before_anything_is_measured(
    call: Callable[..., str], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="is a folder: name a file"):
        call(decode, "--json", str(tmp_path))


# ------------------------------------------------------------------------------- train_step

SMALL_STEP = ("--batch", "2", "--length", "16", "--rounds", "2", "--steps", "1")


def test_train_step_shows_every_variant_in_80_columns(
    call: Callable[..., str], tmp_path: Path
) -> None:
    path = tmp_path / "train_step.json"
    output = call(train_step, *SMALL_STEP, "--json", str(path))
    names = shown_and_kept(output, path, "variants", "tokens_per_second", ",.0f")
    assert tuple(names) == train_step.VARIANTS
    for name in train_step.VARIANTS:
        row = cells(output, name)
        assert all(float(value.replace(",", "")) > 0 for value in row[:4])
        assert row[4].endswith("%") and row[5].endswith("%") and row[6:8] == ["-", "-"]
    assert "…" not in output
    assert "1.00" in {cells(output, name)[3] for name in ("hf", "hf-compiled")}
    assert output.count("round ") == 2


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_all_variants_begin_with_the_same_loss(precision: str, checkpointing: bool) -> None:
    names = ("ours", "hf")
    what = job(precision=precision, checkpointing=checkpointing)
    results = train_step.compare(what, names, rounds=1, steps=1).results
    ours, theirs = (results[name].first_loss for name in names)
    assert ours == pytest.approx(theirs, abs=1e-5 if precision == "fp32" else 1e-2)
    assert ours == pytest.approx(math.log(TINY.vocab_size), abs=0.1)


def test_variants_learn_alike() -> None:
    """Same weights, tokens, clipping, optimizer and groups: ten steps end at the same loss."""
    losses = [float(train_step.Variant(name, job()).run(10)) for name in ("ours", "hf")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert losses[0] < 3


def test_checkpointing_runs_every_block_twice() -> None:
    calls = []
    model = train_step.our_model(job(checkpointing=True))
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    ids = torch.arange(16)[None]
    model(ids, labels=ids).loss.backward()
    assert len(calls) == 2


def test_compiled_variants_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = []
    monkeypatch.setattr(torch, "compile", lambda model, **_: whole.append(model) or model)
    ours, theirs = (train_step.make_model(name, job()) for name in ("ours", "hf"))
    train_step.compiled("ours-compiled", ours)
    train_step.compiled("hf-compiled", theirs)
    forwards = [layer.forward for layer in ours.model.layers]
    assert whole == [*forwards, theirs] and len(forwards) > 0


def test_out_of_memory_is_listed_and_the_others_go_on(
    call: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def too_large(*_: Any) -> None:
        calls.append(1)
        raise torch.OutOfMemoryError

    run = train_step.Variant.run
    monkeypatch.setattr(train_step, "hf_model", too_large)
    output = call(train_step, *SMALL_STEP, "--variants", "ours,hf")
    assert cells(output, "hf")[:2] == ["out", "of"]
    assert cells(output, "ours")[3] == "-"

    def later(self: train_step.Variant, steps: int) -> torch.Tensor:
        return run(self, steps) if steps == 1 else too_large()

    monkeypatch.setattr(train_step.Variant, "run", later)
    with pytest.raises(UserError, match=r"no variant runs here: ours \(out of memory\)"):
        call(train_step, *SMALL_STEP, "--variants", "ours", "--steps", "2")
    assert len(calls) == 2  # once each: what doesn't fit isn't tried again


def test_without_transformers_ours_are_measured(
    call: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    output = call(train_step, *SMALL_STEP, "--variants", "ours,hf")
    assert "transformers isn't installed" in output
    assert float(cells(output, "ours")[0].replace(",", "")) > 0


def test_ratios_are_medians_of_the_rounds_own() -> None:
    def result(*speeds: float) -> train_step.Result:
        return train_step.Result(speeds=list(speeds))

    flops = TINY.flops_per_token(16)
    found = train_step.Comparison(
        job(),
        {"ours": result(20, 60, 30), "hf": result(10, 20, 30), "hf-compiled": result(9, 35, 9)},
        matmul=[40 * flops, 80 * flops, 120 * flops],
        own=[25 * flops, 120 * flops, 40 * flops],
    )
    assert found.ratio("ours") == 2  # of 2, 3 and 1; hf-compiled is the slower by its median
    assert found.of_matmul("ours") == pytest.approx(0.5)  # of 1/2, 3/4 and 1/4
    assert found.of_own("ours") == pytest.approx(0.75)  # of 4/5, 1/2 and 3/4
    assert found.mfu("ours") is None
    found.results["hf"].problem = "out of memory"
    assert found.ratio("ours") == pytest.approx(20 / 9)


def test_mfu_is_over_the_data_sheet_and_for_16_bits_only(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, flops = torch.device("cuda"), TINY.flops_per_token(16)
    monkeypatch.setattr(train_step, "peak_flops", lambda *_: 50 * flops)
    results = {"ours": train_step.Result(speeds=[10, 20, 40])}
    half = train_step.Comparison(job(device=cuda, precision="fp16"), results)
    full = train_step.Comparison(job(device=cuda), results)
    assert half.mfu("ours") == pytest.approx(0.4) and full.mfu("ours") is None
    monkeypatch.setattr(train_step, "peak_flops", lambda *_: None)
    assert half.mfu("ours") is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--length", "97"], "--length must be 2 to 96"),
        (["--cap", "24"], "--cap limits CUDA memory"),
        (["--layers", "2", "--set", "model.hidden=3"], "hidden"),
    ],
)
def test_train_step_refuses(call: Callable[..., str], arguments: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        call(train_step, *arguments)


@pytest.mark.parametrize(
    "arguments", [["--variants", "ours,theirs"], ["--rounds", "0"], ["--cap", "-1"]]
)
def test_train_step_refuses_words(call: Callable[..., str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        call(train_step, *arguments)
    assert stop.value.code == 2


@pytest.mark.parametrize("clip", [0.01, 100.0])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_step_of_ours_is_a_step_of_pytorchs(precision: str, clip: float) -> None:
    torch.manual_seed(0)
    model, reference = Transformer(TINY), Transformer(TINY)
    reference.load_state_dict(model.state_dict())
    mine = train_step.make_adamw("ours", model, SETTINGS)
    other = train_step.make_adamw("hf", reference, SETTINGS)
    steps = (
        common.OurStepper(model, mine, precision, CPU, clip),
        common.Stepper(reference, other, precision, CPU, clip),
    )
    for ids in torch.randint(TINY.vocab_size, (3, 2, 16)):
        loss, expected = (step(input_ids=ids, labels=ids) for step in steps)
        assert not loss.requires_grad
        torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-3)
    close = {"rtol": 1e-4, "atol": 1e-6} if precision == "fp32" else {"rtol": 0.1, "atol": 0.01}
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, **close)
        assert ours.grad is None and theirs.grad is None


def test_a_step_clips() -> None:
    """Adam's first moment is a tenth of the gradient, whose norm is the limit."""
    for name, stepper in (("ours", common.OurStepper), ("hf", common.Stepper)):
        torch.manual_seed(0)
        model = Transformer(TINY)
        optimizer = train_step.make_adamw(name, model, SETTINGS)
        ids = torch.randint(TINY.vocab_size, (2, 16))
        stepper(model, optimizer, "fp32", CPU, 0.01)(input_ids=ids, labels=ids)
        saved = optimizer.state_dict()
        state = saved["parts"][0]["state"] if "parts" in saved else saved["state"]
        norm = torch.stack([values["exp_avg"].norm() for values in state.values()]).norm()
        assert float(norm) == pytest.approx(0.001, rel=1e-3)


def test_matmul_rate_is_that_of_the_fastest_shape() -> None:
    flat = common.matmul_flops([(1, 1, 1)], torch.float32, CPU, 0.01)
    large = common.matmul_flops([(256, 256, 256)], torch.float32, CPU, 0.01)
    both = common.matmul_flops([(256, 256, 256), (1, 1, 1)], torch.float32, CPU, 0.05)
    assert 0 < flat < large / 10 and both > 10 * flat
    assert (8, 32, 320) in common.largest_products(TINY, 8)


def test_own_products_are_the_models(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = sum(k * n * times for k, n, times in common.all_products(TINY))
    assert weights == TINY.matmul_parameters()
    # A product a second: the rate is the mean work of one, each as often as the model has it.
    monkeypatch.setattr(common, "seconds_of", lambda work, device: work() or 1.0)
    count = sum(times for *_, times in common.all_products(TINY))
    rate = common.own_products_flops(TINY, 8, torch.float32, CPU)
    assert rate == pytest.approx(2 * 8 * weights / count)


def test_every_round_has_all_and_the_order_varies() -> None:
    orders = list(common.shuffled_rounds(["a", "b", "c"], 20))
    assert all(sorted(order) == ["a", "b", "c"] for order in orders)
    assert len({tuple(order) for order in orders}) > 3


def test_batches_suit_recipe_and_device(recipe_file: Path) -> None:
    class Given:
        batch = length = None

    v4, tiny = load_recipe("v4"), load_recipe("tiny")
    cuda = torch.device("cuda")
    assert common.batch_and_length(Given, v4, CPU) == (1, 512)
    assert common.batch_and_length(Given, tiny, CPU) == (32, 256)
    assert common.batch_and_length(Given, v4, cuda) == (24, 1024)
    assert common.batch_and_length(Given, load_recipe(str(recipe_file)), CPU) == (2, 64)


# ------------------------------------------------------------------------------- decode


def test_decode_shows_every_side_and_ours_beside_its_peers(
    call: Callable[..., str], tmp_path: Path
) -> None:
    path = tmp_path / "decode.json"
    out = call(decode, "--prompt", "20", "--new", "8", "--rounds", "2", "--json", str(path))
    assert decode.PEER in shown_and_kept(out, path, "sides", "tokens_per_second", ".1f")
    assert set(json.loads(path.read_text())["first_answer_seconds"]) == set(decode.WEIGHTS)
    for side in ("ours ", "ours, torch's products", "ours, fp16", "ours, int8", "hf generate"):
        assert out.count(side) == 1
    assert ("llama.cpp f32" in out) == bool(importlib.util.find_spec("llama_cpp"))
    assert "one forward pass over the prompt" in out and "first words: fp32" in out
    assert "the products alone, fp32: " in out


def test_all_sides_say_the_same(recipe_file: Path, tmp_path: Path) -> None:
    """What is timed is an answer, the same everywhere (rounded weights aside)."""
    wild = "model.initializer_range=0.4"  # or it would say the same id again and again
    recipe, prompt = load_recipe(str(recipe_file), [wild]), [3, 1, 4, 1, 5, 9]
    found = decode.sides(recipe, CPU, prompt, 12, tmp_path)
    plain = [ids for (ids,) in found["ours, torch's products"].answer()]
    assert [ids for (ids,) in found["ours"].answer()] == plain and len(set(plain)) > 3
    (times,) = found["hf generate"].answer()
    assert [int(ids) for ids in times.said[1:]] == plain
    if importlib.util.find_spec("llama_cpp"):
        assert list(found["llama.cpp f32"].answer()) == plain


def test_decode_refuses_more_than_the_context(call: Callable[..., str]) -> None:
    with pytest.raises(UserError, match="together at most 96"):
        call(decode, "--prompt", "90", "--new", "8")


# ------------------------------------------------------------------------------- sft_packing


@pytest.fixture
def talk(tmp_path: Path) -> Path:
    rng = random.Random(2)
    rows = [{"messages": some_conversation(rng)} for _ in range(60)]
    return write_lines(tmp_path / "talk" / "talk.jsonl", rows).parent


SMALL_PACKING = ("--rounds", "2", "--rows", "2", "--set", "model.max_position_embeddings=256")
SMALL_PACKING += ("--set", "sft.sequence_length=256")


def test_packing_shows_three_ways_with_one_loss(call: Callable[..., str], talk: Path) -> None:
    path = talk / "packing.json"
    output = call(sft_packing, *SMALL_PACKING, "--data", str(talk), "--json", str(path))
    names = shown_and_kept(output, path, "ways", "useful_tokens_per_second", ",.0f")
    assert tuple(names) == sft_packing.WAYS
    rows = [cells(output, way) for way in sft_packing.WAYS]
    assert all(float(value.replace(",", "")) > 0 for row in rows for value in row)
    assert rows[0][4] == "1.00" and "same loss: yes" in output and "…" not in output


def test_packing_reads_the_recipes_prepared_file(
    call: Callable[..., str], talk: Path, raw: dict[str, Any]
) -> None:
    with pytest.raises(UserError, match=r"train\.jsonl doesn't exist: run prepare_sft_data\.py"):
        call(sft_packing, *SMALL_PACKING)
    folder = Path(raw["sft"]["data"]["folder"])
    folder.mkdir()
    (talk / "talk.jsonl").rename(folder / "train.jsonl")
    assert "same loss: yes" in call(sft_packing, *SMALL_PACKING)


def test_a_loss_that_packing_changes_fails(
    call: Callable[..., str], talk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = sft_packing.packed_tensors

    def careless(*arguments: Any) -> dict[str, torch.Tensor]:
        batch = honest(*arguments)
        return {**batch, "sequence_ids": torch.zeros_like(batch["sequence_ids"])}

    monkeypatch.setattr(sft_packing, "packed_tensors", careless)
    assert "same loss: NO" in call(sft_packing, *SMALL_PACKING, "--data", str(talk), code=1)


def test_all_ways_hold_the_same_conversations() -> None:
    examples = [make_example(range(1, n), [IGNORE_INDEX, *range(2, n)]) for n in (5, 9, 4, 12, 6)]
    rows = [examples[:2], examples[2:3], examples[3:]]
    found = {way: sft_packing.batches_of(way, rows, 2, 20) for way in sft_packing.WAYS}
    shapes = {way: [tuple(b["labels"].shape) for b in found[way]] for way in found}
    assert shapes["packed"] == [(2, 20), (1, 20)]
    assert shapes["padded"] == [(2, 20), (2, 20), (1, 20)]
    assert shapes["padded to longest"] == [(2, 8), (2, 11), (1, 5)]
    expected = sorted(label for e in examples for label in e.labels.tolist()[1:])
    for batches in found.values():
        labels = torch.cat([batch["labels"].flatten() for batch in batches])
        assert sorted(labels[labels != IGNORE_INDEX].tolist()) == expected
    assert sft_packing.labelled_tokens(examples) == len(expected)


def test_packing_refuses(call: Callable[..., str], talk: Path, tmp_path: Path) -> None:
    many = ("--rounds", "99", "--rows", "2", "--data", str(talk))
    with pytest.raises(UserError, match=r"fill \d+ rows, and 99 rounds of 2 need 198"):
        call(sft_packing, *many)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UserError, match=r"no \.jsonl or \.parquet file"):
        call(sft_packing, "--data", str(tmp_path / "nothing"))
    write_lines(talk / "odd.jsonl", [{"messages": [{"role": "robot", "content": "x"}]}])
    with pytest.raises(UserError, match=r"odd\.jsonl, row 1: not a conversation"):
        call(sft_packing, *many)


# ------------------------------------------------------------------------------- gpu_report


@pytest.fixture
def ids(tmp_path: Path) -> Path:
    """Tokens that count up, now and then broken off: something to learn."""
    rng = np.random.default_rng(0)
    np.save(tmp_path / "ids.npy", (np.arange(6_000) + rng.integers(300)).astype(np.uint16) % 320)
    return tmp_path / "ids.npy"


def test_gpu_report_ends_in_its_table_and_writes_json(
    call: Callable[..., str], ids: Path, tmp_path: Path
) -> None:
    out = tmp_path / "report" / "report.json"
    output = call(
        gpu_report, *SMALL_STEP, "--tokens", str(ids), "--out", str(out),
        "--optimizer-steps", "40", "--validation-sequences", "8", "--learning-rates", "3e-3",
    )  # fmt: skip
    report = json.loads(out.read_text())
    assert cells(output, "fp32: MFU")[1:] == [">=", "45.0%", "-"]
    assert len(report["speed"]["fp32"]["ours-compiled"]["tokens_per_second"]) == 2
    assert report["speed"]["fp32"]["hf"]["peak_gb"] is None
    both = [(curve["optimizer"], curve["tokens"][-1]) for curve in report["curves"]]
    assert both == [("adamw", 40 * 32), ("muon", 40 * 32)]
    assert all(curve["losses"][-1] < curve["losses"][0] - 0.2 for curve in report["curves"])
    assert report["curves"][0]["losses"] != report["curves"][1]["losses"]
    ratio = report["optimizers"]["muon_to_adamw"]
    shown = cells(output, "muon's tokens over adamw's")[0]
    assert shown == ("-" if ratio is None else f"{ratio:.2f}")


def test_tokens_to_a_loss_are_read_off_the_curve() -> None:
    adamw = gpu_report.Curve("adamw", 1e-3, [100, 200, 300], [5.0, 4.0, 3.0])
    worse = gpu_report.Curve("adamw", 1e-2, [100], [math.nan])
    muon = gpu_report.Curve("muon", 1e-3, [100, 200, 300], [4.5, 2.5, 2.0])
    found = gpu_report.compare_optimizers([worse, adamw, muon])
    assert found["adamw_tokens"] == 300 and found["muon_tokens"] == 175
    assert found["muon_to_adamw"] == pytest.approx(175 / 300)
    assert adamw.tokens_to(2.9) is None and adamw.tokens_to(6.0) == 100
    slow = gpu_report.Curve("muon", 1e-3, [300], [3.5])
    assert gpu_report.compare_optimizers([adamw, slow])["muon_to_adamw"] is None


def test_a_run_that_diverged_is_null_in_the_report(tmp_path: Path) -> None:
    write_report(tmp_path / "r.json", {"losses": [1.5, math.nan]})
    assert json.loads((tmp_path / "r.json").read_text()) == {"losses": [1.5, None]}


def test_training_never_sees_what_is_held_out(tmp_path: Path) -> None:
    ids = tmp_path / "each_once.npy"
    np.save(ids, np.arange(6_000, dtype=np.int32))
    found = gpu_report.read_sequences([ids], 6_000, 16, train=300, held_out=50)
    assert found.train.shape == (300, 16) and found.held_out.shape == (50, 16)
    whole = np.load(ids)[: 375 * 16].reshape(-1, 16).tolist()
    assert found.held_out.tolist() == whole[-50:]
    rest = whole[:-50]
    assert all(row in rest for row in found.train.tolist()) and found.train.tolist() != rest[:300]


def test_gpu_report_refuses(call: Callable[..., str], ids: Path, tmp_path: Path) -> None:
    out = ("--out", str(tmp_path / "out.json"))
    with pytest.raises(UserError, match="hold 6,000 tokens"):
        call(gpu_report, *out, "--tokens", str(ids))
    few = ("--optimizer-steps", "2", "--validation-sequences", "2", *SMALL_STEP)
    with pytest.raises(UserError, match="ids from 0 to 319, the model knows 0 to 299"):
        call(gpu_report, *out, *few, "--tokens", str(ids), "--set", "model.vocab_size=300")
    (tmp_path / "text.npy").write_text("not an array")
    for name in ("text.npy", "missing.npy"):
        with pytest.raises(UserError, match=f"{name}: not a .npy file"):
            call(gpu_report, *out, *few, "--tokens", str(tmp_path / name))
    np.save(tmp_path / "floats.npy", np.zeros(9_000))
    with pytest.raises(UserError, match="must hold whole numbers"):
        call(gpu_report, *out, *few, "--tokens", str(tmp_path / "floats.npy"))
    with pytest.raises(UserError, match="nothing to measure"):
        call(gpu_report, *out, "--precisions")
    assert not (tmp_path / "out.json").exists()


def test_gpu_report_needs_no_datasets(tmp_path: Path, recipe_file: Path) -> None:
    """Started as a user would, where the package `datasets` can't be imported."""
    (tmp_path / "hide").mkdir()
    (tmp_path / "hide" / "datasets.py").write_text("raise ImportError('not here')")
    command = [
        sys.executable, str(ROOT / "benchmarks/gpu_report.py"), "--recipe", str(recipe_file),
        "--device", "cpu", "--out", str(tmp_path / "r.json"), "--tokens", "missing.npy",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "hide"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=tmp_path, text=True, capture_output=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --tokens missing.npy: not a .npy file")
