"""A small model and its logits token by token, for the tests of what makes single tokens fast."""

from __future__ import annotations

import torch
from torch import Tensor

from hamner.generation import Sampling
from model import KVCache, ModelConfig, Transformer

CONFIG = ModelConfig(
    vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    initializer_range=0.2, tie_word_embeddings=False,
)  # fmt: skip
GREEDY = Sampling(0.0, 0, 1.0, 1.0, max_new_tokens=30)
PROMPT = [3, 1, 4, 1, 5]


def step_by_step(model: Transformer, ids: list[int]) -> Tensor:
    """Logits (T, V), each of a call with a single id."""
    cache = KVCache(model.config, 1, len(ids))
    with torch.no_grad():
        made = [model(torch.tensor([[id_]]), cache=cache).logits[0, 0] for id_ in ids]
    return torch.stack(made)
