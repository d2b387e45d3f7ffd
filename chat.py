"""Talk to the model.

python chat.py                             the best checkpoint there is: dpo, sft, chat ...
python chat.py --prompt "who made you?"    one answer, then leave
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from hamner import checkpoints
from hamner.errors import UserError, nearest, run
from hamner.files import write_json_lines
from hamner.generation import Sampling, fit_context, generate_text
from hamner.machine import pick_device
from hamner.recipe import STAGES, load_recipe
from hamner.stage import command
from hamner.tokenization import Message, Tokenizer
from model import Transformer

COMMANDS = {
    "/quit": "leave (also Ctrl-D)",
    "/clear": "forget the conversation",
    "/temp N": "set the temperature; 0 always takes the likeliest word",
    "/system [TEXT]": "show or change the system prompt; changing it clears the conversation",
    "/history": "show the conversation so far",
    "/retry": "have the last message answered anew",
    "/save FILE": "write the conversation into a new file, as one line of training data",
    "/help": "this list",
}
SMALLEST_ANSWER = 16  # tokens that must stay free for an answer


@dataclass
class Chat:
    """A conversation with a model: remembers the messages and makes the answers."""

    model: Transformer
    tokenizer: Tokenizer
    sampling: Sampling
    system: str = ""
    messages: list[Message] = field(default_factory=list)

    def answer(self, text: str) -> None:
        """Print the answer to `text` as it comes, and remember both.

        Ctrl-C stops the answer; what was said up to there is remembered.

        Raises:
            ValueError: the text doesn't fit into the context.
        """
        self.messages.append({"role": "user", "content": text})
        try:
            prompt = self._prompt()
        except ValueError:
            self.messages.pop()
            raise
        pieces: list[str] = []
        try:
            for piece in generate_text(self.model, self.tokenizer, prompt, self.sampling):
                pieces.append(piece)
                print(piece if len(pieces) > 1 else piece.lstrip(), end="", flush=True)
        except KeyboardInterrupt:
            print(" [stopped]", end="")
        print(flush=True)
        self.messages.append({"role": "assistant", "content": "".join(pieces).strip()})

    def _prompt(self) -> list[int]:
        """Ids of the conversation; whole turns are forgotten, oldest first, to make room."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        context = self.model.config.max_position_embeddings
        wanted = min(self.sampling.max_new_tokens, context // 2)
        room = context - max(SMALLEST_ANSWER, wanted)
        messages = [*system, *self.messages]
        try:
            prompt, kept = fit_context(self.tokenizer, messages, room)
        except ValueError:  # take some of the answer's room, if that is enough
            prompt, kept = fit_context(self.tokenizer, messages, context - SMALLEST_ANSWER)
        self.messages = list(kept[len(system) :])
        return prompt

    def obey(self, line: str) -> bool:
        """Carry out a /command; returns False if it was /quit."""
        word, _, rest = line.partition(" ")
        rest = rest.strip()
        if word in ("/quit", "/exit", "/q"):
            return False
        if word == "/clear":
            self.messages.clear()
            print("cleared")
        elif word == "/temp":
            self._set_temperature(rest)
        elif word == "/system":
            self._set_system(rest)
        elif word == "/history":
            for message in self.messages:
                print(f"{message['role']}: {message['content']}")
        elif word == "/retry":
            self._retry()
        elif word == "/save":
            self._save(rest)
        elif word == "/help":
            for name, meaning in COMMANDS.items():
                print(f"  {name:15} {meaning}")
        else:
            known = [name.split()[0] for name in COMMANDS]
            print(f"unknown command {word}{nearest(word, known)}; /help lists them")
        return True

    def _retry(self) -> None:
        if not self.messages:
            print("there is nothing to answer yet")
            return
        *self.messages, question, _ = self.messages
        if self.sampling.seed is not None:  # or the answer would be the same
            self.sampling = replace(self.sampling, seed=self.sampling.seed + 1)
        print("Al: ", end="", flush=True)
        self.answer(question["content"])

    def _save(self, name: str) -> None:
        if not self.messages:
            print("there is nothing to save yet")
            return
        if not name:
            print("give a file name: /save FILE")
            return
        path = Path(name).expanduser()
        if path.exists():
            print(f"{path} is there already: give another name")
            return
        system = [{"role": "system", "content": self.system}] if self.system else []
        try:
            write_json_lines(path, [{"messages": [*system, *self.messages]}])
        except OSError as error:
            print(f"not saved: {error.strerror}: {path}")
            return
        print(f"saved as {path}")

    def _set_temperature(self, text: str) -> None:
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not 0 <= value <= 10:
            print(
                f"give a number from 0 to 10, such as /temp 0.7 (now {self.sampling.temperature:g})"
            )
            return
        self.sampling = replace(self.sampling, temperature=value)
        print(f"temperature {value:g}")

    def _set_system(self, text: str) -> None:
        if text:
            self.system = text
            self.messages.clear()
        print(self.system or "no system prompt")


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


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="v4", help="name in recipes/, or path (default: v4)")
    parser.add_argument("--checkpoint", type=Path, help="talk to this checkpoint")
    parser.add_argument("--temp", type=float, help="temperature; 0 always takes the likeliest word")
    parser.add_argument("--system", help="system prompt; '' for none")
    parser.add_argument("--prompt", help="answer this and leave")
    parser.add_argument("--seed", type=int, help="make the answers repeatable")
    parser.add_argument("--cpu", action="store_true", help="stay off the GPU")
    return parser.parse_args()


def open_chat(arguments: argparse.Namespace) -> tuple[Chat, str]:
    """The chat that the arguments ask for, and a line that says who is speaking."""
    path = arguments.checkpoint or best_checkpoint(arguments.recipe)
    checkpoint = checkpoints.load(path)
    recipe = checkpoint["recipe"]
    device = pick_device("cpu" if arguments.cpu else "auto")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = checkpoints.load_model(checkpoint, path).to(device, dtype).eval()
    sampling = Sampling(**recipe["sampling"], seed=arguments.seed)
    if arguments.temp is not None:
        if not 0 <= arguments.temp <= 10:
            raise UserError(f"--temp must be from 0 to 10, got {arguments.temp:g}")
        sampling = replace(sampling, temperature=arguments.temp)
    system = recipe["system_prompt"] if arguments.system is None else arguments.system
    chat = Chat(model, checkpoints.load_tokenizer(checkpoint), sampling, system)
    size = model.config.num_parameters()
    about = f"{path} (stage {checkpoint['stage']}, step {checkpoint['step']:,})"
    return chat, f"{about}, {size:,} parameters on {device}"


def say(chat: Chat, text: str) -> None:
    try:
        chat.answer(text)
    except ValueError as error:
        print(f"{error}; say it shorter")


def talk(chat: Chat) -> None:
    """Read and answer until /quit or the end of input."""
    interactive = sys.stdin.isatty()
    while True:
        try:
            line = input("You: " if interactive else "").strip()
        except (EOFError, KeyboardInterrupt):
            print("\nbye" if interactive else "bye")
            return
        if line.startswith("/"):
            if not chat.obey(line):
                print("bye")
                return
        elif line:
            if not interactive:
                print(f"You: {line}")
            print("Al: ", end="", flush=True)
            say(chat, line)


def main() -> int:
    arguments = parse_arguments()
    chat, about = open_chat(arguments)
    if arguments.prompt is not None:
        if not arguments.prompt.strip():
            raise UserError("--prompt is empty: give it something to answer")
        try:
            chat.answer(arguments.prompt.strip())
        except ValueError as error:
            raise UserError(f"{error}; say it shorter") from None
        return 0
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (line editing and history for input())
    print(f"{about}\n/help lists the commands, Ctrl-D leaves")
    talk(chat)
    return 0


if __name__ == "__main__":
    run(main)
