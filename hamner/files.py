"""Files that are written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hamner.errors import UserError, first_line


def write_bytes_whole(path: Path, parts: Iterable[bytes]) -> None:
    """Write parts one after the other to a temporary file, flush it, and rename it to `path`.

    The folder is made if need be. Whatever goes wrong, an older file at `path` stays as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text_whole(path: Path, parts: Iterable[str]) -> None:
    """Write text (or parts of it, one after the other) in UTF-8, whole or not at all."""
    write_bytes_whole(path, (part.encode() for part in parts))


def write_json_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line, whole or not at all."""
    write_text_whole(path, (json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_report(path: Path, report: Mapping[str, Any], option: str = "--json") -> None:
    """Write what was found as JSON, whole or not at all; infinities and NaN become null.

    Raises:
        UserError: the file, which `option` named, can't be written.
    """
    plain = json.loads(json.dumps(report, default=str), parse_constant=lambda _: None)
    try:
        write_text_whole(path, [json.dumps(plain, ensure_ascii=False, indent=1), "\n"])
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise UserError(
            f"{option} {path}: can't be written ({reason}); name another file"
        ) from None
