"""What every architecture of `legacy/` shares: embedding, layers, final norm, tied head, loss.

An architecture is a config (a subclass of `LanguageModelConfig`) and a layer. A layer is a module
called as `layer(x, state)`: x (B, T, C) comes back as (B, T, C), residual connections included.
With `state` (a dict that is empty at first) it goes on behind the positions it has seen, however
many at a time, and leaves in it what the next call needs. Without, it sees the T positions alone.

The face is that of `model.Transformer`, whose loss and label shift it uses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from model import Output, RMSNorm, loss_of_targets, shifted_targets

State = dict[str, Any]  # what a layer remembers of the positions before: tensors, counts
Cache = list[State]  # one per layer
Config = TypeVar("Config", bound="LanguageModelConfig")

RESIDUAL = (  # what ends in a residual sum
    *("o_proj.weight", "out_proj.weight", "down_proj.weight", "linear_out.weight"),
    *("proj_down.weight", "attention.output.weight", "feed_forward.value.weight"),
)


@dataclass(frozen=True)
class LanguageModelConfig:
    """What all of them have; the defaults are those of the tournament's small field."""

    vocab_size: int = 49_152
    hidden_size: int = 512
    num_hidden_layers: int = 12
    max_position_embeddings: int = 1_024
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02

    def layer(self, number: int) -> nn.Module:
        """Layer `number` of a model with this config."""
        raise NotImplementedError

    def body(self) -> Body:
        """All but the head; to be overridden where layers share more than x or the norm differs."""
        return Body(self)

    def build(self) -> LanguageModel:
        return LanguageModel(self)

    def inner_width(self) -> tuple[str, int] | None:
        """The field that widens the layers alone, and its smallest step; None if there is none."""
        return ("intermediate_size", 16) if hasattr(self, "intermediate_size") else None

    def num_parameters(self) -> int:
        """Exact count; the head is the embedding."""
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in self.body().parameters())

    def sequence_flops_per_token(self, sequence_length: int) -> int:
        """Training FLOPs per token of what isn't a product with a weight: scores, states, scans."""
        return 0

    def flops_per_token(self, sequence_length: int) -> int:
        """Training FLOPs per token: 6 per matrix weight, the head once, and the mixing in time."""
        with torch.device("meta"):
            body = self.body()
        matrices = sum(p.numel() for p in body.parameters() if p.ndim == 2)
        return 6 * matrices + self.sequence_flops_per_token(sequence_length)


class Body(nn.Module):
    """Embedding, layers and final norm."""

    def __init__(self, config: LanguageModelConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(config.layer(i) for i in range(config.num_hidden_layers))
        self.norm: nn.Module = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.compiled = False  # set by hamner.machine.compile_layers

    def forward(self, input_ids: Tensor, cache: Cache | None) -> Tensor:
        x = self.embed_tokens(input_ids)  # (B, T, C)
        states: Iterable[State | None] = cache if cache is not None else [None] * len(self.layers)
        for layer, state in zip(self.layers, states, strict=True):
            x = layer(x, state)
        return self.norm(x)


class LanguageModel(nn.Module):
    """A causal language model over any of the layers.

    Weights of linear layers and embeddings begin as N(0, initializer_range), biases at 0, and what
    adds to the residual stream smaller, as in `model.Transformer`. After that every module with a
    method `initialise()` sets what it wants otherwise, so that nothing overwrites it.
    """

    def __init__(self, config: LanguageModelConfig):
        super().__init__()
        self.config = config
        self.model = config.body()
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.apply(self._init_weights)
        for name, parameter in self.named_parameters():
            if name.endswith(RESIDUAL):
                parameter.data /= math.sqrt(2 * config.num_hidden_layers)
        for module in self.model.modules():
            if callable(initialise := getattr(module, "initialise", None)):
                initialise()
        self.lm_head.weight = self.model.embed_tokens.weight

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def new_cache(self) -> Cache:
        """An empty memory, to be given to `forward` again and again as a sequence goes on."""
        return [{} for _ in self.model.layers]

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        *,
        cache: Cache | None = None,
        logits_to_keep: int = 0,
        reduction: str = "mean",
        num_labels: int | None = None,
    ) -> Output:
        """Logits (B, T, V), or with labels (B, T) the loss, as in `model.Transformer.forward`.

        Args:
            input_ids: (B, T) token ids; with a cache, those that follow the ones it has seen.
            labels: aligned with input_ids, the shift happens here; -100 asks for no loss.
            logits_to_keep: only the last so many positions get logits; 0 means all.
            reduction: "mean" or "sum" over the labelled tokens, or "none" for (B, T).
            num_labels: what `model.count_labels` says of these labels, which saves asking the GPU.
        """
        hidden = self.model(input_ids, cache)  # (B, T, C)
        if labels is None:
            return Output(logits=self.lm_head(hidden[:, -logits_to_keep:]))
        targets = shifted_targets(labels, None)  # (B, T-1)
        if labels is input_ids:
            num_labels = targets.numel()
        weight = self.lm_head.weight
        loss = loss_of_targets(hidden[:, :-1], weight, targets, reduction, num_labels)
        return Output(loss=loss)


class CausalConv(nn.Module):
    """A depthwise convolution over the last `kernel` positions, with a bias.

    Weights (C, kernel), oldest position first, as `nn.Conv1d(C, C, kernel, groups=C)` has them.
    """

    def __init__(self, channels: int, kernel: int):
        super().__init__()
        self.kernel = kernel
        self.weight = nn.Parameter(torch.empty(channels, kernel))
        self.bias = nn.Parameter(torch.zeros(channels))

    def initialise(self) -> None:
        bound = 1 / math.sqrt(self.kernel)  # torch's own for a convolution
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, state: State | None, key: str = "conv") -> Tensor:
        """x (B, T, C) -> (B, T, C); the last kernel - 1 inputs stay in `state[key]`."""
        past = x.new_zeros(x.shape[0], self.kernel - 1, x.shape[2])
        if state is not None:
            past = state.get(key, past)
        length, dtype = x.shape[1], x.dtype
        x = torch.cat([past.type_as(x), x], dim=1)  # (B, kernel - 1 + T, C)
        if state is not None:
            state[key] = x[:, length:].clone()
        y: Tensor = self.bias
        for i, tap in enumerate(self.weight.unbind(1)):  # without conv1d's two transpositions
            y = torch.addcmul(y, x[:, i : i + length], tap)
        return y.to(dtype)


def remembered(state: State | None, key: str, start: Callable[[], Tensor]) -> Tensor:
    """What a layer left under `key`, or `start()` where nothing was seen yet."""
    return start() if state is None or key not in state else state[key]


def wide(x: Tensor) -> Tensor:
    """x, in fp32 if it is in half precision: what states, sums and exponentials need."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def fitted(config: Config, parameters: int) -> Config:
    """The config with about so many parameters: within 1 % wherever its steps are fine enough.

    The number of layers is chosen first, then their inner width (`inner_width`). Where these don't
    come within 1 %, up to two layers more or less are tried, and the nearest is taken.
    """
    embedding = config.vocab_size * config.hidden_size
    per_layer = (config.num_parameters() - embedding) / config.num_hidden_layers
    layers = round((parameters - embedding) / per_layer)
    best, least = config, math.inf
    for number in (layers, layers + 1, layers - 1, layers + 2, layers - 2):
        fit = _fitted_width(replace(config, num_hidden_layers=max(1, number)), parameters)
        off = abs(fit.num_parameters() / parameters - 1)
        if off < least:
            best, least = fit, off
        if least <= 0.01:
            break
    return best


def _fitted_width(config: Config, parameters: int) -> Config:
    if (width := config.inner_width()) is None:
        return config
    field, step = width
    now, count = getattr(config, field), config.num_parameters()
    wider: Config = replace(config, **{field: now + step})
    steps = round((parameters - count) / (wider.num_parameters() - count))
    return replace(config, **{field: max(step, now + step * steps)})
