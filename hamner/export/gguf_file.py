"""A model as a GGUF file, which llama.cpp and what builds on it (Ollama, LM Studio ...) run.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

Weights are copied, but for the rows of q_proj and k_proj. RoPE turns pairs of a head's D numbers by
an angle: ours the pairs (i, i + D/2), llama.cpp's "llama" neighbours, (2i, 2i + 1). So each head's
rows are put in the order 0, D/2, 1, D/2 + 1, ...: row i comes to 2i and row i + D/2 to 2i + 1. That
leaves every product q k as it was, since both are put in the same order.

The tokenizer is copied too, except for the rule that cuts text before merges apply: of that the
file has only the name, for llama.cpp's own code. `smollm` is cosmo2's, and ours: every digit on its
own, then GPT-2's rule.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from hamner.errors import UserError
from hamner.recipe import SamplingPart
from hamner.tokenization import Tokenizer
from model import ModelConfig, Transformer

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

TYPES = ("f32", "f16", "bf16", "q8_0")
Q8_BLOCK = 32  # numbers that share a scale in q8_0


def write_gguf(
    path: Path,
    model: Transformer,
    tokenizer: Tokenizer,
    type_name: str,
    *,
    name: str,
    end: str,
    template: str,
    sampling: SamplingPart,
) -> None:
    """Write a model in one of TYPES, with its tokenizer and chat template; `end` ends a text.

    Raises:
        UserError: llama.cpp has nothing like this tokenizer, or a weight is too large for the type.
        OSError: the file can't be written.
    """
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    try:
        writer.add_name(name)
        writer.add_file_type(file_type(type_name))
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        add_shape(writer, model)
        add_tokenizer(writer, tokenizer, model.config.vocab_size, end)
        writer.add_chat_template(template)
        add_sampling(writer, sampling)
        for tensor_name, tensor, heads in named(model):
            kind = tensor_type(type_name, tensor)
            rows = neighbours(tensor, heads) if heads else tensor
            data = gguf.quants.quantize(rows.contiguous().numpy(), kind)
            writer.add_tensor(tensor_name, data, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def file_type(type_name: str) -> int:
    from gguf import LlamaFileType

    return {
        "f32": LlamaFileType.ALL_F32,
        "f16": LlamaFileType.MOSTLY_F16,
        "bf16": LlamaFileType.MOSTLY_BF16,
        "q8_0": LlamaFileType.MOSTLY_Q8_0,
    }[type_name]


def add_shape(writer: GGUFWriter, model: Transformer) -> None:
    shape = model.config
    writer.add_vocab_size(shape.vocab_size)
    writer.add_context_length(shape.max_position_embeddings)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_block_count(shape.num_hidden_layers)
    writer.add_head_count(shape.num_attention_heads)
    writer.add_head_count_kv(shape.num_key_value_heads)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_theta)
    writer.add_layer_norm_rms_eps(shape.rms_norm_eps)


def add_sampling(writer: GGUFWriter, sampling: SamplingPart) -> None:
    """llama.cpp's defaults for this model. Its repetition penalty sees the prompt: left out."""
    writer.add_sampling_temp(sampling.temperature)
    writer.add_sampling_top_k(sampling.top_k)
    writer.add_sampling_top_p(sampling.top_p)
    writer.add_sampling_min_p(sampling.min_p)


# --------------------------------------------------------------------------- tokenizer


def add_tokenizer(writer: GGUFWriter, tokenizer: Tokenizer, size: int, end: str) -> None:
    """Vocabulary, padded to the model's size, merges, and which tokens have a meaning."""
    content = json.loads(tokenizer.to_json())
    texts, types = vocabulary(content, size)
    writer.add_tokenizer_model("gpt2")  # a byte-level BPE
    writer.add_tokenizer_pre(pre_tokenizer(content))
    writer.add_token_list(texts)
    writer.add_token_types(types)
    merges = content["model"]["merges"]
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in merges])
    writer.add_bos_token_id(tokenizer.end_of_text)
    writer.add_pad_token_id(tokenizer.end_of_text)
    writer.add_eos_token_id(texts.index(end))
    writer.add_eot_token_id(tokenizer.im_end)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)


def vocabulary(content: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Spelling and type of the ids up to size, of which the last ones may have no token."""
    from gguf import TokenType

    texts = [f"[PAD{id_}]" for id_ in range(size)]
    types = [int(TokenType.UNUSED)] * size
    for text, id_ in content["model"]["vocab"].items():
        texts[id_], types[id_] = text, TokenType.NORMAL
    for token in content["added_tokens"]:
        kind = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
        texts[token["id"]], types[token["id"]] = token["content"], kind
    return texts, types


def pre_tokenizer(content: dict[str, Any]) -> str:
    """llama.cpp's name for the rule that cuts text before merges apply.

    Raises:
        UserError: this is no byte-level BPE, or cuts by another rule.
    """
    stage = content["pre_tokenizer"] or {}
    rules = stage["pretokenizers"] if stage.get("type") == "Sequence" else [stage]
    names = [rule.get("type") for rule in rules]
    usual = (
        content["model"].get("type") == "BPE"
        and not content["normalizer"]
        and not any(rule.get("add_prefix_space") for rule in rules)
        and all(rule.get("use_regex", True) for rule in rules)
        and all(rule.get("individual_digits", True) for rule in rules)
    )
    if usual and names == ["Digits", "ByteLevel"]:
        return "smollm"
    if usual and names == ["ByteLevel"]:
        return "gpt-2"
    raise UserError(
        "llama.cpp has no tokenizer like this one: --gguf needs a byte-level BPE that cuts text by "
        "GPT-2's rule, with every digit on its own or not"
    )


# --------------------------------------------------------------------------- weights


def named(model: Transformer) -> Iterator[tuple[str, Tensor, int]]:
    """GGUF's name of each weight, the weight, and the heads whose rows are paired (0: none)."""
    from gguf import MODEL_ARCH, get_tensor_name_map

    shape = model.config
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, shape.num_hidden_layers)
    heads = {"q_proj": shape.num_attention_heads, "k_proj": shape.num_key_value_heads}
    for ours, tensor in model.state_dict().items():
        if ours == "lm_head.weight" and shape.tie_word_embeddings:
            continue  # llama.cpp takes the embedding where there is no output.weight
        theirs = names.get_name(ours, (".weight",))
        assert theirs is not None, ours
        yield theirs, tensor, heads.get(ours.split(".")[-2], 0)


def neighbours(weight: Tensor, heads: int) -> Tensor:
    """Rows (heads * D, C) with each head's pairs (i, i + D/2) moved to (2i, 2i + 1)."""
    pairs = weight.unflatten(0, (heads, 2, -1))  # (heads, 2, D/2, C)
    return pairs.transpose(1, 2).flatten(0, 2)


def halves(weight: Tensor, heads: int) -> Tensor:
    """What `neighbours` has moved, moved back."""
    pairs = weight.unflatten(0, (heads, -1, 2))  # (heads, D/2, 2, C)
    return pairs.transpose(1, 2).flatten(0, 2)


def tensor_type(type_name: str, tensor: Tensor) -> GGMLQuantizationType:
    """What a tensor is stored as: norms always in fp32, rows that don't fit q8_0's blocks in fp16.

    Raises:
        UserError: a value is too large for fp16.
    """
    from gguf import GGMLQuantizationType

    if tensor.ndim < 2 or type_name == "f32":
        return GGMLQuantizationType.F32
    if type_name == "bf16":
        return GGMLQuantizationType.BF16
    if tensor.abs().max() > torch.finfo(torch.float16).max:
        raise UserError(f"a weight is too large for {type_name}: try --gguf bf16")
    if type_name == "q8_0" and tensor.shape[-1] % Q8_BLOCK == 0:
        return GGMLQuantizationType.Q8_0
    return GGMLQuantizationType.F16


# --------------------------------------------------------------------------- read again


def read_back(path: Path, model: Transformer, type_name: str) -> Transformer:
    """The model that a file holds: the checkpoint's, rounded as its type must.

    Raises:
        UserError: the file holds anything else, or ends too early.
    """
    from gguf import GGUFReader
    from gguf.quants import dequantize

    try:
        reader = GGUFReader(path)
    except ValueError:  # gguf writes by numpy, which may not be told of a full disk
        raise UserError(f"{path.name} is shorter than it should be: is the disk full?") from None
    for key, expected in shape_fields(model.config).items():
        field = reader.get_field(key)
        found = field.contents() if field else None
        if found is None or not np.isclose(found, expected, rtol=1e-6):  # it holds fp32
            raise UserError(f"{path.name} says {key} is {found}, the checkpoint says {expected}")
    stored = {tensor.name: tensor for tensor in reader.tensors}
    held = Transformer(model.config).eval()
    for (name, wanted, heads), (_, own, _) in zip(named(model), named(held), strict=True):
        data = dequantize(stored[name].data, stored[name].tensor_type)
        weight = torch.from_numpy(np.array(data, np.float32)).view(wanted.shape)
        weight = halves(weight, heads) if heads else weight
        if is_other(weight, wanted, tensor_type(type_name, wanted)):
            raise UserError(f"{path.name} holds another {name} than the checkpoint")
        own.copy_(weight)
    return held


def shape_fields(shape: ModelConfig) -> dict[str, float]:
    """What the file must say of the model, by the names that the format gives."""
    return {
        "llama.vocab_size": shape.vocab_size,
        "llama.context_length": shape.max_position_embeddings,
        "llama.embedding_length": shape.hidden_size,
        "llama.feed_forward_length": shape.intermediate_size,
        "llama.block_count": shape.num_hidden_layers,
        "llama.attention.head_count": shape.num_attention_heads,
        "llama.attention.head_count_kv": shape.num_key_value_heads,
        "llama.attention.layer_norm_rms_epsilon": shape.rms_norm_eps,
        "llama.rope.dimension_count": shape.head_dim,
        "llama.rope.freq_base": shape.rope_theta,
    }


def is_other(weight: Tensor, wanted: Tensor, kind: GGMLQuantizationType) -> bool:
    """Whether a stored weight differs by more than rounding from what it should be."""
    floats = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    if kind.name in floats:
        return not torch.equal(weight, wanted.to(floats[kind.name]).float())
    blocks = wanted.unflatten(-1, (-1, Q8_BLOCK))
    step = blocks.abs().amax(-1, keepdim=True) / 127
    allowed = 0.6 * step + 4e-6  # half a step, and what the step loses in fp16
    return bool(((weight - wanted).unflatten(-1, (-1, Q8_BLOCK)).abs() > allowed).any())
