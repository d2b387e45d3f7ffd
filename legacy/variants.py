"""The transformers of the tournament: dense or differential attention, an MLP or experts.

A dense variant is `model.Transformer` in the skeleton's clothes: its layers hold the same modules
under the same names, and the same weights give the same logits. The shapes of the ten stand in
`legacy/tournament.yaml`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from legacy.diff_attention import DifferentialAttention
from legacy.experts import MixtureOfExperts
from legacy.language_model import LanguageModelConfig, State
from model import MLP, Attention, KVCache, ModelConfig, RMSNorm, rotary_tables


@dataclass(frozen=True)
class VariantConfig(LanguageModelConfig):
    """A transformer's shape; the names of the fields are those of `model.ModelConfig`."""

    intermediate_size: int = 1_536
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    rope_theta: float = 10_000.0
    attention: Literal["dense", "differential"] = "dense"
    num_experts: int = 1  # 1 is a plain MLP
    num_active_experts: int = 1  # that each token goes to

    def __post_init__(self) -> None:
        self.dense()  # raises ValueError where the heads don't divide the hidden size
        if not 1 <= self.num_active_experts <= self.num_experts:
            raise ValueError(
                f"num_active_experts ({self.num_active_experts}) must be from 1 to num_experts "
                f"({self.num_experts})"
            )

    def dense(self) -> ModelConfig:
        """The config of the transformer that this one would be with dense attention and an MLP."""
        return ModelConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads,
            max_position_embeddings=self.max_position_embeddings,
            rope_theta=self.rope_theta,
            rms_norm_eps=self.rms_norm_eps,
            initializer_range=self.initializer_range,
        )

    def layer(self, number: int) -> nn.Module:
        return VariantLayer(self, number)

    def active_parameters(self) -> int:
        """Those that a token meets: without the experts that it isn't sent to."""
        idle = self.num_experts - self.num_active_experts
        expert = 3 * self.hidden_size * self.intermediate_size
        return self.num_parameters() - self.num_hidden_layers * idle * expert

    def flops_per_token(self, sequence_length: int) -> int:
        """Training FLOPs per token, of the active experts alone; else as `model.ModelConfig`'s."""
        with torch.device("meta"):
            parameters = list(self.build().parameters())
        vectors = sum(p.numel() for p in parameters if p.ndim == 1)
        return 6 * (self.active_parameters() - vectors) + self.sequence_flops_per_token(
            sequence_length
        )

    def sequence_flops_per_token(self, sequence_length: int) -> int:
        """Scores and values; differential attention has two maps."""
        maps = 2 if self.attention == "differential" else 1
        return maps * 12 * self.num_hidden_layers * self.hidden_size * sequence_length


class VariantLayer(nn.Module):
    """A pre-norm transformer layer; x (B, T, C) -> (B, T, C)."""

    def __init__(self, config: VariantConfig, number: int):
        super().__init__()
        dense = config.dense()
        self.std = config.initializer_range
        self.residual_std = self.std / math.sqrt(2 * config.num_hidden_layers)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = attention(config, number)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = experts(config) if config.num_experts > 1 else MLP(dense)
        cos, sin = rotary_tables(dense)
        self.cos: Tensor
        self.sin: Tensor
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def initialise(self) -> None:
        """What a linear layer would begin with, for the experts' weights."""
        for name, parameter in self.named_parameters():
            if name.endswith("experts.gate_up_proj"):
                nn.init.normal_(parameter, std=self.std)
            elif name.endswith("experts.down_proj"):
                nn.init.normal_(parameter, std=self.residual_std)

    def forward(self, x: Tensor, state: State | None) -> Tensor:
        cache = StateCache(state) if state is not None else None
        begin = cache.length if cache is not None else 0
        end = begin + x.shape[1]
        if end > len(self.cos):
            raise ValueError(f"{end} positions, but there is room for {len(self.cos)}")
        mask = mask_after(begin, x.shape[1], x.device)
        cos, sin = self.cos[begin:end], self.sin[begin:end]
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


def attention(config: VariantConfig, number: int) -> nn.Module:
    if config.attention == "dense":
        return Attention(config.dense(), number)
    head_dim = config.dense().head_dim
    return DifferentialAttention(
        config.hidden_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        head_dim,
        value_dim=head_dim,
        rms_norm_eps=config.rms_norm_eps,
        layer=number,
    )


def experts(config: VariantConfig) -> nn.Module:
    return MixtureOfExperts(
        config.hidden_size,
        config.intermediate_size,
        config.num_experts,
        config.num_active_experts,
    )


class StateCache(KVCache):
    """The keys and values of one layer in its state, where they grow with the sequence."""

    def __init__(self, state: State):
        self.state = state
        self.length = state["k"].shape[2] if state else 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if self.length:
            k = torch.cat([self.state["k"], k], dim=2)
            v = torch.cat([self.state["v"], v], dim=2)
        self.state["k"], self.state["v"] = k, v
        return k, v


def mask_after(begin: int, length: int, device: torch.device) -> Tensor | None:
    """Who may look where (T, S) behind `begin` positions; None where being causal says it all."""
    if begin == 0 or length == 1:
        return None
    index = torch.arange(begin + length, device=device)
    return index[begin:, None] >= index
