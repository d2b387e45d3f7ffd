"""The numbers of the concept experiments: `legacy/concepts.yaml`, validated in one go."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, ValidationError, model_validator

from hamner.errors import UserError, nearest
from hamner.recipe import (
    Count,
    Fraction,
    OptimizerPart,
    Part,
    Positive,
    SchedulePart,
    apply_override,
    merged,
    read_yaml,
)
from legacy.concepts import COMPOSITIONS, MAKERS, concept

FILE = Path(__file__).resolve().parent / "concepts.yaml"
NAME = f"legacy/{FILE.name}"


def known(name: str) -> str:
    if name not in MAKERS:
        raise ValueError(f"no concept is called {name!r}{nearest(name, MAKERS)}")
    return name


def known_composition(name: str) -> str:
    if name not in COMPOSITIONS:
        raise ValueError(f"no composition is called {name!r}{nearest(name, COMPOSITIONS)}")
    return name


def each_once(names: list[str]) -> list[str]:
    if len(set(names)) < len(names):
        raise ValueError(f"a name stands there twice: {', '.join(names)}")
    return names


Name = Annotated[str, AfterValidator(known)]
Names = Annotated[list[Name], Field(min_length=1), AfterValidator(each_once)]
Chain = Annotated[list[Name], Field(min_length=2), AfterValidator(each_once)]
Pair = Annotated[list[Name], Field(min_length=2, max_length=2), AfterValidator(each_once)]
CompositionName = Annotated[str, AfterValidator(known_composition)]


class RatesPart(Part):
    concepts: Names
    values: list[Positive] = Field(min_length=1)


class MultiPart(Part):
    concepts: Chain
    steps: Count


class ScalingPart(Part):
    facts: list[Count] = Field(min_length=1)
    steps_per_fact: Count  # or the usual steps, if those are more


class CurriculumPart(Part):
    chain: Chain
    replay_share: Fraction


class Settings(Part):
    seeds: Count
    items_per_step: Count
    row_length: Count
    steps: Count
    schedule: SchedulePart
    measure_every: Count
    optimizer: OptimizerPart
    loss: Names
    rates: RatesPart
    chains: list[Pair] = Field(min_length=1)
    multi: MultiPart
    generalisation: Names
    composition: list[CompositionName] = Field(min_length=1)
    forgetting: Chain
    replay_share: Fraction
    scaling: ScalingPart
    curriculum: CurriculumPart

    @model_validator(mode="after")
    def _facts_are_there(self) -> Settings:
        most = len(concept("capitals", 0).train)  # whatever the seed
        if max(self.scaling.facts) > most:
            raise ValueError(f"scaling.facts: there are {most} facts to learn, no more")
        return self


def load_settings(*, small: bool, overrides: Sequence[str] = ()) -> Settings:
    """The numbers, with overrides such as `optimizer.learning_rate=0.001`.

    Raises:
        UserError: anything that doesn't hold; all at once.
    """
    raw = read_yaml(FILE)
    return check_settings(merged(raw["full"], raw["small"] if small else {}), overrides)


def check_settings(raw: dict[str, Any], overrides: Sequence[str] = ()) -> Settings:
    for override in overrides:
        apply_override(raw, override)
    try:
        return Settings.model_validate(raw)
    except ValidationError as error:
        problems = [f"{NAME}: {described(problem)}" for problem in error.errors()]
        raise UserError("\n       ".join(problems)) from None


def described(problem: Any) -> str:
    """One of pydantic's problems as `place: what is wrong`."""
    place = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in problem["loc"])
    place = place.removeprefix(".")
    if problem["type"] == "extra_forbidden":
        return f"{place}: unknown key{nearest(str(problem['loc'][-1]), known_keys())}"
    if problem["type"] == "missing":
        return f"{place}: is missing"
    message = problem["msg"].removeprefix("Value error, ").replace("Input should", "must")
    return f"{place}: {message}" if place else message


def known_keys() -> Iterable[str]:
    parts = (
        Settings,
        OptimizerPart,
        SchedulePart,
        RatesPart,
        MultiPart,
        ScalingPart,
        CurriculumPart,
    )
    return [key for part in parts for key in part.model_fields]
