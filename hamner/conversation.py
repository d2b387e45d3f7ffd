"""Talking with a checkpoint: which one, what it is asked, and how its answers come.

What chat.py shows on a terminal and chat_web.py in a browser is made here.
"""

from __future__ import annotations

import argparse
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from hamner import checkpoints
from hamner.checkpoints import Checkpoint
from hamner.decode_step import WEIGHTS, speed_up
from hamner.errors import UserError
from hamner.generation import Sampling, fit_context, generate_text
from hamner.machine import pick_device
from hamner.recipe import STAGES, load_recipe
from hamner.stage import command
from hamner.tokenization import Message, Tokenizer
from model import Transformer

SMALLEST_ANSWER = 16  # tokens that must stay free for an answer
HIGHEST_TEMPERATURE = 10

# Characters that would command a terminal: models and files may hold any.
HARMLESS = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}

Pieces = Generator[str, None, None]  # an answer as it comes


@dataclass
class Speaker:
    """A checkpoint that has been made ready to answer."""

    model: Transformer
    tokenizer: Tokenizer
    sampling: Sampling  # the recipe's, if nothing else was asked for
    system: str  # likewise; "" is none
    path: Path
    stage: str
    step: int

    def __str__(self) -> str:
        size = self.model.config.num_parameters()
        device = self.model.lm_head.weight.device
        about = f"{self.path} (stage {self.stage}, step {self.step:,})"
        return f"{about}, {size:,} parameters on {device}"


def printable(text: str) -> str:
    """The text with U+FFFD for every character that would command a terminal."""
    return text.translate(HARMLESS)


def best_checkpoint(recipe_name: str) -> Path:
    """The checkpoint of the latest stage that there is, the best one of it.

    Raises:
        UserError: there is none yet.
    """
    recipe = load_recipe(recipe_name)
    for stage in reversed(STAGES):
        for name in ("best.pt", "latest.pt"):
            path = recipe.folder(stage) / name
            if path.exists():
                return path
    raise UserError(
        f"recipe {recipe.name} has no checkpoint yet: train one with "
        f"`{command('base', recipe_name)}`, or type `make demo` for a small one in minutes"
    )


def load_best(recipe_name: str, path: Path | None = None) -> tuple[Path, Checkpoint]:
    """The checkpoint at `path`, or else the recipe's best one; of damaged ones it takes the next.

    Raises:
        UserError: there is none, or none that is good.
    """
    if path is not None:
        return path, checkpoints.load(path)
    folder = best_checkpoint(recipe_name).parent
    return checkpoints.load_newest(folder, ("best.pt", "latest.pt"))


def open_speaker(
    recipe_name: str, path: Path | None = None, device: str = "auto", weights: str = "fp32"
) -> Speaker:
    """Load what is to talk, onto a device that is named as in `pick_device`.

    Rounded weights ("fp16" or "int8") make answers faster on a CPU, and a little different; see
    `decode_step`. On a GPU they are bf16.

    Raises:
        UserError: there is no such checkpoint, or no such device, or these weights can't be had.
    """
    where = pick_device(device)
    path, checkpoint = load_best(recipe_name, path)
    recipe = checkpoint["recipe"]
    dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
    model = checkpoints.load_model(checkpoint, path).to(where, dtype).eval()
    speed_up(model, weights)
    return Speaker(
        model=model,
        tokenizer=checkpoints.load_tokenizer(checkpoint),
        sampling=Sampling(**recipe["sampling"]),
        system=recipe["system_prompt"],
        path=path,
        stage=checkpoint["stage"],
        step=checkpoint["step"],
    )


def add_speaker_options(parser: argparse.ArgumentParser) -> None:
    """What says who is to talk, and how."""
    parser.add_argument("--recipe", default="v4", help="name in recipes/, or path (default: v4)")
    parser.add_argument("--checkpoint", type=Path, help="talk to this checkpoint")
    parser.add_argument("--temp", type=float, help="temperature; 0 always takes the likeliest word")
    parser.add_argument("--system", help="system prompt; '' for none")
    parser.add_argument("--seed", type=int, help="make the answers repeatable")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    parser.add_argument("--cpu", action="store_true", help="short for --device cpu")
    parser.add_argument(
        "--weights", choices=WEIGHTS, default="fp32",
        help="on a CPU, fp16 and int8 answer faster, and a little differently",
    )  # fmt: skip


def speaker_of(arguments: argparse.Namespace) -> Speaker:
    """The speaker that the options ask for, with their temperature, seed and system prompt.

    Raises:
        UserError: an option is out of range, or there is no such checkpoint or device.
    """
    temperature, seed = arguments.temp, arguments.seed
    if temperature is not None and not 0 <= temperature <= HIGHEST_TEMPERATURE:
        allowed = f"from 0 to {HIGHEST_TEMPERATURE}"
        raise UserError(f"--temp must be {allowed}, got {temperature:g}")
    if seed is not None and not 0 <= seed < 2**63:
        raise UserError(f"--seed must be from 0 to 2^63 - 1, got {seed}")
    device = "cpu" if arguments.cpu else arguments.device
    speaker = open_speaker(arguments.recipe, arguments.checkpoint, device, arguments.weights)
    sampling = replace(speaker.sampling, seed=seed)
    if temperature is not None:
        sampling = replace(sampling, temperature=temperature)
    system = speaker.system if arguments.system is None else arguments.system
    return replace(speaker, sampling=sampling, system=system)


def prompt_of(
    speaker: Speaker, messages: Sequence[Message], max_new_tokens: int
) -> tuple[list[int], list[Message]]:
    """Ids that ask for the next answer, and the messages they hold.

    Whole turns are left out, oldest first, until there is room for an answer of max_new_tokens,
    though of no more than half the context. The system prompt stays.

    Raises:
        ValueError: the last message alone doesn't fit.
    """
    context = speaker.model.config.max_position_embeddings
    room = context - max(SMALLEST_ANSWER, min(max_new_tokens, context // 2))
    try:
        return fit_context(speaker.tokenizer, messages, room)
    except ValueError:  # take some of the answer's room, if that is enough
        return fit_context(speaker.tokenizer, messages, context - SMALLEST_ANSWER)


@dataclass
class Conversation:
    """What was said between a user and a speaker, and what they say next."""

    speaker: Speaker
    sampling: Sampling
    system: str = ""
    messages: list[Message] = field(default_factory=list)  # without the system prompt

    def answer(self, text: str) -> Pieces:
        """The answer to `text`, piece by piece as it is made; both are remembered.

        Of an answer that isn't heard to its end, what was heard is remembered.

        Raises:
            ValueError: the text doesn't fit into the context.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        prompt, kept = prompt_of(
            self.speaker, self.with_system(asked), self.sampling.max_new_tokens
        )
        self.messages = [message for message in kept if message["role"] != "system"]
        return self._speak(prompt)

    def _speak(self, prompt: list[int]) -> Pieces:
        pieces: list[str] = []
        try:
            made = generate_text(self.speaker.model, self.speaker.tokenizer, prompt, self.sampling)
            for piece in made:
                if piece := piece if pieces else piece.lstrip():
                    pieces.append(piece)
                    yield piece
        finally:
            self.messages.append({"role": "assistant", "content": "".join(pieces).strip()})

    def retry(self) -> Pieces:
        """Another answer to the last message, in place of the one that it got.

        Raises:
            ValueError: nothing was said yet.
        """
        if not self.messages:
            raise ValueError("there is nothing to answer yet")
        *self.messages, question, _ = self.messages
        if self.sampling.seed is not None:  # or the answer would be the same
            self.sampling = replace(self.sampling, seed=self.sampling.seed + 1)
        return self.answer(question["content"])

    def with_system(self, messages: Sequence[Message]) -> list[Message]:
        """Messages with the system prompt before them, if there is one."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, *messages]
