"""Which NVIDIA GPU there is, and whether PyTorch can use it."""

import os
import shutil
import subprocess

import torch

from fluxcompile.doctor.finding import Finding, fail, ok, warn

GPU = "gpu"
#: compute capability below which there is no bf16 matrix product, which the kernels use
LEAST = (8, 0)
_SECONDS = 10  # nvidia-smi hangs on some broken drivers


def gpu() -> Finding:
    """All GPUs on one line."""
    if torch.cuda.is_available():
        return _usable()
    driver = driver_version()
    if driver is None:
        return ok(GPU, "none: the CPU kernels run, which are there for correctness")
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden in ("", "-1"):
        return warn(
            GPU,
            f"there is one (driver {driver}), hidden by CUDA_VISIBLE_DEVICES={hidden!r}",
            "unset CUDA_VISIBLE_DEVICES to use it",
        )
    if torch.version.cuda is None:
        return warn(
            GPU,
            f"there is one (driver {driver}), and torch {torch.__version__} is built without CUDA",
            "install a CUDA build of torch: https://pytorch.org/get-started",
        )
    return fail(
        GPU,
        f"there is one (driver {driver}), and torch with CUDA {torch.version.cuda} cannot use it",
        "update the driver, or install torch for an older CUDA",
    )


def _usable() -> Finding:
    found, old = [], []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = properties.major, properties.minor
        found.append(
            f"{properties.name}, capability {capability[0]}.{capability[1]}, "
            f"{properties.total_memory / 2**30:.0f} GiB"
        )
        if capability < LEAST:
            old.append(properties.name)
    text = f"{'; '.join(found)}; driver {driver_version() or 'unknown'}, CUDA {torch.version.cuda}"
    if not old:
        return ok(GPU, text)
    wanted = ".".join(map(str, LEAST))
    return warn(GPU, text, f"{', '.join(old)}: use a GPU of capability {wanted} or newer")


def driver_version() -> str | None:
    """Of the NVIDIA driver, None if there is none, or no GPU behind it."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = done.stdout.split()
    return lines[0] if lines else None
