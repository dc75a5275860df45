"""The folders that compiled code is kept in, over processes."""

import os
import shutil
import tempfile
from pathlib import Path

from fluxcompile.doctor.finding import Finding, fail, ok, warn

#: below this much free space a compile may run out of it
LEAST_FREE = 2**30


def inductor_folder() -> Path:
    """Inductor's; not created."""
    if given := os.environ.get("TORCHINDUCTOR_CACHE_DIR"):
        return Path(given)  # and Inductor is not imported, which would make the folder, or fail to
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    return Path(default_cache_dir())


def triton_folder() -> Path:
    """Triton's own, for what runs outside of Inductor; not created."""
    home = Path(os.environ.get("TRITON_HOME") or Path.home())
    return Path(os.environ.get("TRITON_CACHE_DIR") or home / ".triton" / "cache")


def inductor_cache() -> Finding:
    return cache("inductor cache", inductor_folder(), "TORCHINDUCTOR_CACHE_DIR")


def triton_cache() -> Finding:
    return cache("triton cache", triton_folder(), "TRITON_CACHE_DIR")


def cache(name: str, folder: Path, variable: str) -> Finding:
    """Where it is, how big it is, and whether it can be written.

    Args:
        variable: the environment variable that puts it elsewhere.
    """
    elsewhere = f"set {variable} to a folder that you can write to"
    where = nearest(folder)
    try:
        with tempfile.TemporaryFile(dir=where):
            pass
    except OSError as error:
        return fail(name, f"{folder}: cannot be written ({error.strerror or error})", elsewhere)
    size = f"{size_of(folder) / 2**20:.1f} MiB" if folder.is_dir() else "not made yet"
    free = shutil.disk_usage(where).free
    found = f"{folder}: {size}, {free / 2**30:.1f} GiB free"
    if free < LEAST_FREE:
        return warn(name, found, f"free some space, or {elsewhere}")
    return ok(name, found)


def nearest(folder: Path) -> Path:
    """``folder``, or the first of its parents that exists: what a compile would write in."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def size_of(folder: Path) -> int:
    """Bytes of the files in it; what vanishes meanwhile does not count."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(root, name)).st_size
            except OSError:
                continue
    return total
