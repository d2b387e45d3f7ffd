"""Files that are written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


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
