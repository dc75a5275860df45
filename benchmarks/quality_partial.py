"""What has been found already, on disk: a run that was ended goes on where it stopped.

Each outcome is a file of its own, named by a hash of all that it depends on: the job, the model's
weights, the prompts, the settings, the device and the versions. Only such a file is ever read
again; others are left alone.
"""

import array
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fluxcompile.atomic import write_all
from fluxcompile.evaluation.prompts import Cells
from quality_jobs import Job

_NAMED = 16  # hexadecimal digits of a file's name


class Partial:
    """Outcomes in a folder, of jobs that share ``common``: whatever they depend on, as JSON."""

    def __init__(self, folder: Path, common: dict[str, Any]) -> None:
        self.folder, self._common = folder, common

    def key(self, job: Job) -> str:
        """Equal for jobs that must find the same."""
        text = json.dumps([self._common, job.about()], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def read(self, key: str) -> bytes | None:
        """What was kept under ``key``; None if nothing was."""
        files = self.folder.glob(f"*-{key[:_NAMED]}.pt")
        return next((file.read_bytes() for file in files), None)

    def keep(self, job: Job, key: str, data: bytes) -> None:
        """The outcome of ``job``, whose key this is; whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        name = re.sub(r"[^\w.#+]+", "-", job.name)
        write_all({self.folder / f"{name}-{key[:_NAMED]}.pt": data})


def prompts_digest(cells: Cells) -> str:
    """Of every token of every prompt, in order."""
    found = hashlib.sha256()
    for cell, prompts in cells.items():
        found.update(repr((*cell, len(prompts))).encode())
        for prompt in prompts:
            for ids in (prompt.prompt, prompt.target):
                found.update(array.array("q", [len(ids), *ids]).tobytes())
    return found.hexdigest()


def weights_digest(module: nn.Module) -> str:
    """Of every bit of a module's parameters and buffers, on whatever device."""
    found = hashlib.sha256()
    for tensors in (module.named_parameters(), module.named_buffers()):
        for name, tensor in tensors:
            found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            found.update(raw.numpy())
    return found.hexdigest()
