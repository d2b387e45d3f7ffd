"""What --plan says before a run, and how near it comes to what is measured."""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from hamner.errors import UserError
from hamner.gpus import GPUS, find_gpu, gpu_of_driver
from hamner.memory import Work, layer_bytes, memory_bytes, peak_bytes, work_of
from hamner.plan import (
    expected_tokens,
    fit_sentence,
    fits_without_checkpointing,
    largest_micro_batch,
    needed_bytes,
    planned_tokens,
    print_plan,
    share_of,
    with_rows,
)
from hamner.recipe import STAGES, Recipe, check_recipe, load_recipe
from model import DecoderLayer, ModelConfig, Transformer, rotary_tables

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import memory as memory_benchmark

GIB = 2**30
CPU = torch.device("cpu")
SMALL = ModelConfig(
    vocab_size=320, hidden_size=96, intermediate_size=250, num_hidden_layers=2,
    num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=128,
)  # fmt: skip


def v4(*overrides: str) -> Recipe:
    return load_recipe("v4", overrides)


# ------------------------------------------------------------------------------ counting


def kept_by_a_layer(work: Work) -> int:
    """Bytes of distinct storages that autograd keeps, weights and rotary tables left out."""
    layer = DecoderLayer(work.config, 0).train()
    cos, sin = (table[: work.length][None, None] for table in rotary_tables(work.config))
    mask = [work.length - 60, 60] * work.rows if work.packed else None
    x = torch.randn(work.rows, work.length, work.config.hidden_size, requires_grad=True) * 1
    cast = torch.autocast("cpu", torch.bfloat16) if work.half else contextlib.nullcontext()
    # The partitioner that decides what is kept is the one of the full compiler.
    forward: Any = layer.forward
    if work.compiled:
        forward = torch.compile(layer.forward, backend="aot_eager_decomp_partition")
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor), cast:
        forward(x, cos, sin, mask, None)
    shared = {table.untyped_storage().data_ptr() for table in (cos, sin)}
    shared |= {p.untyped_storage().data_ptr() for p in layer.parameters()}
    copies = {2 * p.numel() for p in layer.parameters() if p.dim() == 2} if work.half else set()
    sizes = [storage.nbytes() for place, storage in kept.items() if place not in shared]
    return sum(size for size in sizes if size not in copies)


@pytest.mark.parametrize(
    "packed, half, compiled",
    [  # the compiler keeps a mask as it is, once for all layers: no compiled and packed layer here
        (False, False, False), (True, False, False), (False, True, False), (True, True, False),
        (False, False, True), (False, True, True),
    ],
)  # fmt: skip
def test_what_autograd_keeps_of_a_layer_is_counted_to_the_byte(
    packed: bool, half: bool, compiled: bool
) -> None:
    work = Work(SMALL, rows=3, length=100, packed=packed, half=half, compiled=compiled)
    assert kept_by_a_layer(work) == layer_bytes(work)


def test_weights_gradients_and_optimizer_are_counted_to_the_byte(raw: dict[str, Any]) -> None:
    recipe = check_recipe(raw, "test")
    model = Transformer(recipe.model.config())
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    work = replace(work_of(recipe, "base", "cpu", checkpointing=False), rows=1, length=2)
    parts = memory_bytes(work)
    assert (parts["weights"], parts["gradients"], parts["optimizer"]) == (size, size, 2 * size)


def test_muon_keeps_one_moment_of_each_layers_matrix_where_adamw_keeps_two() -> None:
    config = v4().model.config()
    adamw = memory_bytes(Work(config, 1, 16))["optimizer"]
    muon = memory_bytes(Work(config, 1, 16, muon=True))["optimizer"]
    matrices = config.matmul_parameters() - config.vocab_size * config.hidden_size
    assert (adamw, adamw - muon) == (8 * 163_609_344, 4 * matrices)


def test_fsdp_holds_gradients_whole_until_the_last_of_several_micro_batches() -> None:
    recipe, size = v4("parallel=fsdp", "base.micro_batch=1"), 4 * 163_609_344
    one = memory_bytes(work_of(recipe, "base", "cuda", checkpointing=True, ranks=24))
    several = memory_bytes(work_of(recipe, "base", "cuda", checkpointing=True, ranks=8))
    assert (one["gradients"], several["gradients"]) == (size // 24, size // 8 + size)
    embedding, layer = 49_152 * 768, 768 * (2 * 768 + 2 * 256) + 3 * 768 * 2_048
    assert one["gathered"] == 2 * embedding + 10 * layer


def test_autocast_keeps_16_bit_copies_of_the_layers_matrices() -> None:
    work = work_of(v4(), "base", "cuda", checkpointing=False)
    matrices = work.config.matmul_parameters() - 49_152 * 768
    assert memory_bytes(work)["16-bit weights"] == 2 * matrices
    assert memory_bytes(replace(work, half=False))["16-bit weights"] == 0


def test_packed_rows_keep_repeated_keys_and_a_mask_on_a_gpu() -> None:
    plain = Work(SMALL, rows=3, length=100, half=True, device_type="cuda")
    more = layer_bytes(replace(plain, packed=True)) - layer_bytes(plain)
    keys, repeated = 2 * SMALL.num_key_value_heads * SMALL.head_dim, 2 * SMALL.hidden_size
    assert more == plain.tokens * 2 * (repeated - keys + plain.length)


# ------------------------------------------------------------------------------ measuring

MEASURED = {
    "weights": memory_benchmark.SHAPES["weights"],
    "activations": Work(memory_benchmark.ACTIVATIONS, 6, 512),
}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells of memory")
@pytest.mark.parametrize("name", MEASURED)
def test_the_memory_is_predicted_within_15_percent_of_the_measured(name: str) -> None:
    measured = memory_benchmark.measure(MEASURED[name])
    assert peak_bytes(MEASURED[name]) == pytest.approx(measured, rel=0.15)


# ------------------------------------------------------------------------------ v4


def test_v4_plans_13_81_billion_tokens_over_its_three_streams() -> None:
    tokens = [planned_tokens(v4(), stage) for stage in STAGES]
    assert tokens == [9_830_400_000, 2_998_272_000, 983_040_000, None, None]


def test_v4_fits_a_24_gb_card_without_recomputing_if_it_is_compiled() -> None:
    recipe = v4("precision=fp16", "compile=true")
    peak = peak_bytes(work_of(recipe, "base", "cuda", checkpointing=False))
    assert 14 * GIB < peak < 20 * GIB
    assert fits_without_checkpointing(recipe, "base", 24 * GIB, "cuda")
    assert not fits_without_checkpointing(recipe, "base", 16 * GIB, "cuda")


def test_a_tenth_is_to_be_spared_for_what_no_count_sees() -> None:
    work = work_of(v4(), "base", "cuda", checkpointing=False)
    enough = round(1.1 * peak_bytes(work))
    assert fits_without_checkpointing(v4(), "base", enough, "cuda")
    assert not fits_without_checkpointing(v4(), "base", enough - 10, "cuda")


def test_a_cpu_needs_room_for_the_program_and_the_copy_that_is_saved() -> None:
    work = work_of(v4(), "base", "cpu", checkpointing=False)
    more = needed_bytes(work) - 1.1 * peak_bytes(work)
    assert more > 1.1 * 12 * 163_609_344


def test_checkpointing_saves_activations() -> None:
    plain, saving = (
        memory_bytes(work_of(v4(), "base", "cuda", checkpointing=on)) for on in (False, True)
    )
    assert saving["activations"] < plain["activations"] / 4
    assert saving["weights"] == plain["weights"]


def test_more_ranks_have_less_each_and_fsdp_shares_the_weights_too() -> None:
    one = work_of(v4(), "base", "cuda", checkpointing=True)
    ddp = work_of(v4(), "base", "cuda", checkpointing=True, ranks=8)
    fsdp = work_of(v4("parallel=fsdp"), "base", "cuda", checkpointing=True, ranks=8)
    assert (one.rows, ddp.rows, fsdp.rows) == (24, 3, 3)
    assert memory_bytes(ddp)["weights"] == 8 * memory_bytes(fsdp)["weights"]
    assert memory_bytes(ddp)["gradients"] == 4 * 163_609_344
    assert peak_bytes(fsdp) < peak_bytes(ddp) < peak_bytes(one)


# ------------------------------------------------------------------------------ what fits


def test_the_advised_micro_batch_fits_and_the_next_larger_does_not() -> None:
    work = work_of(v4("compile=false"), "base", "cuda", checkpointing=False)
    room = 12 * GIB
    number = largest_micro_batch(work, room)
    assert 0 < number < 24
    assert needed_bytes(with_rows(work, number)) <= room < needed_bytes(with_rows(work, number + 1))
    assert fit_sentence(work, room, "card") == (
        f"doesn't fit in 12 GB (card): lower micro_batch to {number} "
        "or turn gradient_checkpointing on"
    )


def test_a_micro_batch_of_pairs_is_advised_in_pairs() -> None:
    work = work_of(v4(), "dpo", "cuda", checkpointing=False)
    assert work.rows == 8
    sizes = [needed_bytes(with_rows(work, 2 * pairs)) for pairs in (2, 3)]
    assert largest_micro_batch(work, sizes[0], each=2) == 2
    assert sizes[0] < sizes[1]
    assert largest_micro_batch(work, 80 * GIB, each=2) == 4


def test_what_no_micro_batch_makes_fit_is_to_be_shared() -> None:
    large = v4("model.hidden_size=4608", "model.num_hidden_layers=40")
    work = work_of(large, "base", "cuda", checkpointing=True)
    assert "parallel=fsdp" in fit_sentence(work, 24 * GIB, "card")


# ------------------------------------------------------------------------------ GPUs


@pytest.mark.parametrize("name", ["rtx3090", "RTX 3090", "3090", "rtx-3090"])
def test_a_gpu_is_found_however_it_is_written(name: str) -> None:
    assert find_gpu(name).memory == 24


def test_a_misspelt_gpu_is_answered_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"did you mean 'rtx3090'\?"):
        find_gpu("rtx3900")


def test_the_drivers_names_lead_to_the_data_sheets() -> None:
    pcie = gpu_of_driver("NVIDIA H100 PCIe")
    assert pcie is not None and pcie.flops == GPUS["h100pcie"].flops
    sxm = gpu_of_driver("NVIDIA H100 80GB HBM3")
    assert sxm is not None and sxm.flops == GPUS["h100"].flops
    assert gpu_of_driver("GeForce GT 710") is None


def test_ddp_sends_each_gradient_nearly_twice_and_fsdp_the_weights_too() -> None:
    recipe, gpu, size = v4(), find_gpu("h100"), 163_609_344
    ddp = share_of(recipe, "base", gpu, 8, "ddp")
    fsdp = share_of(recipe, "base", gpu, 8, "fsdp")
    assert ddp.sent == pytest.approx(2 * 7 / 8 * 4 * size)
    assert fsdp.sent == pytest.approx(7 / 8 * (2 * 2 + 4) * size)
    assert ddp.rate == 450e9
    parts = share_of(v4("base.micro_batch=1"), "base", gpu, 8, "fsdp")  # three micro-batches
    assert parts.sent == pytest.approx(7 / 8 * (3 * 2 * 2 + 4) * size)


def test_between_machines_the_network_is_what_sends() -> None:
    recipe = v4("base.sequences_per_step=1024", "base.micro_batch=64")
    share = share_of(recipe, "base", find_gpu("h100"), 16, "ddp")
    assert share.rate == 50e9


def test_sending_that_computing_cannot_hide_makes_a_step_longer() -> None:
    recipe = v4("base.sequences_per_step=1024", "base.micro_batch=1")
    share = share_of(recipe, "base", find_gpu("h100"), 1024, "ddp")
    assert share.sending > share.overlap
    assert share.overlap == pytest.approx(2 / 3 * share.compute)  # the backward pass
    assert share.seconds == pytest.approx(share.compute + share.sending - share.overlap)


def test_gpus_that_cannot_share_a_step_are_refused_with_a_number_that_can() -> None:
    with pytest.raises(UserError, match=r"base.sequences_per_step \(24\) .*=25 is one"):
        share_of(v4(), "base", find_gpu("h100"), 5, "ddp")


# ------------------------------------------------------------------------------ tokens


def test_prepared_conversations_are_counted_with_their_repeats(tmp_path: Path) -> None:
    row = json.dumps({"messages": [{"role": "user", "content": "x" * 60}], "repeat": 2}) + "\n"
    (tmp_path / "train.jsonl").write_text(row * 10)
    tokens = expected_tokens(v4(f"sft.data.folder={tmp_path}"), "sft")
    assert tokens is not None
    assert tokens.count == round(3 * 10 * 2 * len(row) / 4)
    assert "estimate" in tokens.source


def test_what_isnt_prepared_is_bounded_by_the_recipe(tmp_path: Path) -> None:
    recipe = v4(f"sft.data.folder={tmp_path}")
    sft, dpo = (expected_tokens(recipe, stage) for stage in ("sft", "dpo"))
    assert sft is not None and dpo is not None
    assert (sft.count, dpo.count) == (104_000 * 3 * 1_024, 60_000 * 2 * 2 * 1_024)
    assert "at most" in sft.source and "custom_diverse not counted" in sft.source
    assert "at most" in dpo.source


def test_steps_bound_the_tokens_of_epochs(tmp_path: Path) -> None:
    tokens = expected_tokens(v4(f"sft.data.folder={tmp_path}", "sft.steps=10"), "sft")
    assert tokens is not None and tokens.count == 10 * 8 * 1_024


# ------------------------------------------------------------------------------ in words


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_prints_its_own_sums_and_a_row_for_each(
    stage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    print_plan(v4("gradient_checkpointing=auto"), stage, CPU, "rtx3090")
    printed = capsys.readouterr().out
    for expected in ("163,609,344", "GiB", "fits in 24 GB (RTX 3090)", "at 40% of 71.00 TFLOP/s"):
        assert expected in printed
    assert "gradient_checkpointing off\n" in printed and "gradient_checkpointing on\n" in printed
    assert all(f"\n {name} " in printed or f"\n{name} " in printed for name in STAGES)
    assert "9,830,400,000" in printed


def test_several_gpus_need_a_name() -> None:
    with pytest.raises(UserError, match="name the GPU"):
        print_plan(v4(), "base", CPU, gpus=8)
    with pytest.raises(UserError, match="at least 1"):
        print_plan(v4(), "base", CPU, "h100", gpus=0)


def test_fp32_on_a_gpu_has_no_speed_on_record(capsys: pytest.CaptureFixture[str]) -> None:
    print_plan(v4("precision=fp32"), "base", CPU, "h100")
    assert "unknown: no peak speed" in capsys.readouterr().out


def test_a_plan_trains_nothing(workshop: Any) -> None:
    printed = workshop.run("train_pretrain.py", "--plan", "--steps", "100")
    assert "25,600 (100 steps)" in printed
    assert not (workshop.folder / "checkpoints").exists()
    assert not (workshop.folder / "logs").exists()
