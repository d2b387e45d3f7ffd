"""Talk to the model.

python chat.py                             the best checkpoint there is: dpo, sft, chat ...
python chat.py --prompt "who made you?"    one answer, then leave
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from hamner.conversation import (
    HIGHEST_TEMPERATURE,
    Conversation,
    Pieces,
    add_speaker_options,
    printable,
    speaker_of,
)
from hamner.errors import UserError, nearest, run
from hamner.files import write_json_lines

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
BOLD, DIM, GREEN = "1", "2", "1;32"
WORDS = [name.split()[0] for name in COMMANDS]


class Chat:
    """A conversation on a terminal, or through a pipe."""

    def __init__(self, conversation: Conversation):
        self.conversation = conversation
        plain = "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb"
        self.coloured = sys.stdout.isatty() and not plain

    def say(self, text: str, style: str = "", end: str = "\n") -> None:
        """Print text, in a style (numbers of ANSI's "select graphic rendition") on a terminal."""
        text = printable(text)
        print(
            f"\x1b[{style}m{text}\x1b[0m" if style and self.coloured else text, end=end, flush=True
        )

    def answer(self, text: str) -> None:
        """Print the answer to `text` as it comes; Ctrl-C stops it, and it alone.

        Raises:
            ValueError: the text doesn't fit into the context.
        """
        self._print(self.conversation.answer(text))

    def _print(self, pieces: Pieces, label: str = "") -> None:
        self.say(label, style=GREEN, end="")
        with contextlib.closing(pieces):
            try:
                for piece in pieces:
                    self.say(piece, end="")
            except KeyboardInterrupt:
                self.say(" [stopped]", style=DIM, end="")
        self.say("")

    def hear(self, line: str) -> bool:
        """Answer a line, or carry out the /command that it is; returns False if it was /quit."""
        if line.startswith("/"):
            return self.obey(line)
        if line:
            self._respond(lambda: self.conversation.answer(line))
        return True

    def _respond(self, begin: Callable[[], Pieces]) -> None:
        try:
            pieces = begin()
        except ValueError as error:
            self.say(str(error))
            return
        self._print(pieces, "Al: ")

    def obey(self, line: str) -> bool:
        """Carry out a /command; returns False if it was /quit."""
        word, _, rest = line.partition(" ")
        commands: dict[str, Callable[[str], None]] = {
            "/clear": self._clear,
            "/temp": self._set_temperature,
            "/system": self._set_system,
            "/history": self._show_history,
            "/retry": lambda _: self._respond(self.conversation.retry),
            "/save": self._save,
            "/help": self._help,
        }
        if word in ("/quit", "/exit", "/q"):
            return False
        if word in commands:
            commands[word](rest.strip())
        else:
            self.say(f"unknown command {word}{nearest(word, WORDS)}; /help lists them")
        return True

    def _clear(self, _: str) -> None:
        self.conversation.messages.clear()
        self.say("cleared")

    def _set_temperature(self, text: str) -> None:
        sampling = self.conversation.sampling
        value = float(text) if is_number(text) else -1.0
        if not 0 <= value <= HIGHEST_TEMPERATURE:
            allowed = f"a number from 0 to {HIGHEST_TEMPERATURE}"
            self.say(f"give {allowed}, such as /temp 0.7 (now {sampling.temperature:g})")
            return
        self.conversation.sampling = replace(sampling, temperature=value)
        self.say(f"temperature {value:g}")

    def _set_system(self, text: str) -> None:
        if text:
            self.conversation.system = text
            self.conversation.messages.clear()
        self.say(self.conversation.system or "no system prompt")

    def _show_history(self, _: str) -> None:
        for message in self.conversation.messages:
            self.say(f"{message['role']}: {message['content']}")

    def _save(self, name: str) -> None:
        if not self.conversation.messages:
            self.say("there is nothing to save yet")
            return
        if not name:
            self.say("give a file name: /save FILE")
            return
        path = Path(name).expanduser()
        if path.exists():
            self.say(f"{path} is there already: give another name")
            return
        messages = self.conversation.with_system(self.conversation.messages)
        try:
            write_json_lines(path, [{"messages": messages}])
        except OSError as error:
            self.say(f"not saved: {error.strerror}: {path}")
            return
        self.say(f"saved as {path}")

    def _help(self, _: str) -> None:
        for name, meaning in COMMANDS.items():
            self.say(f"  {name:15} {meaning}")


def is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


# ------------------------------------------------------------------------------ reading lines


def piped_line() -> str:
    """The next line of a pipe, echoed, so that what comes out reads like a dialogue.

    Raises:
        EOFError: there is none left.
    """
    line = input().strip()
    if line and not line.startswith("/"):
        print(f"You: {printable(line)}")
    return line


def typed_lines() -> Callable[[], str]:
    """A function that has a line typed: editing, history over sessions, /commands completed.

    Ctrl-C empties the line; on an empty one it raises KeyboardInterrupt, Ctrl-D raises EOFError.
    """
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.history import FileHistory, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()

    @keys.add("c-c")
    def _(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt())

    path = history_file()
    session: PromptSession[str] = PromptSession(
        [("bold ansiblue", "You: ")],
        history=FileHistory(str(path)) if path else InMemoryHistory(),
        completer=WordCompleter(WORDS, sentence=True),
        complete_while_typing=False,
        key_bindings=keys,
    )

    return lambda: session.prompt().strip()


def history_file() -> Path | None:
    """Where typed lines are kept for the next session; None where that can't be written."""
    folder = Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser()
    path = folder / "chat_hamner" / "history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.touch(mode=0o600)
    except (OSError, RuntimeError):
        return None
    return path


def talk(chat: Chat, read: Callable[[], str]) -> None:
    """Read and answer until /quit or the end of input."""
    try:
        while chat.hear(read()):
            pass
    except (EOFError, KeyboardInterrupt):
        pass
    chat.say("bye")


# ------------------------------------------------------------------------------ the script


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_speaker_options(parser)
    parser.add_argument("--prompt", help="answer this and leave")
    return parser.parse_args()


def open_chat(arguments: argparse.Namespace) -> Chat:
    speaker = speaker_of(arguments)
    return Chat(Conversation(speaker, speaker.sampling, speaker.system))


def show_banner(chat: Chat) -> None:
    chat.say(str(chat.conversation.speaker), style=BOLD)
    chat.say("/help lists the commands, Ctrl-D leaves", style=DIM)


def main() -> int:
    arguments = parse_arguments()
    if arguments.prompt is not None and not arguments.prompt.strip():
        raise UserError("--prompt is empty: give it something to answer")
    chat = open_chat(arguments)
    if arguments.prompt is not None:
        try:
            chat.answer(arguments.prompt.strip())
        except ValueError as error:
            raise UserError(str(error)) from None
        return 0
    show_banner(chat)
    talk(chat, typed_lines() if sys.stdin.isatty() else piped_line)
    return 0


if __name__ == "__main__":
    run(main)
