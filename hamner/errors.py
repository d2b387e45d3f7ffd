"""Errors that are the user's to mend: one plain sentence and exit code 2, never a traceback."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterable


class UserError(Exception):
    """Something about the input is wrong. The message says what, where, and what to do."""


def nearest(word: str, choices: Iterable[str]) -> str:
    """' (did you mean X?)' if a choice looks like the word, else ''."""
    close = difflib.get_close_matches(word, list(choices), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def first_line(error: BaseException) -> str:
    """What an error says, in one line; its kind if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def run(main: Callable[[], int | None]) -> None:
    """Call a script's main; print a UserError as one sentence, and exit with main's code or 2."""
    try:
        code = main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        code = 130
    sys.exit(code or 0)
