"""Chat Hamner's transformer: a Llama-style decoder in one file.

RMSNorm before every sub-layer, SwiGLU, rotary positions, grouped-query attention, tied embeddings,
no biases. Parameter and config names are those of Hugging Face's `LlamaForCausalLM`, and so are the
numbers: the same weights give the same logits.

Shapes are written beside the lines: B sequences, T positions, S cached positions, C hidden size,
H query heads, K key/value heads, D head size, V vocabulary, N positions that carry a label.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

IGNORE_INDEX = -100  # a label with this value asks for no loss
MAX_LOGITS = 2**27  # the loss never holds more logits than this at once: 512 MiB in fp32
CPU_HEAD_TOKENS = 512  # nor, on a CPU, those of more tokens: they stay in its cache


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a model. The defaults are v4's: 163,609,344 parameters."""

    vocab_size: int = 49_152
    hidden_size: int = 768
    intermediate_size: int = 2_048
    num_hidden_layers: int = 20
    num_attention_heads: int = 12
    num_key_value_heads: int = 4
    max_position_embeddings: int = 1_024
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(
                f"hidden_size ({self.hidden_size}) must be an even multiple of "
                f"num_attention_heads ({self.num_attention_heads})"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    def matmul_parameters(self) -> int:
        """Weights that every token is multiplied with: all matrices, and the head once."""
        kv_size = self.num_key_value_heads * self.head_dim
        attention = 2 * self.hidden_size * (self.hidden_size + kv_size)
        mlp = 3 * self.hidden_size * self.intermediate_size
        return self.num_hidden_layers * (attention + mlp) + self.vocab_size * self.hidden_size

    def num_parameters(self) -> int:
        """Exact count of trainable parameters; tied embeddings count once."""
        norms = (2 * self.num_hidden_layers + 1) * self.hidden_size
        embedding = 0 if self.tie_word_embeddings else self.vocab_size * self.hidden_size
        return self.matmul_parameters() + norms + embedding

    def flops_per_token(self, sequence_length: int) -> int:
        """Training FLOPs per token, forward and backward, without recomputation.

        6 per matrix weight and 12 * layers * hidden * length for attention scores and values, as
        counted in the PaLM paper's appendix B (arXiv 2204.02311; causality is not deducted).
        """
        attention = 12 * self.num_hidden_layers * self.hidden_size * sequence_length
        return 6 * self.matmul_parameters() + attention


@dataclass
class Output:
    """What `Transformer.forward` returns: a loss if it was given labels, logits if it wasn't."""

    loss: Tensor | None = None
    logits: Tensor | None = None  # (B, T, V)


class KVCache:
    """Keys and values of all positions seen so far, in buffers allocated once.

    `length` counts the filled positions. Cutting it back forgets the positions after it. `padding`
    (B) says how many positions at the beginning of each row only make it as long as the others:
    nobody looks at them, and the rotary positions begin behind them.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int = 1,
        max_length: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        padding: Tensor | None = None,
    ):
        self.max_length = max_length or config.max_position_embeddings
        shape = (batch_size, config.num_key_value_heads, self.max_length, config.head_dim)
        # Allocated as one: on a CPU, what is large lies in large pages, which are read faster.
        both = torch.zeros((2, config.num_hidden_layers, *shape), dtype=dtype, device=device)
        self.keys, self.values = ([layer.data for layer in part] for part in both)
        self.padding = padding
        self.length = 0

    def keep(self, rows: list[int]) -> None:
        """Forget all rows of the batch but these."""
        self.keys = [keys[rows] for keys in self.keys]
        self.values = [values[rows] for values in self.values]
        if self.padding is not None:
            self.padding = self.padding[rows]

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (B, K, T, D) of one layer; return all of its keys and values (B, K, S, D)."""
        end = self.length + k.shape[2]
        keys, values = self.keys[layer], self.values[layer]
        keys[:, :, self.length : end] = k
        values[:, :, self.length : end] = v
        return keys[:, :, :end].type_as(k), values[:, :, :end].type_as(v)


class RMSNorm(nn.Module):
    """x / rms(x) * weight, with the statistics in fp32 (arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x32 = x.float()
    x32 = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    return weight * x32.type_as(x)


def rotary_tables(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """cos and sin (max_position_embeddings, D) of RoPE (arXiv 2104.09864), half-split layout."""
    exponent = torch.arange(0, config.head_dim, 2).float() / config.head_dim
    frequency = config.rope_theta**-exponent  # (D/2)
    angle = torch.outer(torch.arange(config.max_position_embeddings).float(), frequency)
    angle = torch.cat([angle, angle], dim=-1)  # (max_position_embeddings, D)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (i, i + D/2) of x (B, H, T, D) by its position's angle."""
    left, right = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-right, left], dim=-1) * sin).type_as(x)


Mask = Tensor | list[int]  # who sees whom, or how many tokens each packed sequence has


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, causal: bool) -> Tensor:
    """Grouped-query attention (arXiv 2305.13245): q (B, H, T, D), k and v (B, K, S, D)."""
    if isinstance(mask, list):
        return attend_apart(q, k, v, mask)
    grouped = q.shape[1] != k.shape[1]
    if grouped and q.shape[2] == 1 and not causal:
        # A single token's queries can stand as the positions of their group: K heads, not H.
        y = attend(q.view(*k.shape[:2], -1, q.shape[3]), k, v, mask, False)
        return y.reshape(q.shape)
    flash = q.device.type == "cuda" and q.dtype != torch.float32 and mask is None
    if grouped and not (flash or q.device.type == "cpu"):  # the other kernels don't know of groups
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        v = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
        grouped = False
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped
    )


def attend_apart(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    """Causal attention within each of the sequences that stand in the rows, one after another.

    A mask gives the same, but every token of a row is looked at: a step of recipe small with four
    sequences in a row of 1,024 takes 1.3 times as long.
    """
    rows = [x.transpose(1, 2).flatten(0, 1).transpose(0, 1)[None] for x in (q, k, v)]
    qs, ks, vs = (x.split(lengths, dim=2) for x in rows)  # (1, H or K, length, D)
    y = torch.cat([attend(*each, None, True) for each in zip(qs, ks, vs, strict=True)], dim=2)
    return y[0].transpose(0, 1).unflatten(0, (len(q), -1)).transpose(1, 2)  # (B, H, T, D)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Mask | None, cache: KVCache | None
    ) -> Tensor:
        batch, length, _ = x.shape
        heads = (batch, length, -1, self.head_dim)
        q = rotate(self.q_proj(x).view(heads).transpose(1, 2), cos, sin)  # (B, H, T, D)
        k = rotate(self.k_proj(x).view(heads).transpose(1, 2), cos, sin)  # (B, K, T, D)
        v = self.v_proj(x).view(heads).transpose(1, 2)  # (B, K, T, D)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # (B, K, S, D)
        y = attend(q, k, v, mask, causal=mask is None and length > 1)  # (B, H, T, D)
        return self.o_proj(y.transpose(1, 2).reshape(batch, length, -1))


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Mask | None, cache: KVCache | None
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, layers and final norm: everything before the language-model head."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, layer) for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.compiled = False  # the layers are: lengths would have them compiled for every batch
        cos, sin = rotary_tables(config)
        self.cos: Tensor
        self.sin: Tensor
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(
        self, input_ids: Tensor, sequence_ids: Tensor | None, cache: KVCache | None
    ) -> Tensor:
        apart = input_ids.device.type == "cpu" and not self.compiled
        positions, mask = positions_and_mask(input_ids, sequence_ids, cache, apart)
        cos = self.cos[positions].unsqueeze(-3)  # (1 or B, 1, T, D)
        sin = self.sin[positions].unsqueeze(-3)
        x = self.embed_tokens(input_ids)  # (B, T, C)
        for layer in self.layers:
            x = layer(x, cos, sin, mask, cache)
        if cache is not None:
            cache.length += input_ids.shape[1]
        return self.norm(x)


def positions_and_mask(
    input_ids: Tensor, sequence_ids: Tensor | None, cache: KVCache | None, apart: bool
) -> tuple[Tensor, Mask | None]:
    """Rotary positions (1 or B, T), and the attention mask (B or 1, 1, T, S), True = may look.

    The mask is None where plain causal attention (or one new token after a cache) says it all, and
    the packed sequences' lengths where they are to attend `apart`.
    """
    length, device = input_ids.shape[1], input_ids.device
    start = cache.length if cache is not None else 0
    index = torch.arange(start, start + length, device=device)[None]  # (1, T)
    if sequence_ids is not None:
        begins = sequence_ids[:, 1:] != sequence_ids[:, :-1]
        first = torch.where(F.pad(begins, (1, 0)), index, 0).cummax(dim=1).values  # (B, T)
        if apart:
            return index - first, packed_lengths(sequence_ids)
        same = sequence_ids[:, None, :, None] == sequence_ids[:, None, None, :]
        return index - first, same & (index[0][:, None] >= index[0])
    padding = cache.padding if cache is not None else None
    if padding is None and (not start or length == 1):
        return index, None
    past = torch.arange(start + length, device=device)  # (S)
    before = index[0][:, None] >= past  # (T, S)
    if padding is None:
        return index, before[None, None]
    itself = index[0][:, None] == past  # for padding, which would have nothing to look at
    mask = before & (past >= padding[:, None, None]) | itself  # (B, T, S)
    return (index - padding[:, None]).clamp(min=0), mask[:, None]


def packed_lengths(sequence_ids: Tensor) -> list[int]:
    """How many tokens each packed sequence of the rows (B, T) has, row after row."""
    return [len(list(run)) for row in sequence_ids.tolist() for _, run in groupby(row)]


class Transformer(nn.Module):
    """A causal language model.

    >>> model = Transformer(ModelConfig())
    >>> loss = model(input_ids, labels=input_ids).loss
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.apply(self._init_weights)
        residual_std = config.initializer_range / math.sqrt(2 * config.num_hidden_layers)
        for name, parameter in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):  # as in GPT-2, section 2.3
                nn.init.normal_(parameter, std=residual_std)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        *,
        sequence_ids: Tensor | None = None,
        cache: KVCache | None = None,
        logits_to_keep: int = 0,
        reduction: str = "mean",
        num_labels: int | None = None,
    ) -> Output:
        """Logits, or with labels the loss of predicting each label from what stands before it.

        Args:
            input_ids: (B, T) token ids.
            labels: (B, T) aligned with input_ids, which may be the same tensor: the shift happens
                here and nowhere else. -100 asks for no loss, and costs no logits.
            sequence_ids: (B, T) says which tokens of a row belong together when several sequences
                are packed into it: attention, positions and loss never cross from one to the next.
            cache: keys and values of the positions before input_ids; input_ids are added to it.
            logits_to_keep: only the last so many positions get logits; 0 means all.
            reduction: "mean" over the labelled tokens, their "sum", or "none" for the loss of
                every token (B, T), 0 where there is none: at [b, t] stands -log p(labels[b, t]).
            num_labels: what `count_labels` says of these labels. A GPU that is told needn't be
                asked, and so needn't be waited for.

        Raises:
            ValueError: more positions than max_position_embeddings or than the cache holds;
                sequence_ids together with a cache.
        """
        if cache is not None and sequence_ids is not None:
            raise ValueError("a cache holds one sequence a row: it doesn't go with sequence_ids")
        self._check_length(input_ids, cache)
        hidden = self.model(input_ids, sequence_ids, cache)  # (B, T, C)
        if labels is None:
            return Output(logits=self.lm_head(hidden[:, -logits_to_keep:]))
        targets = shifted_targets(labels, sequence_ids)  # (B, T-1)
        if labels is input_ids and sequence_ids is None:
            num_labels = targets.numel()
        weight = self.lm_head.weight
        loss = loss_of_targets(hidden[:, :-1], weight, targets, reduction, num_labels)
        return Output(loss=loss)

    def _check_length(self, input_ids: Tensor, cache: KVCache | None) -> None:
        end = input_ids.shape[1] + (cache.length if cache is not None else 0)
        limit = self.config.max_position_embeddings
        if cache is not None:
            limit = min(limit, cache.max_length)
        if end > limit:
            raise ValueError(f"{end} positions, but there is room for {limit}")


# ------------------------------------------------------------------------------ the loss


def shifted_targets(labels: Tensor, sequence_ids: Tensor | None) -> Tensor:
    """What each position but the last is to predict (B, T-1): the label of the next.

    -100 where the next token belongs to another sequence.
    """
    targets = labels[:, 1:]
    if sequence_ids is not None:
        targets = targets.masked_fill(sequence_ids[:, 1:] != sequence_ids[:, :-1], IGNORE_INDEX)
    return targets


def count_labels(labels: Tensor, sequence_ids: Tensor | None = None) -> int:
    """How many losses `Transformer.forward` sums up for labels (B, T)."""
    return int((shifted_targets(labels, sequence_ids) != IGNORE_INDEX).sum())


def loss_of_targets(
    hidden: Tensor, weight: Tensor, targets: Tensor, reduction: str, num_labels: int | None
) -> Tensor:
    """Cross-entropy of hidden (B, T-1, C) @ weight.T against targets (B, T-1), already shifted.

    Reductions and num_labels are those of `Transformer.forward`.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be mean, sum or none, got {reduction!r}")
    hidden, flat = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    if num_labels == len(flat):
        place: Tensor | slice = slice(None)
    elif num_labels is None:
        place = (flat != IGNORE_INDEX).nonzero()[:, 0]  # (N); asks the device how many
    else:
        place = torch.nonzero_static(flat != IGNORE_INDEX, size=num_labels)[:, 0]
    hidden, labelled = hidden[place], flat[place]  # (N, C), (N)
    if reduction != "none":
        total = head_loss(hidden, weight, labelled, "sum")
        return total if reduction == "sum" else total / len(labelled)
    losses = head_loss(hidden, weight, labelled, "none")  # (N)
    per_token = losses.new_zeros(flat.shape)
    per_token[place] = losses
    return F.pad(per_token.view(targets.shape), (1, 0))  # (B, T)


def head_loss(hidden: Tensor, weight: Tensor, targets: Tensor, reduction: str) -> Tensor:
    """Cross-entropy of the logits `hidden @ weight.T` against targets, some tokens at a time.

    hidden (N, C), weight (V, C), targets (N); reduction is "sum" or "none" (N). All N x V logits
    never exist together: for a sum, each part's gradients are computed along with its loss, as
    torch's own chunked `linear_cross_entropy` (2.13 and later) does.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    size = max(1, MAX_LOGITS // len(weight))
    if device == "cpu":
        size = min(size, CPU_HEAD_TOKENS)
    with torch.autocast(device, enabled=False):
        # torch's own answers in the precision of its input: fp16 can't hold the sum of a batch.
        if hasattr(F, "linear_cross_entropy") and hidden.dtype == torch.float32:
            parts = nn.LinearCrossEntropyOptions(batch_chunk_size=size, chunking_method=None)
            return F.linear_cross_entropy(
                hidden, weight, targets, reduction=reduction, options=parts
            )
        if reduction == "sum":
            return SummedHeadLoss.apply(hidden, weight, targets, size)
        pairs = zip(hidden.split(size), targets.split(size), strict=True)
        losses = [checkpoint(_token_losses, h, weight, t, use_reentrant=False) for h, t in pairs]
        return torch.cat(losses)


def _token_losses(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="none")


class SummedHeadLoss(torch.autograd.Function):
    """The summed cross-entropy of `head_loss`, `size` tokens at a time, for older torch.

    The gradient of the logits is softmax - one-hot: at hand once the loss is, and so turned at
    once into those of hidden and weight, which the backward pass has only to scale.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, size: int) -> Tensor:
        total = torch.zeros((), device=hidden.device)
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros_like(weight, dtype=torch.float32)
        for begin in range(0, len(targets), size):
            part, index = hidden[begin : begin + size], targets[begin : begin + size, None]
            log_p = F.log_softmax(F.linear(part, weight).float(), dim=-1)  # (size, V)
            total -= log_p.gather(1, index).sum()
            if any(ctx.needs_input_grad):
                d_logits = log_p.exp_()
                d_logits.scatter_add_(1, index, d_logits.new_full(index.shape, -1))
                d_logits = d_logits.type_as(hidden)
                torch.mm(d_logits, weight, out=d_hidden[begin : begin + size])
                d_weight += d_logits.T @ part
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, None, None]:
        d_hidden, d_weight = ctx.saved_tensors
        # In the precision of the statistics: half precision would lose what is small.
        d_hidden = (d_hidden * upstream).type_as(d_hidden)
        return d_hidden, (d_weight * upstream).to(ctx.dtype), None, None
