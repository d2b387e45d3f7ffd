"""Recipes: a YAML file with every number of the five stages, validated in one go.

`load_recipe` reads the file, lays `--set` overrides over it and checks all of it with pydantic.
All problems are reported at once, each with its place and, for a misspelt key, the nearest right
one. The hyper-parameters have no defaults here: they stand in the recipe and nowhere else.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from hamner.errors import UserError, nearest
from model import ModelConfig

RECIPE_FOLDER = Path(__file__).resolve().parent.parent / "recipes"
STAGES = ("base", "anneal", "chat", "sft", "dpo")

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Whole = Annotated[int, Field(ge=0)]
Switch = Literal["auto", True, False]  # no union: of that each part complains on its own


class Part(BaseModel):
    """Base of every piece of a recipe: unknown keys are refused, values are fixed once read."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class ModelPart(Part):
    """The model's shape, in Hugging Face Llama's names; see `model.ModelConfig`."""

    vocab_size: Count
    hidden_size: Count
    intermediate_size: Count
    num_hidden_layers: Count
    num_attention_heads: Count
    num_key_value_heads: Count
    max_position_embeddings: Count
    rope_theta: Positive
    rms_norm_eps: Positive
    initializer_range: Positive
    tie_word_embeddings: bool

    @model_validator(mode="after")
    def _fits_together(self) -> ModelPart:
        self.config()  # raises ValueError where the heads don't divide the hidden size
        return self

    def config(self) -> ModelConfig:
        return ModelConfig(**self.model_dump())


class TrainedTokenizer(Part):
    """A byte-level BPE trained on the beginnings of some of the recipe's sources."""

    train_on: list[str] = Field(min_length=1)
    vocab_size: Count
    characters: Count  # so many of each source, at least


class TokenizerPart(Part):
    """Exactly one of: a hub repository, a local tokenizer.json (or its folder), a training."""

    hub: str | None = None
    path: str | None = None
    train: TrainedTokenizer | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> TokenizerPart:
        if sum(value is not None for value in (self.hub, self.path, self.train)) != 1:
            raise ValueError("give exactly one of hub, path and train")
        return self


class SourcePart(Part):
    """What every source of documents has. Streams are read in blocks whose order is shuffled."""

    column: str = "text"  # holds a string, or a list of {"role", "content"} messages
    min_characters: Whole = 1  # shorter documents are left out
    shuffle_block: Count = 1_000  # so many documents are shuffled among themselves


class HubSource(SourcePart):
    kind: Literal["hub"]
    dataset: str
    config: str | None = None
    split: str
    data_dir: str | None = None
    revision: str | None = None  # a branch, tag or commit; None is what stands on the hub now


class FileSource(SourcePart):
    kind: Literal["files"]
    paths: list[str] = Field(min_length=1)  # globs below the folder
    folder: str | None = None  # default: the recipe's data_dir


class GeneratorSource(SourcePart):
    kind: Literal["generator"]
    function: str  # "module:function", called as function(rng, **options)
    options: dict[str, Any] = Field(default_factory=dict)


class PackagesSource(SourcePart):
    kind: Literal["packages"]
    content: Literal["prose", "code"]


AnySource = Annotated[
    Union[HubSource, FileSource, GeneratorSource, PackagesSource],
    Field(discriminator="kind"),
]


class OptimizerPart(Part):
    """AdamW's numbers, and the momentum of Muon, which takes the other three from AdamW."""

    kind: Literal["adamw", "muon"] = "adamw"
    learning_rate: Positive
    embedding_rate: Positive = 1.0  # times learning_rate, for the embedding and a head tied to it
    betas: tuple[Fraction, Fraction]
    eps: Positive
    weight_decay: Annotated[float, Field(ge=0)]  # on matrices only
    embedding_weight_decay: Annotated[float, Field(ge=0)] | None = None  # None is weight_decay
    clip: Positive  # global gradient norm
    momentum: Fraction = 0.95  # muon only


class SchedulePart(Part):
    """Learning rate over the steps: linear warm-up, then one of the kinds; see `hamner.optim`."""

    kind: Literal["wsd", "linear", "cosine"]
    warmup: Whole
    decay: Whole = 0  # wsd only: how many of the last steps decay
    decay_type: Literal["linear", "1-sqrt"] = "linear"  # wsd only
    floor: Fraction  # of the peak, where the decay ends


class SamplingPart(Part):
    temperature: Annotated[float, Field(ge=0)]  # 0 is greedy
    top_k: Whole  # 0 is off
    top_p: Annotated[float, Field(gt=0, le=1)]
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0  # 0 is off
    repetition_penalty: Annotated[float, Field(ge=1)]
    max_new_tokens: Count


class CheckpointPart(Part):
    every: Count
    keep_last: Count  # so many of the newest step files stay
    keep_every: Whole = 0  # and every multiple of this; 0 for none


class WeightedSource(Part):
    name: str
    weight: Positive


class StagePart(Part):
    """What every stage has."""

    folder: str | None = None  # default: checkpoints/<recipe>/<stage>
    log: str | None = None  # default: logs/<recipe>/<stage>
    sequence_length: Count
    micro_batch: Count  # sequences (DPO: pairs) in one forward pass
    optimizer: OptimizerPart
    schedule: SchedulePart
    log_every: Count
    validate_every: Count
    sample_every: Count
    prompts: list[str]
    checkpoint: CheckpointPart


class StreamStage(StagePart):
    """Stages 1 to 3: a weighted mix of document streams, for a number of steps."""

    steps: Whole
    sequences_per_step: Count
    validation_sequences: Count  # per source
    sources: list[WeightedSource] = Field(min_length=1)

    @model_validator(mode="after")
    def _weights_hold(self) -> StreamStage:
        total = sum(source.weight for source in self.sources)
        if abs(total - 1) > 1e-6:
            raise ValueError(f"the weights of sources must sum to 1, they sum to {total:g}")
        names = [source.name for source in self.sources]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"sources: {', '.join(twice)} stands there twice: add the weights up")
        return self


class SFTSource(Part):
    name: str  # of the recipe's sources
    label: str  # what its conversations are called in the prepared file
    at_most: Count | None = None  # conversations kept; None keeps all
    repeat: Count  # how often an epoch shows each of them
    min_characters: Count = 1  # of a whole conversation
    max_characters: Count | None = None
    chained: Whole = 0  # conversations on top, each of several of its single questions
    chained_turns: Annotated[int, Field(ge=2)] = 10  # of each at most


class SFTDataPart(Part):
    """What `prepare_sft_data.py` gathers, and where it puts it."""

    folder: str  # train.jsonl and validation.jsonl
    sources: list[SFTSource] = Field(min_length=1)


class EpochStage(StagePart):
    epochs: Count
    steps: Count | None = None  # stop after so many; None: when the epochs are through
    patience: Count | None = None  # validations without a new best before stopping early


class SFTStage(EpochStage):
    sequences_per_step: Count  # packed rows
    data: SFTDataPart


class DPOStage(EpochStage):
    pairs_per_step: Count
    max_pairs: Count
    loss: Literal["sigmoid", "ipo"]
    beta: Positive
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)]  # sigmoid only: share of wrong labels
    sft_weight: Annotated[float, Field(ge=0)]  # of the chosen answers' loss per token; 0 is off
    train: str  # names of the recipe's sources
    validation: str
    validation_pairs: Count

    @model_validator(mode="after")
    def _smoothing_has_a_use(self) -> DPOStage:
        if self.loss == "ipo" and self.label_smoothing:
            raise ValueError("label_smoothing goes with loss: sigmoid; set it to 0 for loss: ipo")
        return self


class Recipe(Part):
    """A whole recipe, all five stages."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    seed: Whole
    model: ModelPart
    tokenizer: TokenizerPart
    precision: Literal["auto", "fp16", "bf16", "fp32"]
    compile: Switch
    gradient_checkpointing: Switch
    parallel: Literal["ddp", "fsdp"] = "ddp"  # how several GPUs share a model; see the README
    lanes: Count = 1  # each source is dealt into so many parts, for GPUs to share out
    data_dir: str = "."
    mirror: str | None = None  # folder with copies of hub data sets, as owner/name/files
    token_cache: str | None = None  # folder that keeps what was tokenised, for the next run
    read_ahead: Count = 100_000  # tokens of each source that are made ready in the background
    held_out_fraction: Annotated[float, Field(gt=0, lt=1)]  # of each source's documents
    system_prompt: str
    sampling: SamplingPart
    sources: dict[str, AnySource]
    base: StreamStage
    anneal: StreamStage
    chat: StreamStage
    sft: SFTStage
    dpo: DPOStage

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        problems = [*self._unknown_sources(), *self._long_sequences(), *self._uneven_lanes()]
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _unknown_sources(self) -> list[str]:
        named = [
            (f"{stage}.sources[{i}].name", source.name)
            for stage in ("base", "anneal", "chat")
            for i, source in enumerate(self.stage(stage).sources)  # type: ignore[attr-defined]
        ]
        named += [
            (f"sft.data.sources[{i}].name", s.name) for i, s in enumerate(self.sft.data.sources)
        ]
        named += [("dpo.train", self.dpo.train), ("dpo.validation", self.dpo.validation)]
        if self.tokenizer.train:
            named += [("tokenizer.train.train_on", name) for name in self.tokenizer.train.train_on]
        return [
            f"{where}: no source is called {name!r}{nearest(name, self.sources)}"
            for where, name in named
            if name not in self.sources
        ]

    def _long_sequences(self) -> list[str]:
        limit = self.model.max_position_embeddings
        return [
            f"{stage}.sequence_length ({self.stage(stage).sequence_length}) must not exceed "
            f"model.max_position_embeddings ({limit})"
            for stage in STAGES
            if self.stage(stage).sequence_length > limit
        ]

    def _uneven_lanes(self) -> list[str]:
        return [
            f"{stage}.sequences_per_step ({each}) must be a multiple of lanes ({self.lanes})"
            for stage in ("base", "anneal", "chat")
            if (each := self.stage(stage).sequences_per_step) % self.lanes  # type: ignore[attr-defined]
        ]

    def stage(self, name: str) -> StagePart:
        return getattr(self, name)

    def folder(self, stage: str) -> Path:
        """Where a stage's checkpoints lie."""
        return Path(self.stage(stage).folder or f"checkpoints/{self.name}/{stage}")

    def log(self, stage: str, ending: str) -> Path:
        """A stage's log file, such as ending 'metrics.csv'."""
        return Path(f"{self.stage(stage).log or f'logs/{self.name}/{stage}'}_{ending}")


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe by name (`v4`) or path, with overrides such as `anneal.steps=100`.

    Raises:
        UserError: no such file, not YAML, or anything in it that doesn't hold; all at once.
    """
    path = find_recipe(name_or_path)
    raw = read_yaml(path)
    for override in overrides:
        apply_override(raw, override)
    return check_recipe(raw, str(path))


def check_recipe(raw: dict[str, Any], where: str) -> Recipe:
    """Validate a recipe given as plain data; `where` names it in errors."""
    if not isinstance(raw.get("common") or {}, dict):
        raise UserError(f"{where}: common: must be a mapping of keys to values")
    try:
        return Recipe.model_validate(spread_common(raw))
    except ValidationError as error:
        problems = [f"{where}: {describe(problem, raw)}" for problem in error.errors()]
        raise UserError("\n       ".join(dict.fromkeys(problems))) from None


def find_recipe(name_or_path: str) -> Path:
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        path = RECIPE_FOLDER / f"{name_or_path}.yaml"
    if not path.is_file():
        names = sorted(p.stem for p in RECIPE_FOLDER.glob("*.yaml"))
        raise UserError(
            f"no recipe {name_or_path!r}{nearest(name_or_path, names)}: "
            f"give one of {', '.join(names)}, or the path of a .yaml file"
        )
    try:
        return path.relative_to(Path.cwd())
    except ValueError:
        return path


def read_yaml(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: a recipe is a mapping of keys to values, this is not")
    return unshared(raw)


def unshared(data: Any) -> Any:
    """The data without YAML's & and *: no part of it is the same object as another."""
    if isinstance(data, dict):
        return {key: unshared(value) for key, value in data.items()}
    return [unshared(value) for value in data] if isinstance(data, list) else data


def spread_common(raw: dict[str, Any]) -> dict[str, Any]:
    """Lay the stages over `common`: what several share need not be said several times.

    A stage takes the fields that it has; a key that no stage has goes to all, to be refused.
    """
    common = raw.get("common") or {}
    rest = {key: value for key, value in raw.items() if key != "common"}
    own = {stage: set(_stage_type(stage).model_fields) for stage in STAGES}
    known = set().union(*own.values())
    for stage in STAGES:
        if isinstance(rest.get(stage), dict) and isinstance(common, dict):
            shared = {k: v for k, v in common.items() if k in own[stage] or k not in known}
            rest[stage] = merged(shared, rest[stage])
    return rest


def _stage_type(stage: str) -> type[StagePart]:
    annotation = Recipe.model_fields[stage].annotation
    assert annotation is not None and issubclass(annotation, StagePart)
    return annotation


def merged(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    result = dict(under)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if both else value
    return result


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Change raw in place by one KEY=VALUE, such as `base.sources[0].weight=0.5`."""
    key, equals, text = override.partition("=")
    steps: list[str | int] = [
        int(part[1:-1]) if part.startswith("[") else part
        for part in re.findall(r"\[\d+\]|[^.\[\]]+", key)
    ]
    if not equals or not steps or "".join(map(str, steps)) != re.sub(r"[.\[\]]", "", key):
        raise UserError(f"--set {override}: write KEY=VALUE, such as anneal.steps=100")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"--set {override}: {text!r} is not a YAML value") from None
    place: Any = raw
    for number, (step, following) in enumerate(itertools.pairwise(steps)):
        place = _descend(place, step, following, override, known_keys(steps[:number]))
    if isinstance(place, list) and not (isinstance(steps[-1], int) and steps[-1] < len(place)):
        raise UserError(f"--set {override}: there is no {steps[-1]!r} in this list of {len(place)}")
    place[steps[-1]] = value


def _descend(
    place: Any, step: str | int, following: str | int, override: str, known: list[str]
) -> Any:
    if isinstance(place, list) and isinstance(step, int) and step < len(place):
        return place[step]
    if isinstance(place, dict) and isinstance(step, str):
        if step not in place and isinstance(following, str):
            place[step] = {}  # laid over `common`, or an unknown key that validation will name
        if isinstance(place.get(step), (dict, list)):
            return place[step]
    if isinstance(place, list):
        raise UserError(f"--set {override}: there is no [{step}] in a list of {len(place)}")
    guess = nearest(step, known) if isinstance(step, str) and step not in known else ""
    raise UserError(f"--set {override}: there is nothing below {step!r}{guess}")


def describe(problem: Any, raw: dict[str, Any]) -> str:
    """One of pydantic's problems as `place: what is wrong`."""
    location = list(problem["loc"])
    if location[:1] == ["sources"]:
        del location[2:3]  # pydantic names the kind of source there
    if (
        len(location) > 1
        and location[0] in STAGES
        and not _has(raw, location)
        and _has(raw, ["common", *location[1:]])
    ):
        location[0] = "common"
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    place = place.removeprefix(".") or "recipe"
    if problem["type"] == "extra_forbidden":
        return f"{place}: unknown key{nearest(str(location[-1]), known_keys(location[:-1]))}"
    if problem["type"] == "missing":
        return f"{place}: is missing"
    message = problem["msg"].removeprefix("Value error, ")
    message = message.replace("Input should be", "must be").replace(
        "greater than or equal to", ">="
    )
    message = message.replace("less than or equal to", "<=")
    message = message.replace("greater than", ">").replace("less than", "<")
    if isinstance(problem["input"], (dict, list, BaseModel)):
        return f"{place}: {message}" if place != "recipe" else message
    return f"{place}: {message}, got {problem['input']!r}"


def _has(raw: Any, location: Sequence[str | int]) -> bool:
    for step in location:
        try:
            raw = raw[step]
        except (KeyError, IndexError, TypeError):
            return False
    return True


def known_keys(location: Sequence[str | int]) -> list[str]:
    """The keys that are allowed at a place in the recipe."""
    parts: list[type[BaseModel]] = [Recipe]
    if location[:1] == ["common"]:
        parts, location = [_stage_type(stage) for stage in STAGES], location[1:]
    for step in location:
        if isinstance(step, int):
            continue
        fields = [part.model_fields[step] for part in parts if step in part.model_fields]
        parts = [inner for field in fields for inner in _parts_in(field.annotation)] or parts
    return sorted({key for part in parts for key in part.model_fields} | {"common"})


def _parts_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [part for inner in getattr(annotation, "__args__", ()) for part in _parts_in(inner)]
