"""A GGUF file: rows as llama.cpp turns them, types, vocabulary, and text cut in the same places."""

from __future__ import annotations

import importlib.util
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader, TokenType
from made_exports import SHAPE, made_model, made_tokenizer

from hamner import tokenization
from hamner.errors import UserError
from hamner.export.gguf_file import TYPES, halves, neighbours, pre_tokenizer, read_back, write_gguf
from hamner.recipe import SamplingPart
from hamner.tokenization import Tokenizer
from model import ModelConfig, Transformer, rotary_tables, rotate

torch.set_num_threads(1)  # more would wait for each other where cores are shared
ROOT = Path(__file__).resolve().parent.parent
COSMO2 = ROOT.parent / "shared" / "tokenizers" / "cosmo2"
needs_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed"
)
SAMPLING = SamplingPart(
    temperature=0.7, top_k=40, top_p=0.9, min_p=0.1, repetition_penalty=1.1, max_new_tokens=80
)


def written(
    path: Path, model: Transformer, tokenizer: Tokenizer, type_name: str = "f32"
) -> GGUFReader:
    write_gguf(
        path, model, tokenizer, type_name,
        name="a name", end="<|im_end|>", template="{{ messages }}", sampling=SAMPLING,
    )  # fmt: skip
    return GGUFReader(path)


# ------------------------------------------------------------------------------ weights


def rotated_neighbours(x: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """RoPE as llama.cpp has it, of x (T, heads, D): the pairs (2i, 2i + 1) turn together."""
    frequency = config.rope_theta ** (-torch.arange(0, config.head_dim, 2) / config.head_dim)
    angle = torch.arange(len(x))[:, None] * frequency  # (T, D/2)
    turned = (
        torch.view_as_complex(x.unflatten(-1, (-1, 2)))
        * torch.polar(torch.ones_like(angle), angle)[:, None]
    )
    return torch.view_as_real(turned).flatten(-2)


def test_products_of_queries_and_keys_are_the_same_with_rows_moved() -> None:
    config = made_model().config
    heads, size = config.num_attention_heads, config.head_dim
    x = torch.randn(9, config.hidden_size)
    wq, wk = torch.randn(2, heads * size, config.hidden_size)
    cos, sin = (table[:9, None] for table in rotary_tables(config))
    q, k = (rotate((x @ w.T).unflatten(-1, (heads, size)), cos, sin) for w in (wq, wk))
    moved = ((x @ neighbours(w, heads).T).unflatten(-1, (heads, size)) for w in (wq, wk))
    other_q, other_k = (rotated_neighbours(each, config) for each in moved)
    scores = torch.einsum("thd,shd->hts", q, k)
    assert not torch.allclose(q, other_q, atol=1e-3)
    others = torch.einsum("thd,shd->hts", other_q, other_k)
    torch.testing.assert_close(others, scores, rtol=1e-4, atol=1e-2)  # of some tens
    assert torch.equal(halves(neighbours(wq, heads), heads), wq)


@pytest.mark.parametrize("type_name", TYPES)
def test_a_file_holds_the_model_as_its_type_rounds_it(tmp_path: Path, type_name: str) -> None:
    model, tokenizer = made_model(hidden_size=64, intermediate_size=72), made_tokenizer()
    reader = written(tmp_path / "x.gguf", model, tokenizer, type_name)
    held = read_back(tmp_path / "x.gguf", model, type_name)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert "output.weight" not in kinds  # tied
    assert kinds["blk.0.attn_norm.weight"] == kinds["output_norm.weight"] == "F32"
    assert kinds["blk.1.attn_k.weight"] == type_name.upper()
    assert kinds["blk.1.ffn_down.weight"] == ("F16" if type_name == "q8_0" else type_name.upper())
    digits = {"f32": 0.0, "f16": 2**-11, "bf16": 2**-8, "q8_0": 0.6 / 127}[type_name]
    for name, weight in model.state_dict().items():
        off = (held.state_dict()[name] - weight).abs()
        allowed = weight.abs() if type_name != "q8_0" else weight.abs().max().expand_as(weight)
        assert (off <= digits * allowed + 1e-7).all(), name
        assert type_name == "f32" or weight.ndim == 1 or off.any()


def test_untied_embeddings_have_an_output_of_their_own(tmp_path: Path) -> None:
    model = made_model(tie_word_embeddings=False)
    reader = written(tmp_path / "x.gguf", model, made_tokenizer())
    assert "output.weight" in [tensor.name for tensor in reader.tensors]
    held = read_back(tmp_path / "x.gguf", model, "f32")
    assert torch.equal(held.lm_head.weight, model.lm_head.weight)


def test_another_model_in_the_file_is_noticed(tmp_path: Path) -> None:
    written(tmp_path / "x.gguf", made_model(), made_tokenizer())
    other = made_model()
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[0, 0] += 1e-4  # type: ignore
    with pytest.raises(UserError, match=r"x\.gguf holds another blk\.1\.ffn_up\.weight"):
        read_back(tmp_path / "x.gguf", other, "f32")
    for field, name in (("rope_theta", "rope.freq_base"), ("max_position_embeddings", "context")):
        other = made_model(**{field: 77})
        with pytest.raises(UserError, match=f"says llama.{name}.* the checkpoint says 77"):
            read_back(tmp_path / "x.gguf", other, "f32")


def test_a_file_that_ends_too_early_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    written(path, made_model(), made_tokenizer())
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(UserError, match=r"x\.gguf is shorter than it should be"):
        read_back(path, made_model(), "f32")


@pytest.mark.parametrize("type_name", ["f16", "q8_0"])
def test_weights_that_fp16_cannot_hold_are_refused(tmp_path: Path, type_name: str) -> None:
    model = made_model()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = 1e6
    with pytest.raises(UserError, match=f"too large for {type_name}: try --gguf bf16"):
        written(tmp_path / "x.gguf", model, made_tokenizer(), type_name)
    written(tmp_path / "y.gguf", model, made_tokenizer(), "bf16")


# ------------------------------------------------------------------------------ metadata


def test_the_metadata_say_what_the_model_and_the_recipe_are(tmp_path: Path) -> None:
    tokenizer = made_tokenizer()
    reader = written(tmp_path / "x.gguf", made_model(), tokenizer)

    def said(key: str) -> Any:
        return reader.fields[key].contents()

    assert said("general.architecture") == "llama"
    assert said("general.name") == "a name"
    assert said("llama.rope.freq_base") == SHAPE["rope_theta"]
    assert said("llama.attention.layer_norm_rms_epsilon") == pytest.approx(SHAPE["rms_norm_eps"])
    assert said("tokenizer.chat_template") == "{{ messages }}"
    assert said("tokenizer.ggml.eos_token_id") == tokenizer.im_end
    assert said("tokenizer.ggml.bos_token_id") == tokenizer.end_of_text
    assert said("tokenizer.ggml.add_bos_token") is False
    assert said("general.sampling.temp") == pytest.approx(0.7)
    assert said("general.sampling.top_k") == 40
    assert said("general.sampling.min_p") == pytest.approx(0.1)
    assert "general.sampling.penalty_repeat" not in reader.fields


def test_ids_without_a_token_are_there_and_unused(tmp_path: Path) -> None:
    tokenizer = made_tokenizer()
    reader = written(tmp_path / "x.gguf", made_model(), tokenizer)
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    types = reader.fields["tokenizer.ggml.token_type"].contents()
    assert tokenizer.vocab_size == 400 and len(tokens) == len(types) == SHAPE["vocab_size"]
    assert len(set(tokens)) == len(tokens)
    assert set(types[400:]) == {TokenType.UNUSED}
    assert {id_ for id_, kind in enumerate(types) if kind == TokenType.CONTROL} == (
        tokenizer.control_ids
    )
    assert tokens[tokenizer.im_end] == "<|im_end|>"


# ------------------------------------------------------------------------------ tokenizer


def no_digits(content: dict[str, Any]) -> None:
    content["pre_tokenizer"] = content["pre_tokenizer"]["pretokenizers"][1]


def prefix_space(content: dict[str, Any]) -> None:
    content["pre_tokenizer"]["pretokenizers"][1]["add_prefix_space"] = True


def digits_together(content: dict[str, Any]) -> None:
    content["pre_tokenizer"]["pretokenizers"][0]["individual_digits"] = False


def lowercase(content: dict[str, Any]) -> None:
    content["normalizer"] = {"type": "Lowercase"}


def white_space(content: dict[str, Any]) -> None:
    content["pre_tokenizer"] = {"type": "Whitespace"}


def nothing(content: dict[str, Any]) -> None:
    content["pre_tokenizer"] = None


def test_the_rule_that_cuts_text_is_named_or_refused() -> None:
    def named(change: Callable[[dict[str, Any]], None] = lambda content: None) -> str:
        content = json.loads(made_tokenizer().to_json())
        change(content)
        return pre_tokenizer(content)

    assert named() == "smollm"
    assert named(no_digits) == "gpt-2"
    for change in (prefix_space, digits_together, lowercase, white_space, nothing):
        with pytest.raises(UserError, match=r"llama\.cpp has no tokenizer like this one"):
            named(change)


PIECES = (
    " ", "  ", "\n", "\n\n", "\t", "\r\n", "\u00a0", "\u2003", "\u200b", "'s", "'S", "don't",
    "I'LL", "½", "²", "٣", "Ⅷ", "①", "12", "345.67", "a", "Zß", "世", "界", "é", "e\u0301", "🙂",
    "👩‍👩‍👧", "<|im_end|>", "_", "--", "...", "$", "ﬁ", "\ufeff", "अ", "ा", "\x00", "def f(x):",
)  # fmt: skip


@pytest.fixture(scope="module", params=["trained", "cosmo2", "gpt-2"])
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Tokenizer, Any]]:
    """A tokenizer of ours, and llama.cpp's reading of it."""
    if request.param == "cosmo2" and not COSMO2.is_dir():
        pytest.skip("the tokenizer of v4 is not here")
    llama_cpp = pytest.importorskip("llama_cpp")
    ours = tokenization.from_path(COSMO2) if request.param == "cosmo2" else made_tokenizer()
    if request.param == "gpt-2":
        content = json.loads(ours.to_json())
        no_digits(content)
        ours = tokenization.from_json(json.dumps(content))
    path = tmp_path_factory.mktemp("gguf") / "x.gguf"
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    written(path, made_model(**shape, vocab_size=ours.vocab_size + 8), ours)
    llama = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    yield ours, llama
    llama.close()


def test_llama_cpp_cuts_text_in_the_same_places(pair: tuple[Tokenizer, Any]) -> None:
    ours, llama = pair
    rng = random.Random(6)
    texts = ["".join(rng.choices(PIECES, k=rng.randint(1, 12))) for _ in range(1_500)]
    letters = [rng.randrange(0x20, 0xD800) for _ in range(1_500)]
    texts += [f"a{chr(code)}b {chr(code)}{chr(code)}1" for code in letters]
    for text in texts:
        ids = llama.tokenize(text.encode(), add_bos=False, special=False)
        assert ids == ours.encode(text), text
        assert llama.detokenize(ids).decode("utf-8", "replace") == ours.decode(ids)


@needs_llama_cpp
def test_llama_cpp_knows_where_an_answer_ends(pair: tuple[Tokenizer, Any]) -> None:
    ours, llama = pair
    import llama_cpp

    vocab = llama_cpp.llama_model_get_vocab(llama.model)
    ends = [id_ for id_ in range(ours.vocab_size) if llama_cpp.llama_vocab_is_eog(vocab, id_)]
    assert {ours.im_end, ours.end_of_text} <= set(ends) <= ours.control_ids
    assert (llama.token_eos(), llama.token_bos()) == (ours.im_end, ours.end_of_text)
