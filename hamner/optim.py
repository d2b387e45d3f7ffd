"""Optimizers, parameter groups, loss scaling, and learning-rate schedules of the step alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from hamner.machine import cpu_multiplies_bf16
from hamner.recipe import OptimizerPart, SchedulePart

FIRST_SCALE = 2.0**16
GROWTH_INTERVAL = 2_000  # finite steps after which the loss scale doubles


def learning_rate(step: int, steps: int, peak: float, schedule: SchedulePart) -> float:
    """Learning rate of a step (0-based) out of `steps`.

    Linear warm-up from peak / warmup, then from the peak towards `floor * peak`:
    `linear` and `cosine` decay over all that is left; `wsd` (warm-up, stable, decay,
    arXiv 2404.06395) stays at the peak and decays over the last `decay` steps: in equal steps, or
    with 1 - sqrt of the decay's part that is over, fast and then slowly (arXiv 2405.18392).
    """
    if step < schedule.warmup:
        return peak * (step + 1) / schedule.warmup
    decay = steps - schedule.warmup
    if schedule.kind == "wsd":
        decay = min(decay, schedule.decay)
    if decay <= 0:
        return peak
    progress = min(1.0, max(0.0, (step - (steps - decay)) / decay))
    if schedule.kind == "cosine":
        progress = (1 - math.cos(math.pi * progress)) / 2
    elif schedule.kind == "wsd" and schedule.decay_type == "1-sqrt":
        progress = math.sqrt(progress)
    return peak * (1 - progress * (1 - schedule.floor))


class Muon(torch.optim.Muon):
    """torch's Muon, but in fp32 on a CPU that doesn't multiply in bf16.

    torch's multiplies in bf16 always, and without instructions for it a product takes 20 times as
    long as in fp32. There the update is computed here, in the form that `Optimizer` asks for:
    Nesterov's momentum, and updates of AdamW's size. Elsewhere it is torch's own.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update the parameters that have gradients; there is no closure to call."""
        device = self.param_groups[0]["params"][0].device
        if device.type != "cpu" or cpu_multiplies_bf16():
            super().step()
            return
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        gradient, state, rate = parameter.grad, self.state[parameter], group["lr"]
        assert gradient is not None
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        momentum = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        update = orthogonal(gradient.lerp(momentum, group["momentum"]), group)
        parameter.mul_(1 - rate * group["weight_decay"])
        parameter.add_(update, alpha=-rate * 0.2 * math.sqrt(max(parameter.shape)))


def orthogonal(matrix: Tensor, group: Mapping[str, Any]) -> Tensor:
    """U S V' of a matrix U D V' (m, n), with all of S near 1, by Newton and Schulz's iteration.

    `group` holds Muon's `ns_coefficients`, `ns_steps` and `eps`.
    """
    a, b, c = group["ns_coefficients"]
    x = matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / x.norm().clamp(min=group["eps"])
    for _ in range(group["ns_steps"]):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if matrix.shape[0] > matrix.shape[1] else x


class Optimizer:
    """AdamW, or Muon for the layers' matrices with AdamW for the rest, as one.

    Weight decay is for matrices (the embedding is one) and not for norms. Muon (arXiv 2502.16982)
    scales its updates to the size of AdamW's, so both share learning rate and weight decay. The
    embedding has `embedding_rate` times that rate, and `embedding_weight_decay` where it is given.
    """

    def __init__(self, model: nn.Module, settings: OptimizerPart):
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        matrices = [p for name, p in named if p.dim() == 2 and ".layers." in f".{name}"]
        for_muon = matrices if settings.kind == "muon" else []
        theirs = set(map(id, for_muon))
        rest = [p for _, p in named if id(p) not in theirs]
        embedding = [p for name, p in named if name.endswith("embed_tokens.weight")]
        norms = [p for p in rest if p.dim() < 2]
        others = [p for p in rest if id(p) not in set(map(id, [*embedding, *norms]))]
        decay, its_decay = settings.weight_decay, settings.embedding_weight_decay
        if its_decay is None:
            its_decay = decay
        groups: list[dict[str, Any]] = [
            {"params": embedding, "weight_decay": its_decay, "scale": settings.embedding_rate},
            {"params": others, "weight_decay": decay},
            {"params": norms, "weight_decay": 0.0},
        ]
        self._adamw = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=settings.learning_rate,
            betas=settings.betas,
            eps=settings.eps,
            fused=True,
        )
        self._parts: list[torch.optim.Optimizer] = [self._adamw]
        if for_muon:
            self._parts.append(
                Muon(
                    for_muon,
                    lr=settings.learning_rate,
                    momentum=settings.momentum,
                    weight_decay=settings.weight_decay,
                    adjust_lr_fn="match_rms_adamw",
                )
            )
        self.parameters = [p for _, p in named]
        self.set_learning_rate(settings.learning_rate)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for part in self._parts for group in part.param_groups]

    def set_learning_rate(self, rate: float) -> None:
        """`rate` for all, but `embedding_rate` times it for the embedding."""
        for group in self.param_groups:
            group["lr"] = rate * group.get("scale", 1.0)

    def zero_grad(self) -> None:
        for part in self._parts:
            part.zero_grad(set_to_none=True)

    def step(self, divisor: Tensor | None = None, finite: Tensor | None = None) -> None:
        """Update with the gradients over `divisor`; not at all if `finite` (0 or 1) says no.

        Both are scalars on the gradients' device. AdamW's fused kernel reads them there, so nothing
        waits for the device; Muon and other devices' kernels can't, and wait.
        """
        if len(self._parts) == 1 and self.parameters[0].device.type in ("cuda", "cpu"):
            # The two attributes are how torch's own GradScaler talks to the kernel.
            self._adamw.grad_scale = divisor  # type: ignore[attr-defined]
            self._adamw.found_inf = None if finite is None else 1 - finite  # type: ignore[attr-defined]
            self._adamw.step()
            return
        if finite is not None and not finite:
            return
        if divisor is not None:
            torch._foreach_div_([p.grad for p in self.parameters if p.grad is not None], divisor)
        for part in self._parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self._parts]}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take over the momenta of a saved state; the hyper-parameters stay the recipe's.

        Raises:
            ValueError: it is the state of another kind of optimizer.
        """
        own = self.state_dict()["parts"]
        theirs = saved.get("parts", [])
        if _sizes(own) != _sizes(theirs):
            raise ValueError("the state of another kind of optimizer")
        for part, mine, state in zip(self._parts, own, theirs, strict=True):
            parameters = [p for group in part.param_groups for p in group["params"]]
            momenta = {
                number: {key: _placed_like(value, parameters[number]) for key, value in s.items()}
                for number, s in state["state"].items()
            }
            part.load_state_dict({"state": momenta, "param_groups": mine["param_groups"]})


def _sizes(parts: list[dict[str, Any]]) -> list[int]:
    return [sum(len(group["params"]) for group in part["param_groups"]) for part in parts]


def _placed_like(value: Any, parameter: Tensor) -> Any:
    """A momentum laid out over the ranks as its parameter is."""
    if isinstance(parameter, DTensor) and isinstance(value, Tensor) and value.dim():
        value = value.to(parameter.device)
        return distribute_tensor(value, parameter.device_mesh, parameter.placements)
    return value


def make_optimizer(model: nn.Module, settings: OptimizerPart) -> Optimizer:
    return Optimizer(model, settings)


def gradient_norm(parameters: list[nn.Parameter]) -> Tensor:
    """Global 2-norm of the gradients, over all ranks that hold a part of them; a scalar."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


class LossScale:
    """The factor that keeps fp16's small gradients from vanishing; 1 where it isn't needed.

    It halves after a step whose gradients weren't finite and doubles after 2,000 that were, as
    torch's GradScaler does, but goes by the norm over all ranks and never leaves the device.
    """

    def __init__(self, device: torch.device, *, enabled: bool):
        self.enabled = enabled
        self.scale = torch.tensor(FIRST_SCALE if enabled else 1.0, device=device)
        self._growth = torch.zeros((), dtype=torch.int32, device=device)

    def update(self, finite: Tensor) -> None:
        """`finite`: whether the step's gradients were, 0 or 1."""
        if self.enabled:
            torch._amp_update_scale_(
                self.scale, self._growth, 1 - finite, 2.0, 0.5, GROWTH_INTERVAL
            )

    def state_dict(self) -> dict[str, float]:
        if not self.enabled:
            return {}
        return {"scale": float(self.scale), "finite_steps": int(self._growth)}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        if self.enabled and state:
            self.scale.fill_(state["scale"])
            self._growth.fill_(int(state["finite_steps"]))
