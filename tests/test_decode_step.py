"""The step of one token: the model's own numbers, but for the rounding of its weights."""

from __future__ import annotations

import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hamner import decode_step
from hamner.decode_step import COMPILERS, DTYPES, SOURCE, compiled, compiler, rounded, speed_up
from hamner.errors import UserError
from hamner.generation import Sampling, generate_batch, generate_ids
from model import KVCache, ModelConfig, Transformer

CONFIG = ModelConfig(
    vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    initializer_range=0.2, tie_word_embeddings=False,
)  # fmt: skip
# Nothing is a multiple of what is added up at once, and a head has 18 numbers.
UNEVEN = replace(CONFIG, vocab_size=321, hidden_size=72, intermediate_size=101)
GREEDY = Sampling(0.0, 0, 1.0, 1.0, max_new_tokens=30)
PROMPT = [3, 1, 4, 1, 5]

found = next(filter(None, map(shutil.which, COMPILERS)), None)
needs_compiler = pytest.mark.skipif(found is None, reason="no C compiler here")


def new_model(config: ModelConfig = CONFIG) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.uniform_(parameter, 0.5, 2.0)
    return model


def sped_up(config: ModelConfig = CONFIG, weights: str = "fp32") -> Transformer:
    model = new_model(config)
    speed_up(model, weights)
    return model


def step_by_step(model: Transformer, ids: list[int], cache: KVCache | None = None) -> Tensor:
    """Logits (T, V), each of a call with a single id."""
    cache = cache or KVCache(model.config, 1, len(ids))
    with torch.no_grad():
        made = [model(torch.tensor([[id_]]), cache=cache).logits[0, 0] for id_ in ids]
    return torch.stack(made)


def with_rounded_weights(config: ModelConfig, weights: str) -> Transformer:
    """A model whose matrices have gone through the rounding and back."""
    model = new_model(config)
    for linear in model.modules():
        if isinstance(linear, nn.Linear):
            values, scales = rounded(linear.weight.detach(), weights)
            exact = values.float() if scales is None else values.float() * scales[:, None]
            linear.weight.data.copy_(exact)
    return model


@pytest.fixture
def ids() -> list[int]:
    return torch.randint(0, 320, (40,), generator=torch.Generator().manual_seed(1)).tolist()


@needs_compiler
@pytest.mark.parametrize("config", [CONFIG, UNEVEN], ids=["even", "uneven"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_the_step_is_the_model(config: ModelConfig, kv_heads: int, ids: list[int]) -> None:
    config = replace(config, num_key_value_heads=kv_heads)
    caches = [KVCache(config, 1, 48) for _ in range(2)]
    plain, model, calls = new_model(config), sped_up(config), []
    model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: calls.append(1))
    expected = step_by_step(plain, ids, caches[0])
    torch.testing.assert_close(step_by_step(model, ids, caches[1]), expected, atol=5e-5, rtol=1e-5)
    assert not calls  # single tokens went by the step
    for ours, its in zip(caches[1].keys + caches[1].values, caches[0].keys + caches[0].values,
                         strict=True):  # fmt: skip
        torch.testing.assert_close(ours, its, atol=5e-5, rtol=1e-5)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, plain.state_dict()[name])
    generate_batch(model, [PROMPT, PROMPT], GREEDY, ())
    assert calls  # answers side by side didn't


@needs_compiler
@pytest.mark.parametrize("config", [CONFIG, UNEVEN], ids=["even", "uneven"])
@pytest.mark.parametrize("weights", ["fp16", "int8"])
def test_the_step_is_the_model_with_rounded_weights(
    config: ModelConfig, weights: str, ids: list[int]
) -> None:
    expected = step_by_step(with_rounded_weights(config, weights), ids)
    made = step_by_step(sped_up(config, weights), ids)
    torch.testing.assert_close(made, expected, atol=1e-4, rtol=1e-4)
    assert (made - step_by_step(new_model(config), ids)).abs().max() > 1e-3  # they were rounded


@needs_compiler
@pytest.mark.skipif(platform.machine() != "x86_64", reason="nothing is spelt out elsewhere")
@pytest.mark.parametrize("weights", ["fp16", "int8"])
def test_what_is_spelt_out_for_x86_is_what_the_compiler_makes(
    weights: str, ids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = step_by_step(sped_up(UNEVEN, weights), ids)
    monkeypatch.setenv("CC", f"{found} -mno-f16c -mno-avx512f")
    try:
        model = sped_up(UNEVEN, weights)
    except UserError as error:
        assert "_Float16" in str(error)
        pytest.skip("a compiler that doesn't know _Float16")
    torch.testing.assert_close(step_by_step(model, ids), expected, atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize("weights", ["fp16", "int8"])
def test_rounding_is_off_by_half_a_step_at_most(weights: str) -> None:
    weight = torch.randn(50, 48) * torch.logspace(-4, 3, 50)[:, None]
    values, scales = rounded(weight, weights)
    if scales is None:
        bound, exact = weight.abs() / 2048 + 2**-25, values.float()
    else:
        bound = (weight.abs().amax(1, keepdim=True) / 127 / 2).expand_as(weight) * 1.001
        exact = values.float() * scales[:, None]
    assert ((exact - weight).abs() <= bound).all()
    assert not rounded(torch.zeros(5, 4), weights).values.any()


@needs_compiler
def test_the_number_of_threads_changes_nothing(ids: list[int]) -> None:
    model, threads, made = sped_up(UNEVEN), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 16):
            torch.set_num_threads(count)
            made.append(step_by_step(model, ids[:10]))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(made[0], logits) for logits in made)


@needs_compiler
def test_a_full_cache_is_refused() -> None:
    model, cache = sped_up(), KVCache(CONFIG, 1, 5)
    step_by_step(model, PROMPT, cache)
    behind = [part.clone() for part in cache.keys]
    with pytest.raises(IndexError, match="the cache is full: it holds 5 positions"):
        step_by_step(model, [9], cache)
    assert cache.length == 5
    assert all(map(torch.equal, behind, cache.keys))


@needs_compiler
@pytest.mark.parametrize("tied", [True, False])
def test_the_weights_of_32_bits_are_in_memory_once(tied: bool) -> None:
    model = sped_up(replace(CONFIG, tie_word_embeddings=tied))
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert len({linear.weight.untyped_storage().data_ptr() for linear in linears}) == 1
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


@needs_compiler
def test_answers_made_at_the_same_time_do_not_mix() -> None:
    plain, model = new_model(), sped_up()
    prompts = [[first, *PROMPT] for first in range(8)]
    expected = [list(generate_ids(plain, prompt, GREEDY, ())) for prompt in prompts]
    assert len(set(map(tuple, expected))) == len(prompts)
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            made = pool.map(lambda prompt: list(generate_ids(model, prompt, GREEDY, ())), prompts)
            assert list(made) == expected


@needs_compiler
def test_prompts_and_answers_side_by_side_take_the_weights_of_32_bits() -> None:
    plain, model, prompts = new_model(), sped_up(weights="int8"), [PROMPT, PROMPT[:2]]
    assert generate_batch(model, prompts, GREEDY, ()) == generate_batch(plain, prompts, GREEDY, ())
    with torch.no_grad():
        prompt = torch.tensor([PROMPT])
        assert torch.equal(model(prompt).logits, plain(prompt).logits)
        labelled = model(prompt[:, :1], prompt[:, :1], reduction="sum")
    assert labelled.loss is not None


@pytest.fixture
def without_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(decode_step, "COMPILERS", ("no-such-compiler",))


@pytest.mark.usefixtures("without_compiler")
def test_without_a_compiler_the_numbers_are_the_same(ids: list[int]) -> None:
    expected = step_by_step(new_model(), ids)
    torch.testing.assert_close(step_by_step(sped_up(), ids), expected, atol=5e-5, rtol=1e-5)


@pytest.mark.usefixtures("without_compiler")
def test_what_can_not_be_had_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        elsewhere = Transformer(CONFIG)
    with pytest.raises(UserError, match="--weights int8 is for the CPU"):
        speed_up(elsewhere, "int8")
    beginning = "--weights fp16 has to be compiled, and that can't be"
    with pytest.raises(UserError, match=rf"{beginning}: no C compiler \(no-such-compiler\)"):
        sped_up(weights="fp16")
    monkeypatch.setenv("CC", str(tmp_path / "none"))
    with pytest.raises(UserError, match=rf"{beginning}: .*none fails: .*No such file"):
        sped_up(weights="fp16")
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho 'no room on the disk' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    with pytest.raises(UserError, match=rf"{beginning}: .*broken fails: no room on the disk"):
        sped_up(weights="fp16")
    with pytest.raises(ValueError, match=r"in torch\.bfloat16, not in fp32"):
        speed_up(new_model().bfloat16())


@needs_compiler
def test_a_compiler_without_openmp_gives_the_same(
    ids: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = step_by_step(sped_up(UNEVEN), ids)
    without = tmp_path / "cc"
    refuse = 'case "$*" in *-fopenmp*) exit 1;; esac'
    without.write_text(f'#!/bin/sh\n{refuse}\ntouch "$0.called"\nexec {found} "$@"\n')
    without.chmod(0o755)
    monkeypatch.setenv("CC", str(without))
    assert torch.equal(step_by_step(sped_up(UNEVEN), ids), expected)
    assert (tmp_path / "cc.called").exists()


@needs_compiler
@pytest.mark.parametrize("weights", DTYPES)
def test_a_strict_compiler_has_nothing_to_say(weights: str, tmp_path: Path) -> None:
    bits = 8 * DTYPES[weights].itemsize
    command = [
        str(found), "-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-c",
        "-fopenmp", "-march=native", f"-DWEIGHT_BITS={bits}", str(SOURCE),
        "-o", str(tmp_path / "out.o"),
    ]  # fmt: skip
    said = subprocess.run(command, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr


@needs_compiler
def test_the_library_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert compiled.__wrapped__("fp32", compiler()).decode
    assert not list(tmp_path.iterdir())
