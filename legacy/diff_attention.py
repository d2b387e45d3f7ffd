"""Differential attention (Differential Transformer, arXiv 2410.05258).

Every head has two queries and two keys and so two attention maps; the second is subtracted from the
first, times a learnt lambda. What both pay attention to without need cancels out.

    y = (softmax(q1 k1 / sqrt D) - lambda softmax(q2 k2 / sqrt D)) v
    out = (1 - lambda_init) RMSNorm(y), per head

The tournament's shape is the original Chat Hamner's: as many heads as the dense variant has, each
with queries and keys of twice D and values of D. Per layer that is C (C + K D) + 5 D weights more
than dense attention has, with C the hidden size and K the key/value heads. The paper halves the
heads and gives each values of 2 D instead, which costs nothing but the lambdas: `value_dim=2 *
head_dim` and half the heads express it, and then all is as in Hugging Face's DiffLlama but that its
norm per head carries no weight. The output scale 1 - lambda_init is the paper's; the original left
it out.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from model import KVCache, Mask, RMSNorm, attend, rotate

LAMBDA_STD = 0.1  # of the lambda vectors at the beginning: section 2.1


def lambda_init(layer: int) -> float:
    """Where a layer's lambda begins; layers count from 0 here and from 1 in the paper."""
    return 0.8 - 0.6 * math.exp(-0.3 * layer)


class DifferentialAttention(nn.Module):
    """Called as `model.Attention`; B, T, S, C as there, H and K heads that have two maps each."""

    def __init__(
        self,
        hidden_size: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        value_dim: int,
        rms_norm_eps: float,
        layer: int,
    ):
        super().__init__()
        self.layer, self.head_dim, self.value_dim = layer, head_dim, value_dim
        self.lambda_init = lambda_init(layer)
        self.q_proj = nn.Linear(hidden_size, 2 * heads * head_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, 2 * kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, kv_heads * value_dim, bias=False)
        self.o_proj = nn.Linear(heads * value_dim, hidden_size, bias=False)
        self.lambda_q1 = nn.Parameter(torch.zeros(head_dim))
        self.lambda_k1 = nn.Parameter(torch.zeros(head_dim))
        self.lambda_q2 = nn.Parameter(torch.zeros(head_dim))
        self.lambda_k2 = nn.Parameter(torch.zeros(head_dim))
        self.norm = RMSNorm(value_dim, rms_norm_eps)

    def initialise(self) -> None:
        for vector in (self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2):
            nn.init.normal_(vector, std=LAMBDA_STD)

    def weight_of_second_map(self) -> Tensor:
        """lambda, a scalar in fp32."""
        first = (self.lambda_q1.float() * self.lambda_k1.float()).sum().exp()
        second = (self.lambda_q2.float() * self.lambda_k2.float()).sum().exp()
        return first - second + self.lambda_init

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Mask | None, cache: KVCache | None
    ) -> Tensor:
        batch, length, _ = x.shape
        heads = (batch, length, -1, self.head_dim)
        q = rotate(self.q_proj(x).view(heads).transpose(1, 2), cos, sin)  # (B, 2 H, T, D)
        k = rotate(self.k_proj(x).view(heads).transpose(1, 2), cos, sin)  # (B, 2 K, T, D)
        v = self.v_proj(x).view(batch, length, -1, self.value_dim).transpose(1, 2)  # (B, K, T, .)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        # The heads' first maps, and behind them all second ones, in one call.
        both = attend(q, k, v.repeat(1, 2, 1, 1), mask, causal=mask is None and length > 1)
        first, second = both.chunk(2, dim=1)  # (B, H, T, value_dim)
        y = self.norm(first - self.weight_of_second_map() * second) * (1 - self.lambda_init)
        return self.o_proj(y.transpose(1, 2).reshape(batch, length, -1))
