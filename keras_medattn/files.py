"""Files that are whole or not there: written aside, then renamed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def written_aside(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a hidden file beside `path` to write; it is renamed to `path` at the end.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / "a.txt"
        >>> with written_aside(target) as aside:
        ...     _ = aside.write_text("whole")
        >>> target.read_text()
        'whole'
    """
    path = Path(path)
    aside = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield aside
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def write_json(values: Any, path: str | os.PathLike[str]) -> None:
    """Write plain values as indented JSON."""
    with written_aside(path) as aside:
        aside.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read JSON."""
    return json.loads(Path(path).read_text(encoding="utf-8"))
