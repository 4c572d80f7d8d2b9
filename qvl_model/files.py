"""Writing files so that nobody meets half of one, and saying early that one cannot be written."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_then_rename(file: Path, write: Callable[[Path], Any]) -> None:
    """Calls `write` with a temporary path beside `file`, then renames: a reader sees the old file or the whole new one.

    Raises:
        OSError: the folder cannot be written; what `write` raises; in both cases `file` is as it was.
    """
    handle, name = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)  # mkstemp's 0600 would lock out everybody else
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(file: Path) -> None:
    """Raises OSError, naming `file`, unless `write_then_rename` can write it: called before the work whose result it
    is."""
    if file.is_dir():
        raise IsADirectoryError(f"{file}: is a folder; the output must be a file")
    try:
        with tempfile.TemporaryFile(dir=file.parent):
            pass
    except OSError as error:
        raise OSError(f"{file}: cannot be written ({error.strerror})") from None
