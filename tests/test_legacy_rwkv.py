"""Tests of RWKV-4, against Hugging Face's and the paper's sums, and RWKV-7, against the paper."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import RwkvConfig, RwkvModel

from legacy.architectures import rwkv7
from legacy.architectures.rwkv4 import RWKV4Config, weighted_values
from legacy.architectures.rwkv7 import RWKV7Config, TimeMixing, delta_rule
from legacy.language_model import LanguageModel

SMALL4 = RWKV4Config(vocab_size=50, hidden_size=32, intermediate_size=72, num_hidden_layers=3)
SMALL7 = RWKV7Config(
    vocab_size=50,
    hidden_size=32,
    intermediate_size=72,
    num_hidden_layers=3,
    head_dim=8,
    decay_rank=5,
    rate_rank=6,
    value_rank=7,
    gate_rank=9,
    chunk_size=8,
)


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(shape, dtype=torch.float64, generator=generator)


def random_model(config: RWKV4Config | RWKV7Config, std: float) -> LanguageModel:
    torch.manual_seed(0)
    model = config.build()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return model


def some_ids(*shape: int) -> Tensor:
    return torch.randint(50, shape, generator=torch.Generator().manual_seed(1))


# ---------------------------------------------------------------------------------- RWKV-4


def test_rwkv4_with_hugging_faces_weights_gives_its_outputs() -> None:
    torch.manual_seed(0)
    settings = RwkvConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=72,
        num_hidden_layers=3,
        layer_norm_epsilon=SMALL4.rms_norm_eps,
        rescale_every=0,
    )
    theirs, model = RwkvModel(settings).eval(), SMALL4.build()
    mine = dict(model.model.named_parameters())
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            torch.nn.init.normal_(parameter, std=0.5)
            for old, new in (
                ("embeddings", "embed_tokens"),
                ("blocks", "layers"),
                ("ln_out", "norm"),
            ):
                name = name.replace(old, new)
            own = mine.pop(name)
            own.copy_(parameter.view_as(own))
        assert not mine
        ids = some_ids(2, 70)
        expected = theirs(ids, use_cache=False).last_hidden_state
        torch.testing.assert_close(model.model(ids, None), expected, atol=1e-4, rtol=0)


def literal_wkv(k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> Tensor:
    """Equation 16 of the paper, sum by sum."""
    outputs = []
    for t in range(k.shape[1]):
        age = torch.arange(t - 1, -1, -1, dtype=k.dtype)[:, None]
        weights = torch.cat([torch.exp(k[:, :t] - age * w), torch.exp(u + k[:, t : t + 1])], dim=1)
        outputs.append((weights * v[:, : t + 1]).sum(1) / weights.sum(1))
    return torch.stack(outputs, dim=1)


def test_wkv_and_its_gradients_are_those_of_the_sums() -> None:
    k, v = random(2, 40, 5, scale=3), random(2, 40, 5, seed=1)
    w, u = random(5, seed=2).exp(), random(5, seed=3)
    given = [x.requires_grad_() for x in (k, v, w, u)]
    mine, theirs = weighted_values(*given, None), literal_wkv(*given)
    torch.testing.assert_close(mine, theirs)
    upstream = random(2, 40, 5, seed=4)
    gradients = (torch.autograd.grad(y, given, upstream) for y in (mine, theirs))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("decay", [0.0, 1e-4, 20.0, 1e4])
def test_wkv_survives_keys_whose_exponentials_do_not_exist(decay: float) -> None:
    k, v = random(2, 300, 4, scale=500).float(), random(2, 300, 4, seed=1).float()
    u = torch.tensor([-400.0, 0.0, 1.0, 400.0])
    k.requires_grad_()
    wkv = weighted_values(k, v, torch.full((4,), decay), u, None)
    assert wkv.isfinite().all() and wkv.abs().max() <= v.abs().max() * (1 + 1e-6)
    wkv.sum().backward()
    assert k.grad is not None and k.grad.isfinite().all()


# ---------------------------------------------------------------------------------- RWKV-7


def delta_inputs(length: int, *, seed: int = 0) -> list[Tensor]:
    """r, log w, k, v, k^ and a (2, 3, length, 8), with decays and rates over their whole range."""
    r, w, k, v, removal, a = (random(2, 3, length, 8, seed=seed + i) for i in range(6))
    log_w = -rwkv7.MAX_RATE * torch.sigmoid(4 * w)
    return [r, log_w, k, v, F.normalize(removal, dim=-1), torch.sigmoid(4 * a)]


def chunked(given: list[Tensor], chunk_size: int) -> Tensor:
    r, log_w, k, v, removal, a = given
    return delta_rule(r, log_w, k, v, removal, a, k.new_zeros(2, 3, 8, 8), chunk_size)[0]


def literal_delta_rule(
    r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, removal: Tensor, a: Tensor
) -> Tensor:
    """S_t = S_{t-1} (diag(w_t) - k^^T (a k^)) + v^T k and o_t = r_t S_t^T, position by position."""
    state = r.new_zeros(*r.shape[:2], r.shape[-1], r.shape[-1])
    outputs = []
    for t in range(r.shape[2]):
        r_t, w_t, k_t, v_t, removal_t, a_t = (
            x[:, :, t, None] for x in (r, log_w.exp(), k, v, removal, a)
        )  # row vectors (1, N)
        change = torch.diag_embed(w_t[:, :, 0]) - removal_t.mT @ (a_t * removal_t)
        state = state @ change + v_t.mT @ k_t
        outputs.append(r_t @ state.mT)
    return torch.cat(outputs, dim=2)


@pytest.mark.parametrize("length", [1, 5, 8, 9, 20])
def test_the_chunked_delta_rule_and_its_gradients_are_the_recurrences(length: int) -> None:
    given = [x.requires_grad_() for x in delta_inputs(length)]
    mine, theirs = chunked(given, chunk_size=8), literal_delta_rule(*given)
    torch.testing.assert_close(mine, theirs)
    upstream = random(*mine.shape, seed=9)
    gradients = (torch.autograd.grad(y, given, upstream) for y in (mine, theirs))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("log_w", [-rwkv7.MAX_RATE, 0.0], ids=["fastest decay", "no decay"])
def test_the_chunked_delta_rule_holds_in_fp32_at_both_ends_of_the_decay(log_w: float) -> None:
    given = delta_inputs(100)
    given[1] = torch.full_like(given[1], log_w)
    given[5] = torch.ones_like(given[5])
    mine = chunked([x.float() for x in given], chunk_size=32)
    torch.testing.assert_close(mine.double(), literal_delta_rule(*given), atol=2e-4, rtol=1e-4)


def test_rwkv7_can_forget_nearly_half_in_a_step_but_never_more_and_can_keep_nearly_all() -> None:
    mixing = TimeMixing(SMALL7, 0)
    mixing.initialise()
    for bias, expected in ((50.0, math.exp(-math.exp(-0.5))), (-50.0, 1.0)):
        torch.nn.init.constant_(mixing.decay.up.bias, bias)
        log_w = mixing.log_decay(torch.zeros(1, 1, 32))
        torch.testing.assert_close(log_w.exp(), torch.full((1, 1, 32), expected))


Weights = dict[str, Tensor]


def weights(module: torch.nn.Module) -> Weights:
    return {name: parameter.detach() for name, parameter in module.named_parameters()}


def literal_time_mixing(p: Weights, x: Tensor, first: list[Tensor]) -> Tensor:
    """The paper's section 4.1 for x (T, C), one position and one head at a time.

    `first` are the first layer's values: empty says that this is the first.
    """
    size, dim, values = 32, 8, []
    state = [torch.zeros(dim, dim, dtype=x.dtype) for _ in range(size // dim)]
    before, outputs = torch.zeros_like(x[0]), []
    for t, now in enumerate(x):
        x_r, x_w, x_k, x_v, x_a, x_g = (now + (before - now) * mu for mu in p["mix"].view(6, -1))
        r, k, v = p["receptance.weight"] @ x_r, p["key.weight"] @ x_k, p["value.weight"] @ x_v
        if first:
            share = p["first_share.up.weight"] @ p["first_share.down.weight"] @ x_v
            v = v + (first[t] - v) * torch.sigmoid(p["first_share.up.bias"] + share)
        else:
            values.append(v)
        d = p["decay.up.weight"] @ torch.tanh(p["decay.down.weight"] @ x_w)
        w = torch.exp(-math.exp(-0.5) * torch.sigmoid(p["decay.up.bias"] + d))
        a = p["rate.up.weight"] @ p["rate.down.weight"] @ x_a
        a = torch.sigmoid(p["rate.up.bias"] + a)
        g = p["gate.up.weight"] @ torch.sigmoid(p["gate.down.weight"] @ x_g)
        removal, k = k * p["removal_key"], k * (1 + (a - 1) * p["rate_of_key"])
        y = torch.empty_like(now)
        for h in range(size // dim):
            at = slice(h * dim, (h + 1) * dim)
            hat = removal[at] / removal[at].norm()
            state[h] = state[h] @ (torch.diag(w[at]) - torch.outer(hat, a[at] * hat))
            state[h] = state[h] + torch.outer(v[at], k[at])
            o = state[h] @ r[at]
            o = (o - o.mean()) / torch.sqrt(o.var(correction=0) + 1e-5 * dim)
            o = o * p["norm.weight"][at] + p["norm.bias"][at]
            y[at] = o + (r[at] * p["bonus"][at] * k[at]).sum() * v[at]
        outputs.append(p["output.weight"] @ (y * g))
        before = now
    first.extend(values)
    return torch.stack(outputs)


def literal_channel_mixing(p: Weights, x: Tensor) -> Tensor:
    before = torch.cat([torch.zeros_like(x[:1]), x[:-1]])
    mixed = x + (before - x) * p["mix"]
    return torch.relu(mixed @ p["key.weight"].T).square() @ p["value.weight"].T


def test_rwkv7_is_the_papers_equations() -> None:
    model = random_model(SMALL7, std=0.4).double()
    ids, first = some_ids(1, 20), []
    with torch.no_grad():
        x = model.model.layers[0].ln0(model.model.embed_tokens(ids[0]))
        for layer in model.model.layers:
            x = x + literal_time_mixing(weights(layer.attention), layer.ln1(x), first)
            x = x + literal_channel_mixing(weights(layer.feed_forward), layer.ln2(x))
        expected = model.lm_head(model.model.norm(x))
        torch.testing.assert_close(model(ids).logits[0], expected)


def test_chunks_whose_quotients_fp32_could_not_hold_are_refused() -> None:
    with pytest.raises(ValueError, match="chunk_size must be at most 128, got 256"):
        RWKV7Config(chunk_size=256)


def test_the_longest_chunk_holds_in_fp32() -> None:
    given = delta_inputs(128)
    given[1] = torch.full_like(given[1], -rwkv7.MAX_RATE)
    given[0].requires_grad_()
    o = chunked([x.float() for x in given], chunk_size=128)
    (gradient,) = torch.autograd.grad(o.square().sum(), given[0])
    torch.testing.assert_close(o.double(), literal_delta_rule(*given), atol=2e-4, rtol=1e-4)
    assert gradient.isfinite().all()
