"""The rules of a tournament: `legacy/tournament.yaml`, validated in one go.

`legacy/tournament_small.yaml` is laid over it for the small one, and then what `--set
tournament.KEY=VALUE` says.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from hamner.errors import UserError, nearest
from hamner.recipe import (
    Count,
    Fraction,
    OptimizerPart,
    Part,
    Positive,
    Recipe,
    Whole,
    apply_override,
    merged,
    read_yaml,
)
from legacy.language_model import LanguageModelConfig, fitted
from legacy.variants import VariantConfig

FOLDER = Path(__file__).resolve().parent
PREFIX = "tournament."  # of overrides that are for the rules and not for the recipe


class RoundPart(Part):
    steps: Count  # more, on top of those before
    survivors: Count
    learning_rate: Positive
    warmup: Whole  # steps


class AdamPart(Part):
    """`OptimizerPart` without the learning rate, which is each round's own."""

    betas: tuple[Fraction, Fraction]
    eps: Positive
    weight_decay: Annotated[float, Field(ge=0)]
    clip: Positive

    def at(self, learning_rate: float) -> OptimizerPart:
        return OptimizerPart(learning_rate=learning_rate, **self.model_dump())


class VariantPart(Part):
    """A transformer's shape; see `legacy.variants.VariantConfig`."""

    title: str
    attention: Literal["dense", "differential"] = "dense"
    num_experts: Count = 1
    num_active_experts: Count = 1
    hidden_size: Count
    intermediate_size: Count
    num_hidden_layers: Count
    num_attention_heads: Count
    num_key_value_heads: Count

    @model_validator(mode="after")
    def _fits_together(self) -> VariantPart:
        VariantConfig(**self.shape())  # raises ValueError where it doesn't
        return self

    def shape(self) -> dict[str, Any]:
        return self.model_dump(exclude={"title"})


class ArchitecturePart(Part):
    """Another architecture: its config, whose layers are fitted to the winner's parameters."""

    title: str
    config: str  # "module:class", a subclass of `LanguageModelConfig`
    widths: list[str]  # fields that grow with the hidden size, from what the class says at its own
    options: dict[str, Any] = Field(default_factory=dict)  # other fields


class Rules(Part):
    shrink: Count = 1  # hidden and inner sizes and layers over this; heads and experts stay
    sequence_length: Count
    sequences_per_step: Count
    micro_batch: Count
    gradient_checkpointing: bool
    compile: bool
    held_out_sequences: Count
    load_balancing: Annotated[float, Field(ge=0)]
    optimizer: AdamPart
    log_every: Count
    validate_every: Count
    checkpoint_every: Count
    seeds: Count  # the recipe's, and those after it
    rounds: list[RoundPart] = Field(min_length=1)
    variants: dict[str, VariantPart] = Field(min_length=1)
    winner: str  # of the variants: whom the architectures meet if no tournament has told
    architectures: dict[str, ArchitecturePart]

    @model_validator(mode="after")
    def _fits_together(self) -> Rules:
        if self.validate_every % self.log_every:
            raise ValueError(
                f"validate_every ({self.validate_every}) must be a multiple of log_every "
                f"({self.log_every})"
            )
        if self.winner not in self.variants:
            raise ValueError(f"winner: no variant is called {self.winner!r}")
        for name, variant in self.variants.items():
            try:
                shrunk(variant, self.shrink)
            except ValueError as error:
                raise ValueError(f"variants.{name} with shrink {self.shrink}: {error}") from None
        return self


def load_rules(*, small: bool, overrides: Sequence[str] = ()) -> Rules:
    """The rules, with overrides such as `tournament.rounds[0].steps=60`.

    Raises:
        UserError: anything that doesn't hold; all at once.
    """
    raw = read_yaml(FOLDER / "tournament.yaml")
    where = "legacy/tournament.yaml"
    if small:
        raw = merged(raw, read_yaml(FOLDER / "tournament_small.yaml"))
        where = "legacy/tournament_small.yaml"
    for override in overrides:
        whole = {"tournament": raw}
        apply_override(whole, override)
        raw = whole["tournament"]
    try:
        return Rules.model_validate(raw)
    except ValidationError as error:
        problems = [f"{where}: {described(problem)}" for problem in error.errors()]
        raise UserError("\n       ".join(problems)) from None


def described(problem: Any) -> str:
    """One of pydantic's problems as `place: what is wrong`."""
    place = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in problem["loc"])
    place = place.removeprefix(".")
    if problem["type"] == "extra_forbidden":
        parts = (Rules, RoundPart, AdamPart, VariantPart, ArchitecturePart)
        known = [key for part in parts for key in part.model_fields]
        return f"{place}: unknown key{nearest(str(problem['loc'][-1]), known)}"
    if problem["type"] == "missing":
        return f"{place}: is missing"
    message = problem["msg"].removeprefix("Value error, ").replace("Input should", "must")
    return f"{place}: {message}" if place else message


def split_overrides(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """The overrides of the recipe, and those of the rules."""
    return (
        [text for text in overrides if not text.startswith(PREFIX)],
        [text for text in overrides if text.startswith(PREFIX)],
    )


# ------------------------------------------------------------------------------ who plays


@dataclass(frozen=True)
class Entrant:
    number: int  # in the field, whoever plays
    name: str
    title: str
    config: LanguageModelConfig

    @cached_property
    def parameters(self) -> int:
        return self.config.num_parameters()

    @property
    def active_parameters(self) -> int:
        """Those that a token meets."""
        if isinstance(self.config, VariantConfig):
            return self.config.active_parameters()
        return self.parameters


def shrunk(variant: VariantPart, factor: int) -> dict[str, Any]:
    """A variant's shape with sizes and layers divided; at least one layer stays.

    Raises:
        ValueError: a size is no multiple of the factor, or the heads don't fit any more.
    """
    shape = variant.shape()
    for key in ("hidden_size", "intermediate_size"):
        shape[key] = divided(shape[key], factor, key)
    shape["num_hidden_layers"] = max(1, shape["num_hidden_layers"] // factor)
    VariantConfig(**shape)
    return shape


def divided(size: int, factor: int, name: str) -> int:
    if size % factor:
        raise ValueError(f"{name} ({size}) is no multiple of it")
    return size // factor


def common_fields(recipe: Recipe, rules: Rules) -> dict[str, Any]:
    """What all entrants take from the recipe, and the length of a sequence."""
    return {
        "vocab_size": recipe.model.vocab_size,
        "rms_norm_eps": recipe.model.rms_norm_eps,
        "initializer_range": recipe.model.initializer_range,
        "max_position_embeddings": rules.sequence_length,
    }


def variant_entrant(name: str, recipe: Recipe, rules: Rules) -> Entrant:
    part = rules.variants[name]
    common = common_fields(recipe, rules)
    theta = recipe.model.rope_theta
    config = VariantConfig(**common, **shrunk(part, rules.shrink), rope_theta=theta)
    return Entrant(list(rules.variants).index(name), name, part.title, config)


def architecture_entrant(name: str, recipe: Recipe, rules: Rules, winner: Entrant) -> Entrant:
    """An architecture as wide as the winner, with as many parameters as it can have of them.

    Raises:
        UserError: the rules name no such config, or fields that it hasn't got or won't take.
    """
    part = rules.architectures[name]
    where = f"tournament.architectures.{name}"
    kind = config_class(part.config, where)
    own: dict[str, Any] = {field.name: field.default for field in fields(kind)}
    for key in [*part.widths, *part.options]:
        if key not in own:
            raise UserError(f"{where}: {kind.__name__} has no {key}{nearest(key, own)}")
    hidden = winner.config.hidden_size
    sizes = {key: round(own[key] * hidden / own["hidden_size"]) for key in part.widths}
    given = {**common_fields(recipe, rules), "hidden_size": hidden, **sizes, **part.options}
    try:
        config = fitted(kind(**given), winner.parameters)
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: {error}") from None
    return Entrant(1 + list(rules.architectures).index(name), name, part.title, config)


def config_class(text: str, where: str) -> type[LanguageModelConfig]:
    module, _, name = text.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        raise UserError(f"{where}.config: there is no {text!r}") from None
    if not (isinstance(found, type) and issubclass(found, LanguageModelConfig)):
        raise UserError(f"{where}.config: {text} is no config of a language model")
    return found
