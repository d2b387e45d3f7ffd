"""A checkpoint as the files of a Hugging Face folder, for programs that have none of our code.

Weights and config keep their names, which are `LlamaForCausalLM`'s already. What takes thought is
text: transformers renders a conversation into one string and then looks for control tokens in it,
so that a message could forge a turn by spelling one. Here the template puts BREAK behind the first
character of each control token that a message spells. The tokenizer looks for control tokens first
and takes BREAK out afterwards, and so arrives at the ids of `Tokenizer.chat`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hamner.errors import UserError, first_line
from hamner.files import write_text_whole
from hamner.recipe import SamplingPart
from hamner.tokenization import CHAT_TEMPLATE, END_OF_TEXT, IM_END, ROLES, Tokenizer
from model import ModelConfig, Transformer

BREAK = "\ufdd0"  # a code point that Unicode keeps out of texts, for a program's own use
WEIGHTS = "model.safetensors"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CHAT_STAGES = ("chat", "sft", "dpo")


def write_folder(
    folder: Path,
    model: Transformer,
    tokenizer: Tokenizer,
    stage: str,
    sampling: SamplingPart,
    dtype: torch.dtype,
) -> None:
    """Write weights, config, tokenizer, chat template and generation config into a folder.

    Raises:
        UserError: a weight isn't finite in this dtype.
        OSError: the folder can't be written to.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(weights(model, dtype), folder / WEIGHTS, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(first_line(error)) from None
    end = end_token(stage)
    files = {
        "config.json": config(model.config, tokenizer, dtype),
        "generation_config.json": generation_config(tokenizer, sampling),
        "tokenizer.json": tokenizer_json(tokenizer),
        "tokenizer_config.json": tokenizer_config(model.config, end),
        "special_tokens_map.json": special_tokens(end),
    }
    for name, content in files.items():
        write_text_whole(folder / name, [json.dumps(content, ensure_ascii=False, indent=2), "\n"])
    template = chat_template(control_tokens(tokenizer), BREAK)
    write_text_whole(folder / "chat_template.jinja", [template])
    (folder / WEIGHTS).chmod((folder / "config.json").stat().st_mode)  # safetensors makes it 0600


def weights(model: Transformer, dtype: torch.dtype) -> dict[str, Tensor]:
    """The model's tensors in a dtype; tied ones once, as `from_pretrained` expects.

    Raises:
        UserError: a weight is or becomes infinite.
    """
    tensors = {name: tensor.detach().to(dtype) for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            advice = ": try --dtype bfloat16" if dtype == torch.float16 else ""
            raise UserError(f"{name} isn't finite in {dtype_name(dtype)}{advice}")
    return tensors


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def config(shape: ModelConfig, tokenizer: Tokenizer, dtype: torch.dtype) -> dict[str, Any]:
    """config.json. RoPE and dtype stand there twice: for transformers 5, and for 4."""
    # No pad_token_id: LlamaForCausalLM would never again train the embedding of that token.
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **asdict(shape),
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "bos_token_id": tokenizer.end_of_text,
        "eos_token_id": [tokenizer.im_end, tokenizer.end_of_text],
        "dtype": dtype_name(dtype),
        "torch_dtype": dtype_name(dtype),
        "use_cache": True,
    }


def generation_config(tokenizer: Tokenizer, sampling: SamplingPart) -> dict[str, Any]:
    """generation_config.json: where an answer ends, and the recipe's sampling.

    The recipe's repetition penalty is left out. Ours looks at the answer alone; transformers' looks
    at the prompt too, `<|im_end|>` included, and changes greedy answers as well.
    """
    chosen: dict[str, Any] = {"do_sample": False}
    if sampling.temperature > 0:
        chosen = {
            "do_sample": True,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p or None,
        }
    return {
        "bos_token_id": tokenizer.end_of_text,
        "eos_token_id": [tokenizer.im_end, tokenizer.end_of_text],
        "pad_token_id": tokenizer.end_of_text,
        **chosen,
        "max_new_tokens": sampling.max_new_tokens,
    }


def end_token(stage: str) -> str:
    """What ends a text of a model of this stage: an answer, or a document."""
    return IM_END if stage in CHAT_STAGES else END_OF_TEXT


def special_tokens(end: str) -> dict[str, str]:
    """Every document was trained after an `<|endoftext|>`: it begins a text, but isn't added."""
    return {"bos_token": END_OF_TEXT, "eos_token": end, "pad_token": END_OF_TEXT}


def tokenizer_config(shape: ModelConfig, end: str) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",  # it takes tokenizer.json as it is
        **special_tokens(end),
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": shape.max_position_embeddings,
        "padding_side": "left",
    }


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """tokenizer.json, which takes BREAK out of a text once it has looked for control tokens."""
    content = json.loads(tokenizer.to_json())
    unbreak = {"type": "Replace", "pattern": {"String": BREAK}, "content": ""}
    before = content["normalizer"]
    content["normalizer"] = (
        {"type": "Sequence", "normalizers": [unbreak, before]} if before else unbreak
    )
    for token in content["added_tokens"]:
        if token["special"]:
            token["normalized"] = False  # looked for before the normalizer runs, and not after
    return content


def control_tokens(tokenizer: Tokenizer) -> list[str]:
    """The spellings of all control tokens, in the order of their ids."""
    added = sorted(json.loads(tokenizer.to_json())["added_tokens"], key=lambda token: token["id"])
    return [token["content"] for token in added if token["special"]]


def chat_template(tokens: Iterable[str], mark: str) -> str:
    """CHAT_TEMPLATE, refusing what `Tokenizer.chat` refuses, with contents that forge nothing.

    In contents, `mark` comes behind the first character of each of the tokens.
    """
    begin, text = "{% for message in messages %}", "message['content'] | trim"
    roles = ", ".join(ROLES)
    checks = (
        f"{{% if message['role'] not in {list(ROLES)} %}}"
        f"{{{{ raise_exception('the role of a message must be one of {roles}') }}}}{{% endif %}}"
        "{% if message['content'] is not string %}"
        "{{ raise_exception('the content of a message must be text') }}{% endif %}"
    )
    shield = "".join(
        f" | replace({quoted(token)}, {quoted(token[0] + mark + token[1:])})" for token in tokens
    )
    content = f"{{% set content = {text}{shield} %}}"
    return CHAT_TEMPLATE.replace(text, "content").replace(begin, begin + checks + content)


def without_generation_marks(template: str) -> str:
    """A template for programs that don't know transformers' `{% generation %}`."""
    return re.sub(r"{% (end)?generation %}", "", template)


def quoted(text: str) -> str:
    """As a string of Jinja."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
