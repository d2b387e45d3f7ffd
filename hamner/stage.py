"""What the five stage scripts share: command line, checkpoints in and out, tokenizer, model."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hamner import checkpoints, tokenization
from hamner.batches import (
    Batch,
    MixedBatches,
    TokenStream,
    held_out_sequences,
    lanes_of,
)
from hamner.errors import UserError
from hamner.machine import Machine, free_memory, join, leave, pick_device, precision_on
from hamner.plan import fits_without_checkpointing, print_plan
from hamner.recipe import STAGES, DPOStage, HubSource, Recipe, SFTStage, StreamStage, load_recipe
from hamner.sources import DocumentStream, open_stream, source_problems
from hamner.token_cache import TokenCache
from hamner.tokenization import Tokenizer
from hamner.tracking import check_tensorboard
from hamner.training import Task, Trainer, Validation, language_modelling
from model import Transformer

BEFORE = {"anneal": "base", "chat": "anneal", "sft": "chat", "dpo": "sft"}
COMMANDS = {
    "base": "python train_pretrain.py --fresh",
    "anneal": "python train_pretrain.py --stage anneal",
    "chat": "python train_chat_pretrain.py",
    "prepare": "python prepare_sft_data.py",
    "sft": "python train_sft.py",
    "dpo": "python train_dpo.py",
}


def stage_parser(description: str | None) -> argparse.ArgumentParser:
    """The options that every stage script takes."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="v4", help="name in recipes/, or path (default: v4)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
        help="change a field of the recipe, such as anneal.steps=100; repeatable",
    )  # fmt: skip
    parser.add_argument("--fresh", action="store_true", help="begin anew; moves the old run aside")
    parser.add_argument("--checkpoint", type=Path, help="start from this file")
    parser.add_argument("--steps", type=int, help="stop after so many steps in all")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    parser.add_argument(
        "--tensorboard", action="store_true", help="write for TensorBoard too, beside the metrics"
    )
    parser.add_argument(
        "--plan", nargs="?", const="here", metavar="GPU",
        help="print what a run would take, here or on a GPU such as rtx3090 or h100, and stop",
    )  # fmt: skip
    parser.add_argument("--gpus", type=int, metavar="N", help="with --plan GPU: on so many of them")
    return parser


def stage_recipe(arguments: argparse.Namespace, stage: str) -> Recipe:
    overrides = list(arguments.overrides)
    if arguments.steps is not None:
        overrides.append(f"{stage}.steps={arguments.steps}")
    return load_recipe(arguments.recipe, overrides)


@dataclass
class Start:
    """Where a stage begins: its model and tokenizer, and what it goes on from, if anything."""

    stage: str
    recipe: Recipe
    recipe_name: str  # as it was typed: a name or a path
    machine: Machine
    model: Transformer
    tokenizer: Tokenizer
    resume: checkpoints.Checkpoint | None  # a checkpoint of this very stage
    previous: checkpoints.Checkpoint | None  # one of the stage before
    fresh: bool = False  # an earlier run of this stage makes way
    tensorboard: Path | None = None  # folder for what TensorBoard reads

    def run(self, task: Task, inherit: dict[str, Any] | None = None) -> int:
        """Train the task to its end; returns the exit code.

        An earlier run is moved aside only here, when all that a new one needs has been found.
        """
        self.machine.wait_for_all()
        if self.fresh and self.machine.leads:
            set_aside(self.stage, self.recipe)
        trainer = Trainer(
            task, self.recipe, self.model, self.tokenizer, self.machine, self.resume, inherit,
            self.tensorboard,
        )  # fmt: skip
        self.resume = self.previous = None  # gigabytes that nobody needs any more
        code = trainer.run()
        self.machine.wait_for_all()
        del trainer  # what averages its gradients has to go before what it talks through
        leave()
        return code

    @property
    def device(self) -> torch.device:
        return self.machine.device


def open_stage(stage: str, arguments: argparse.Namespace) -> Start | None:
    """Find checkpoint, tokenizer and model for a stage; None if only the plan was asked for.

    A stage continues its own latest checkpoint if there is one. Otherwise, or with --fresh, it
    starts from the stage before it, and the first from nothing.

    Raises:
        UserError: whatever stands in the way of starting.
    """
    recipe = stage_recipe(arguments, stage)
    device = pick_device(arguments.device)
    if arguments.plan is not None:
        print_plan(recipe, stage, device, arguments.plan, arguments.gpus)
        return None
    if arguments.gpus is not None:
        raise UserError("--gpus goes with --plan; to train on several, start with torchrun")
    if arguments.tensorboard:
        check_tensorboard()
    machine = join(arguments.device)
    recipe = resolved(recipe, stage, machine)
    path, loaded = open_checkpoint(stage, recipe, arguments)
    machine.from_leader(lambda: check_needs(stage, recipe, new=loaded is None))
    if loaded is not None and path is not None:
        checkpoints.check_same_model(loaded, recipe.model.config(), path)
        tokenizer, model = checkpoints.load_tokenizer(loaded), checkpoints.load_model(loaded, path)
    else:
        made = machine.from_leader(lambda: open_tokenizer(recipe).to_json())
        tokenizer, model = tokenization.from_json(made), new_model(recipe)
    check_vocabulary(tokenizer, recipe)
    own = loaded is not None and loaded["stage"] == stage
    if loaded is not None and own and "optimizer" not in loaded:
        raise UserError(
            f"{path} holds weights only and can't be continued: name latest.pt or a step file of "
            "its folder"
        )
    describe_start(stage, recipe, path, loaded, machine)
    resume, previous = (loaded, None) if own else (None, loaded)
    name: str = arguments.recipe
    fresh: bool = arguments.fresh
    board = recipe.log(stage, "tensorboard") if arguments.tensorboard else None
    return Start(stage, recipe, name, machine, model, tokenizer, resume, previous, fresh, board)


def resolved(recipe: Recipe, stage: str, machine: Machine) -> Recipe:
    """The recipe with every `auto` decided for this machine.

    fp16 and compiling pay on a GPU. On a CPU fp16 costs more than it brings, and so does compiling
    but in a run of hours: see docs/EXPERIMENTS.md. Activations are recomputed only where the memory
    doesn't hold them.

    Raises:
        UserError: the ranks can't share a step of this stage evenly.
    """
    part, ranks, on_gpu = recipe.stage(stage), machine.ranks, machine.device.type == "cuda"
    key = "pairs_per_step" if isinstance(part, DPOStage) else "sequences_per_step"
    if (each := getattr(part, key)) % ranks:
        raise UserError(
            f"{stage}.{key} ({each}) must be a multiple of the number of processes ({ranks}): "
            f"start fewer, or --set {stage}.{key}=..."
        )
    changes: dict[str, Any] = {"precision": precision_on(machine.device.type, recipe)}
    if recipe.compile == "auto":
        changes["compile"] = on_gpu
    recipe = recipe.model_copy(update=changes)
    if recipe.gradient_checkpointing == "auto":
        free = free_memory(machine.device)
        fits = fits_without_checkpointing(recipe, stage, free, machine.device.type, ranks)
        recipe = recipe.model_copy(update={"gradient_checkpointing": not fits})
    return recipe


def check_needs(stage: str, recipe: Recipe, *, new: bool) -> None:
    """Open every source of a stage, and the tokenizer of a new run, and read from each.

    The base stage also tells what the stages after it will want and can't have yet, such as a gated
    data set: there are days in which to ask for it.

    Raises:
        UserError: all that is wrong, at once.
    """
    names = stage_sources(recipe, stage) if stage != "sft" else []  # that reads what is prepared
    with ThreadPoolExecutor() as pool:  # where there is no network, each takes its time to say so
        tokenizer = pool.submit(tokenizer_problems, recipe) if new else None
        problems = source_problems(names, recipe)
        problems += tokenizer.result() if tokenizer else []
    if problems:
        raise UserError("\n       ".join(problems))
    if stage == "base":
        later = {name for stage in STAGES[1:] for name in stage_sources(recipe, stage)}
        hub = {name for name, source in recipe.sources.items() if isinstance(source, HubSource)}
        for problem in source_problems(sorted(later & hub - set(names)), recipe):
            print(f"a later stage will need this: {problem}", flush=True)


def stage_sources(recipe: Recipe, stage: str) -> list[str]:
    """The names of the sources that a stage, or its preparation, reads."""
    settings = recipe.stage(stage)
    if isinstance(settings, StreamStage):
        return [source.name for source in settings.sources]
    if isinstance(settings, SFTStage):
        return [source.name for source in settings.data.sources]
    assert isinstance(settings, DPOStage)
    return [settings.train, settings.validation]


def tokenizer_problems(recipe: Recipe) -> list[str]:
    if recipe.tokenizer.train is not None:
        return []  # trained on sources that have been looked at
    try:
        open_tokenizer(recipe)
    except UserError as error:
        return [str(error)]
    return []


def open_checkpoint(
    stage: str, recipe: Recipe, arguments: argparse.Namespace
) -> tuple[Path | None, checkpoints.Checkpoint | None]:
    """The checkpoint that a stage starts from, and its path; none for the base stage's beginning.

    Instead of a damaged one it is the newest good one beside it.

    Raises:
        UserError: there is none, or none that is good.
    """
    own, fresh = recipe.folder(stage), arguments.fresh
    if arguments.checkpoint is not None:
        given: Path = arguments.checkpoint
        loaded = checkpoints.load(given)
        if checkpoints.exist_in(own) and not fresh and loaded["stage"] != stage:
            raise UserError(
                f"{own} already holds a run: add --fresh to begin anew from {given} (the "
                "old run is moved aside), or leave --checkpoint away to continue it"
            )
        return given, loaded
    if checkpoints.exist_in(own) and not fresh:
        return checkpoints.load_newest(own)
    before = BEFORE.get(stage)
    if before is None:
        return None, None
    names = ("best.pt", "latest.pt")
    if checkpoints.exist_in(recipe.folder(before), names):
        return checkpoints.load_newest(recipe.folder(before), names)
    raise UserError(
        f"stage {stage} starts from a checkpoint of stage {before}, and there is none in "
        f"{recipe.folder(before)}: run `{command(before, arguments.recipe)}` first, or name "
        "another with --checkpoint"
    )


def command(stage: str, recipe: str) -> str:
    """What to type to run a step of a recipe, which is named as it was typed: name or path."""
    return COMMANDS[stage] + (f" --recipe {recipe}" if recipe != "v4" else "")


def describe_start(
    stage: str,
    recipe: Recipe,
    path: Path | None,
    loaded: checkpoints.Checkpoint | None,
    machine: Machine,
) -> None:
    size = recipe.model.config().num_parameters()
    begin = "from nothing"
    if loaded is not None:
        begin = f"from {path} (stage {loaded['stage']}, step {loaded['step']:,})"
        position = loaded["position"]
        unfinished = loaded["step"] < loaded["steps"] and not position["stopped_early"]
        if loaded["stage"] != stage and unfinished and path is not None and path.stem != "best":
            begin += f"; note that it was to have {loaded['steps']:,} steps"
    where = f"{machine.ranks} x {machine.device.type}, {recipe.parallel}"
    how = [str(machine.device) if machine.ranks == 1 else where, recipe.precision]
    how += ["compiled"] if recipe.compile else []
    how += ["activations recomputed"] if recipe.gradient_checkpointing else []
    print(f"{stage}: {size:,} parameters on {', '.join(how)}, {begin}", flush=True)
    if recipe.precision == "fp16" and machine.device.type == "cpu":
        print("fp16 is slow on a CPU; --set precision=fp32 is the faster choice", flush=True)


def set_aside(stage: str, recipe: Recipe) -> None:
    """Move an earlier run of this stage out of the way, and say where it went."""
    paths = [recipe.folder(stage)]
    endings = ("metrics.csv", "samples.jsonl", "tensorboard")
    paths += [recipe.log(stage, ending) for ending in endings]
    for path in paths:
        aside = checkpoints.move_aside(path)
        if aside is not None:
            print(f"moved {path} to {aside}")


def new_model(recipe: Recipe) -> Transformer:
    torch.manual_seed(recipe.seed)
    return Transformer(recipe.model.config())


def open_tokenizer(recipe: Recipe) -> Tokenizer:
    """The recipe's tokenizer: from the hub, from a file, or trained now on its sources."""
    spec = recipe.tokenizer
    if spec.hub is not None:
        copy = Path(recipe.mirror or "", spec.hub)
        if recipe.mirror is not None and copy.is_dir():
            return tokenization.from_path(copy)
        return tokenization.from_hub(spec.hub)
    if spec.path is not None:
        return tokenization.from_path(Path(spec.path))
    assert spec.train is not None
    print(f"training a tokenizer on {', '.join(spec.train.train_on)}", flush=True)
    texts = [
        text
        for name in spec.train.train_on
        for text in first_texts(open_stream(name, recipe), spec.train.characters)
    ]
    return tokenization.train(texts, spec.train.vocab_size)


def first_texts(documents: DocumentStream, characters: int) -> Iterator[str]:
    """Texts and messages from the beginning of a source, until there are so many characters."""
    for document in documents.in_order():
        turns = [document] if isinstance(document, str) else [m["content"] for m in document]
        yield from turns
        characters -= sum(map(len, turns))
        if characters <= 0:
            return


def check_vocabulary(tokenizer: Tokenizer, recipe: Recipe) -> None:
    if tokenizer.vocab_size > recipe.model.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size:,} tokens, model.vocab_size is "
            f"{recipe.model.vocab_size:,}: the vocabulary doesn't fit; raise model.vocab_size or "
            "take another tokenizer"
        )


# ------------------------------------------------------------------------ stages 1 to 3


def stream_task(start: Start) -> Task:
    """The task of a stage that reads a weighted mix of document streams.

    Every stream goes on where the stage before left it, so that no document is read twice.
    """
    recipe, machine = start.recipe, start.machine
    settings = recipe.stage(start.stage)
    assert isinstance(settings, StreamStage)
    before = (start.previous or {}).get("data") or {}

    def batches(state: dict[str, Any] | None) -> MixedBatches:
        return open_mix(start, settings, (state or before).get("sources", {}), state)

    kept = (start.resume or {}).get("extra", {}).get("held_out", {})
    held_out = machine.from_leader(lambda: held_out_tokens(recipe, settings, start.tokenizer, kept))
    return Task(
        stage=start.stage,
        batches=batches,
        steps=settings.steps,
        loss=language_modelling,
        validation=stream_validation(settings, held_out),
        chat_prompts=start.stage == "chat",
        extra={"held_out": held_out},
    )


def open_mix(
    start: Start, settings: StreamStage, places: dict[str, Any], state: dict[str, Any] | None
) -> MixedBatches:
    """The mix of a stage from `places` on, and from `state`, in which this stage was left, if any.

    Raises:
        UserError: the sources were dealt into another number of lanes.
    """
    recipe, machine = start.recipe, start.machine
    for name in (source.name for source in settings.sources):
        if name in places and len(places[name]) != recipe.lanes:
            raise UserError(
                f"source {name!r} was dealt into {len(places[name])} lane(s) so far, and the "
                f"recipe says lanes: {recipe.lanes}: put the old number back, so that no document "
                "is read twice, or begin anew with --fresh"
            )
    lanes = lanes_of(machine.rank, machine.ranks, recipe.lanes, settings.sequences_per_step)
    return MixedBatches(
        {
            name: {
                lane: open_tokens(name, recipe, start.tokenizer, place.get(lane), lane)
                for lane in lanes
            }
            for name, place in ((s.name, places.get(s.name, {})) for s in settings.sources)
        },
        {source.name: source.weight for source in settings.sources},
        sequence_length=settings.sequence_length,
        sequences_per_step=settings.sequences_per_step,
        micro_batch=settings.micro_batch,
        drawn=(state or {}).get("drawn"),
        lanes=recipe.lanes,
        rank=machine.rank,
        ranks=machine.ranks,
    )


def open_tokens(
    name: str, recipe: Recipe, tokenizer: Tokenizer, place: dict[str, Any] | None, lane: int = 0
) -> TokenStream:
    """The tokens of a lane of a source from a place on, made ready in the background."""
    cache = TokenCache(Path(recipe.token_cache)) if recipe.token_cache else None
    documents = open_stream(name, recipe, lane=lane, lanes=recipe.lanes)
    return TokenStream(documents, tokenizer, place, read_ahead=recipe.read_ahead, cache=cache)


def held_out_tokens(
    recipe: Recipe, settings: StreamStage, tokenizer: Tokenizer, kept: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Held-out sequences (N, T) int32 of every source; those that a checkpoint kept stay."""
    count, length = settings.validation_sequences, settings.sequence_length
    found = {}
    for source in settings.sources:
        found[source.name] = kept.get(source.name, torch.empty(0, 0))
        if found[source.name].shape != (count, length):
            documents = open_stream(source.name, recipe, held_out=True)
            sequences = held_out_sequences(documents, tokenizer, length, count)
            found[source.name] = sequences.int()
    return found


def stream_validation(settings: StreamStage, held_out: dict[str, Tensor]) -> dict[str, Validation]:
    """Held-out sequences of every source, weighted in the mean like the mix."""
    result = {}
    for source in settings.sources:
        sequences = held_out[source.name].long()
        if not len(sequences):
            print(f"source {source.name!r}: too little held-out text to validate on")
            continue
        parts = [{"input_ids": ids} for ids in sequences.split(settings.micro_batch)]
        weight = sequences.shape[0] * (sequences.shape[1] - 1)
        batch = Batch(parts, weight, sequences.numel(), {})
        result[source.name] = Validation(batch, source.weight)
    return result


def carry_on(previous: checkpoints.Checkpoint | None, keys: Sequence[str]) -> dict[str, Any] | None:
    """The parts of the previous stage's state that this stage continues."""
    if previous is None or any(key not in previous for key in keys):
        return None
    return {key: previous[key] for key in keys}
