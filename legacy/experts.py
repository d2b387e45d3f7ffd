"""A mixture of experts in the MLP's place, as in Mixtral (arXiv 2401.04088).

A router picks the `active` most likely of the experts for every token; their outputs are added up
by the router's probabilities, made to sum to 1. No token is ever left out. Names and shapes of the
weights are those of Hugging Face's `MixtralSparseMoeBlock`.

The tokens are sorted by expert, and one grouped product does the work of all of them: no loop, no
padding, and nothing waits for the device.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Experts(nn.Module):
    """The SwiGLU MLPs of E experts with C inputs and I inner units each, as two tensors.

    What they begin with is the layer's to say: see `VariantLayer.initialise`.
    """

    def __init__(self, hidden_size: int, intermediate_size: int, experts: int):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * intermediate_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden_size, intermediate_size))

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        """rows (N, C), sorted by expert, of which each has counts (E) -> (N, C)."""
        gate, up = grouped_product(rows, self.gate_up_proj, counts).chunk(2, dim=-1)
        return grouped_product(F.silu(gate) * up, self.down_proj, counts)


# torch's compiler knows the grouped product for bf16 alone.
@torch.compiler.disable
def grouped_product(rows: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
    """The first counts[0] of rows (N, C) by weights[0].T, the next by weights[1].T ... -> (N, O).

    weights (E, O, C). Under autocast in its precision, as a linear layer.
    """
    device = rows.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        rows, weights = rows.to(dtype), weights.to(dtype)
    if has_grouped_product(rows):
        ends = counts.cumsum(0).int()
        return F.grouped_mm(rows, weights.transpose(1, 2), offs=ends)
    parts = rows.split(counts.tolist())
    return torch.cat([F.linear(part, weight) for part, weight in zip(parts, weights, strict=True)])


def has_grouped_product(rows: Tensor) -> bool:
    """Whether torch multiplies such rows by all experts' weights at once.

    On a GPU it does in bf16, from Ampere on; in other precisions it too takes one after the other.
    """
    if not rows.is_cuda:
        return rows.device.type == "cpu"
    return rows.dtype == torch.bfloat16 and torch.cuda.get_device_capability(rows.device) >= (8, 0)


class MixtureOfExperts(nn.Module):
    """Called as `model.MLP`. After each call `balance` says how evenly the experts were used."""

    def __init__(self, hidden_size: int, intermediate_size: int, experts: int, active: int):
        super().__init__()
        self.active = active
        self.gate = nn.Linear(hidden_size, experts, bias=False)
        self.experts = Experts(hidden_size, intermediate_size, experts)
        self.balance: Tensor | None = None  # until `taken_balance` takes it

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])  # (N, C)
        shares, chosen = self.route(flat)  # (N, active) each
        order = chosen.flatten().argsort(stable=True)  # (N * active)
        counts = assignments(chosen, self.gate.out_features)
        rows = self.experts(flat[order // self.active], counts)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        outputs = rows[back].view(len(flat), self.active, -1)  # (N, active, C)
        return (outputs * shares[..., None].type_as(outputs)).sum(1).view(x.shape)

    def route(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """Which experts each token of flat (N, C) goes to, and with what shares; (N, active) each.

        In fp32: a rounded probability would send a token elsewhere.
        """
        with torch.autocast(flat.device.type, enabled=False):
            logits = F.linear(flat.float(), self.gate.weight.float())  # (N, E)
            probabilities = logits.softmax(dim=-1)
        best, chosen = probabilities.topk(self.active, dim=-1)
        self.balance = load_balance(probabilities, chosen)
        return best / best.sum(-1, keepdim=True), chosen


def assignments(chosen: Tensor, experts: int) -> Tensor:
    """How many of the choices (N, active) fell on each expert: (experts,) int64."""
    flat = chosen.flatten()
    counts = torch.zeros(experts, dtype=torch.int64, device=flat.device)
    return counts.scatter_add_(0, flat, torch.ones_like(flat))


def load_balance(probabilities: Tensor, chosen: Tensor) -> Tensor:
    """The Switch Transformer's load-balancing loss (arXiv 2101.03961, eq. 4), without its factor.

    Experts, times the sum over them of the share of choices that fell on one and the router's mean
    probability for it: 1 where all are used alike, E where one gets everything. Hugging Face's
    Mixtral counts each of a token's choices as one, and so has `active` times as much.
    """
    experts = probabilities.shape[-1]
    used = assignments(chosen, experts) / chosen.numel()
    return experts * (used * probabilities.mean(0)).sum()


def taken_balance(model: nn.Module) -> Tensor | None:
    """The mean over layers of what their experts' last call left in `balance`; None without any.

    It is taken away, so that nothing holds on to what it was computed from.
    """
    found = []
    for module in model.modules():
        if isinstance(module, MixtureOfExperts) and module.balance is not None:
            found.append(module.balance)
            module.balance = None
    return torch.stack(found).mean() if found else None
