"""What a stage would take: parameters, tokens, FLOPs, memory and time, before it is run."""

from __future__ import annotations

import torch

from hamner.recipe import EpochStage, Recipe, StreamStage
from hamner.tracking import peak_flops

UTILISATION = 0.4  # of the peak; what a well-run training loop reaches, give or take
GIB = 2**30


def memory_bytes(recipe: Recipe, stage: str) -> dict[str, float]:
    """Estimated peak bytes by part: weights, gradients, optimizer, activations, head."""
    config, settings = recipe.model.config(), recipe.stage(stage)
    tokens = settings.micro_batch * settings.sequence_length * (2 if stage == "dpo" else 1)
    size = 4 if recipe.precision == "fp32" else 2
    weights = 4 * config.num_parameters()
    kv_share = config.num_key_value_heads / config.num_attention_heads
    # Saved per token and layer: norms, residual, q and output, keys and values, gate/up/product.
    per_layer = config.hidden_size * (8 + 2 * kv_share) * size + 3 * config.intermediate_size * size
    block_inputs = config.hidden_size * 4 * config.num_hidden_layers
    layers = 1 if recipe.gradient_checkpointing else config.num_hidden_layers
    checkpointed = block_inputs if recipe.gradient_checkpointing else 0
    return {
        "weights": weights,
        "gradients": weights,
        "optimizer": 2 * weights,
        "activations": tokens * (per_layer * layers + checkpointed),
        "head": min(tokens * config.vocab_size, 2**28) * (8 + size),
    }


def planned_tokens(recipe: Recipe, stage: str) -> int | None:
    """Tokens of a whole stage; None where only the data can tell."""
    settings = recipe.stage(stage)
    if isinstance(settings, StreamStage):
        return settings.steps * settings.sequences_per_step * settings.sequence_length
    return None


def print_plan(recipe: Recipe, stage: str, device: torch.device) -> None:
    config, settings = recipe.model.config(), recipe.stage(stage)
    flops = config.flops_per_token(settings.sequence_length)
    print(f"{recipe.name}, stage {stage}, on {device}")
    print(f"  parameters    {config.num_parameters():,}")
    print(f"  FLOPs/token   {flops / 1e9:.3f} G (forward and backward)")
    memory = memory_bytes(recipe, stage)
    parts = ", ".join(f"{part} {size / GIB:.2f}" for part, size in memory.items())
    print(f"  memory        {sum(memory.values()) / GIB:.1f} GiB ({parts})")
    tokens = planned_tokens(recipe, stage)
    if tokens is None:
        assert isinstance(settings, EpochStage)
        print(f"  tokens        {settings.epochs} epochs of the prepared data")
        return
    assert isinstance(settings, StreamStage)
    print(f"  tokens        {tokens:,} ({settings.steps:,} steps)")
    peak = peak_flops(device)
    if peak is None:
        print("  time          unknown: no peak speed on record for this device")
        return
    hours = tokens * flops / (peak * UTILISATION) / 3600
    print(
        f"  time          {hours:,.1f} h at {UTILISATION:.0%} of the device's "
        f"{peak / 1e12:.2f} TFLOP/s"
    )
