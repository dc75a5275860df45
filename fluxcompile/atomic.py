"""Replacing files all together or not at all."""

import os
import secrets
from collections.abc import Mapping
from pathlib import Path


def write_all(files: Mapping[Path, bytes]) -> None:
    """Write ``files``; none is replaced before all are complete on disk.

    Raises:
        OSError: a file cannot be written; the old ones are as they were.
    """
    pending: dict[Path, Path] = {}
    try:
        for path, data in files.items():
            temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
            pending[temporary] = path
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        for temporary, path in pending.items():
            os.replace(temporary, path)
    finally:
        for temporary in pending:
            temporary.unlink(missing_ok=True)
