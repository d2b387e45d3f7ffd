"""The model card of an export: README.md, of what the recipe, the checkpoint and the logs say.

Names, paths and prompts are anybody's text. In the card they stand in code spans that they can't
leave, in the YAML before it they are quoted by yaml itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import yaml

from hamner.errors import UserError
from hamner.export.hf_folder import CHAT_STAGES
from hamner.plots.metrics import Series, read_metrics
from hamner.recipe import (
    STAGES,
    AnySource,
    DPOStage,
    FileSource,
    GeneratorSource,
    HubSource,
    Recipe,
    SFTStage,
    StreamStage,
)
from hamner.stage import stage_sources
from model import ModelConfig


@dataclass(frozen=True)
class Exported:
    """What a card tells of."""

    recipe: Recipe
    stage: str
    step: int
    tokens: int  # of this stage, up to this step
    shape: ModelConfig
    dtype: str
    answers: dict[str, str]  # greedy ones, by prompt
    gguf: str | None = None  # name of the file beside it

    @property
    def talks(self) -> bool:
        return self.stage in CHAT_STAGES

    @property
    def stages(self) -> tuple[str, ...]:
        """Those that the model went through."""
        return STAGES[: STAGES.index(self.stage) + 1]


def model_card(exported: Exported) -> str:
    """The whole README.md."""
    parts = [
        front_matter(exported),
        introduction(exported),
        use(exported),
        examples(exported),
        architecture(exported),
        training(exported),
        data(exported),
        limits(exported),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def code(text: object) -> str:
    """Any text as a code span of one line."""
    line = " ".join(str(text).split()) or " "
    longest = max(map(len, re.findall(r"`+", line)), default=0)
    pad = " " if line.startswith("`") or line.endswith("`") else ""
    fence = "`" * (longest + 1)
    return f"{fence}{pad}{line}{pad}{fence}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
    )


def front_matter(exported: Exported) -> str:
    sources = [exported.recipe.sources[name] for name in used_sources(exported)]
    datasets = [source.dataset for source in sources if isinstance(source, HubSource)]
    fields: dict[str, object] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "gpl-3.0",
        "tags": ["llama", "conversational"] if exported.talks else ["llama"],
    }
    if datasets:
        fields["datasets"] = list(dict.fromkeys(datasets))
    return f"---\n{yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)}---"


def introduction(exported: Exported) -> str:
    return (
        f"# Chat Hamner: {code(exported.recipe.name)}\n\n"
        f"A language model of {exported.shape.num_parameters():,} parameters, trained from nothing "
        f"with recipe {code(exported.recipe.name)} of Chat Hamner, up to stage "
        f"{code(exported.stage)}, step {exported.step:,}. It is a Llama in form: the programs that "
        "run Llamas run it."
    )


# --------------------------------------------------------------------------- how to use it

TALK = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder, or its name on the hub
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
messages = [
{messages}
]
prompt = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
)
output = model.generate(**prompt)[0, prompt["input_ids"].shape[1] :]
print(tokenizer.decode(output, skip_special_tokens=True))"""

CONTINUE = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder, or its name on the hub
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
prompt = tokenizer({prompt}, return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt)[0], skip_special_tokens=True))"""


def use(exported: Exported) -> str:
    prompt = next(iter(exported.answers), "Hello!")
    if not exported.talks:
        sample = CONTINUE.format(prompt=repr(prompt))
        return f"## Have it continue a text\n\n```python\n{sample}\n```"
    messages = [{"role": "user", "content": prompt}]
    if exported.recipe.system_prompt:
        messages.insert(0, {"role": "system", "content": exported.recipe.system_prompt})
    sample = TALK.format(messages="\n".join(f"    {message!r}," for message in messages))
    served = "`transformers serve .` lets any OpenAI client talk to it"
    if exported.gguf:
        served += f", and llama.cpp runs the file beside: `llama-server -m {exported.gguf}`"
    return f"## Talk to it\n\n```python\n{sample}\n```\n\n{served}."


def examples(exported: Exported) -> str:
    rows = [[code(prompt), code(answer)] for prompt, answer in exported.answers.items()]
    title = "What it answers, always taking the likeliest token"
    return f"## {title}\n\n{table(['prompt', 'answer'], rows)}" if rows else ""


# --------------------------------------------------------------------------- how it was made


def architecture(exported: Exported) -> str:
    shape = exported.shape
    rows = [
        ["parameters", f"{shape.num_parameters():,}"],
        ["layers", f"{shape.num_hidden_layers}"],
        ["hidden size", f"{shape.hidden_size:,}"],
        ["MLP (SwiGLU)", f"{shape.intermediate_size:,}"],
        ["query heads", f"{shape.num_attention_heads}"],
        ["key/value heads", f"{shape.num_key_value_heads}"],
        ["head size", f"{shape.head_dim}"],
        ["vocabulary", f"{shape.vocab_size:,}"],
        ["context", f"{shape.max_position_embeddings:,} tokens"],
        ["RoPE theta", f"{shape.rope_theta:g}"],
        ["embeddings", "tied with the head" if shape.tie_word_embeddings else "not tied"],
        ["stored as", exported.dtype],
    ]
    return f"## What it is\n\n{table(['', ''], rows)}"


def training(exported: Exported) -> str:
    header = ["stage", "steps", "tokens", "training loss", "validation loss"]
    rows = [stage_row(exported, stage) for stage in exported.stages]
    unit = "nats per token" + (", of `dpo` its loss per pair" if "dpo" in exported.stages else "")
    return (
        f"## How it was trained\n\n{table(header, rows)}\n\n"
        f"Losses are the last ones logged ({unit}); validation is on held-out text of the stage's "
        "own data. Where there is a dash, no log was at hand."
    )


def stage_row(exported: Exported, stage: str) -> list[str]:
    """Steps, tokens and losses of a stage as its log has them, up to the checkpoint's step."""
    own = stage == exported.stage
    steps, tokens = (float(exported.step), float(exported.tokens)) if own else (None, None)
    losses: list[float | None] = [None, None]
    try:
        metrics = read_metrics(exported.recipe.log(stage, "metrics.csv"))
    except UserError:  # not a table of metrics
        metrics = None
    if metrics is not None:
        limit = exported.step if own else metrics.step
        logged, *rest = (
            last_until(metrics.series(name), limit) for name in ("tokens_total", "loss", "val_loss")
        )
        if not own:
            steps, tokens = float(metrics.step), logged
        if logged is not None and tokens is not None and logged <= tokens:  # else another run's
            losses = rest
    counts = ["-" if count is None else f"{count:,.0f}" for count in (steps, tokens)]
    return [code(stage), *counts, *("-" if loss is None else f"{loss:.3g}" for loss in losses)]


def last_until(series: Series, step: int) -> float | None:
    """A series' last finite value at this step or before it."""
    values = series.where(series.x <= step).finite().y
    return float(values[-1]) if len(values) else None


def used_sources(exported: Exported) -> list[str]:
    """The sources of all stages that the model went through."""
    names = (name for stage in exported.stages for name in stage_sources(exported.recipe, stage))
    return list(dict.fromkeys(names))


def data(exported: Exported) -> str:
    rows = [
        [code(stage), code(name), share, described(exported.recipe.sources[name])]
        for stage in exported.stages
        for name, share in shares(exported.recipe, stage)
    ]
    header = ["stage", "source", "share", "what it is"]
    return f"## What it was trained on\n\n{table(header, rows)}"


def shares(recipe: Recipe, stage: str) -> list[tuple[str, str]]:
    """How much of each source a stage takes."""
    part = recipe.stage(stage)
    if isinstance(part, StreamStage):
        return [(source.name, f"{source.weight:.0%}") for source in part.sources]
    if isinstance(part, SFTStage):
        return [
            (s.name, (f"{s.at_most:,} conversations" if s.at_most else "all") + times(s.repeat))
            for s in part.data.sources
        ]
    assert isinstance(part, DPOStage)
    return [(part.train, f"up to {part.max_pairs:,} pairs")]


def times(repeat: int) -> str:
    return f", {repeat} times an epoch" if repeat > 1 else ""


def described(source: AnySource) -> str:
    """Where a source's documents come from."""
    if isinstance(source, HubSource):
        parts = [source.dataset, source.config, source.data_dir, source.split, source.revision]
        return "on the Hugging Face hub: " + ", ".join(code(part) for part in parts if part)
    if isinstance(source, FileSource):
        return "files: " + ", ".join(map(code, source.paths))
    if isinstance(source, GeneratorSource):
        return f"made by the program {code(source.function)}"
    return f"{source.content} in the Python packages of the machine that trained it"


def limits(exported: Exported) -> str:
    recipe, context = exported.recipe, exported.shape.max_position_embeddings
    points = [
        f"It sees {context:,} tokens, prompt and answer together; what is longer, it wasn't "
        "trained for.",
        "The losses above are all that this card knows of its quality. It says what is likely "
        "after its data, true or not.",
        "A message that spells a control token, such as `<|im_end|>`, is text to the chat template "
        "and forges no turn. A bare `tokenizer(text)` does take it for the token, as in every "
        "model; `split_special_tokens=True` prevents it.",
    ]
    if not exported.talks:
        points.append(f"Stage {code(exported.stage)} comes before conversations: it has seen none.")
    if recipe.sampling.repetition_penalty > 1:
        points.append(
            f"Chat Hamner itself samples with a repetition penalty of "
            f"{recipe.sampling.repetition_penalty:g} over the answer. It is not in "
            "`generation_config.json`, as transformers' would look at the prompt too, and penalise "
            "the `<|im_end|>` of earlier turns."
        )
    if exported.gguf:
        points.append(
            "The template in the GGUF file puts a space behind the first character of a control "
            "token that a message spells. A program with a template of its own lacks this."
        )
    listed = "\n".join(f"- {point}" for point in points)
    licence = "The code that trained it is under GPL-3.0. The data sets have licences of their own."
    return f"## Limits\n\n{listed}\n\n## Licence\n\n{licence}"
