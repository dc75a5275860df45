"""What a checkpoint of router training holds, and how it appears all at once.

``checkpoint-N`` is a saved router (``FluxRouter.from_pretrained`` reads it), the multipliers, and
the trainer's optimiser, schedule, random states and state. The backbone, which does not change, is
not in it.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from transformers.trainer_utils import get_last_checkpoint

from fluxcompile import router_io
from fluxcompile.atomic import write_all
from fluxcompile.errors import TrainingError
from fluxcompile.router import FluxRouter
from fluxcompile.training.multipliers import Multipliers
from fluxcompile.training.processes import barrier

MULTIPLIERS_FILE = "multipliers.safetensors"
_STAGING = ".incomplete"


def save_state(
    directory: Path, router: FluxRouter, multipliers: Multipliers, tasks: Sequence[str]
) -> None:
    """Write router and multipliers.

    Raises:
        RouterError: a weight is not finite.
        OSError: the directory cannot be written.
    """
    router.save_pretrained(directory)
    state = {name: tensor.detach().cpu() for name, tensor in multipliers.state_dict().items()}
    data = safetensors.torch.save(state, metadata={"tasks": "\n".join(tasks)})
    write_all({directory / MULTIPLIERS_FILE: data})


def load_state(
    directory: Path, router: FluxRouter, multipliers: Multipliers, tasks: Sequence[str]
) -> None:
    """Read them back, in place.

    Raises:
        RouterError: the router is damaged or missing.
        TrainingError: the checkpoint is of a run with other layers, settings or tasks.
    """
    saved = FluxRouter.from_pretrained(directory)
    for name in ("config", "layer_names", "head_dim", "heads"):
        _check_same(directory, name, getattr(router, name), getattr(saved, name))
    file = directory / MULTIPLIERS_FILE
    try:
        with safetensors.safe_open(file, "pt") as opened:
            names = tuple((opened.metadata() or {}).get("tasks", "").split("\n"))
            state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except Exception as error:  # the parser raises many kinds
        raise TrainingError.mismatch(str(file), "a checkpoint's multipliers", error) from error
    _check_same(directory, "tasks", tuple(tasks), names)
    _check_same(directory, "targets", multipliers.targets.tolist(), state["targets"].tolist())
    router_io.check_finite(state, str(file))
    router.load_state_dict(saved.state_dict())
    multipliers.load_state_dict(state)


def read_state(file: Path) -> dict[str, Any]:
    """Read a state dict that ``torch.save`` wrote, to the CPU.

    Raises:
        TrainingError: the file is missing or damaged.
    """
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises many kinds
        raise TrainingError.mismatch(str(file), "a state that torch.save wrote", error) from error


def resolve(resume: str | bool | None, output_dir: str) -> str | None:
    """The checkpoint to resume from: a path as it is, True for the last one in ``output_dir``.

    Raises:
        TrainingError: there is none.
    """
    if not resume:
        return None
    path = get_last_checkpoint(output_dir) if resume is True else os.fspath(resume)
    if path is None or not Path(path, "trainer_state.json").is_file():
        where = f"{output_dir} (resume_from_checkpoint=True)" if resume is True else path
        raise TrainingError.mismatch(
            "resume_from_checkpoint", "a directory checkpoint-N of such a run", f"none in {where}"
        )
    return path


@contextlib.contextmanager
def appearing(output_dir: str, name: str, *, leader: bool) -> Iterator[str]:
    """Yield a directory to write ``name`` into; it appears in ``output_dir`` once complete.

    Every process takes part. A run killed while it writes leaves no checkpoint that looks whole.

    Args:
        output_dir: of the run.
        name: of the checkpoint, ``"checkpoint-50"``.
        leader: this process moves it into place: one on every file system.
    """
    staging = Path(output_dir, _STAGING)
    if leader:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
    barrier()
    yield str(staging)
    barrier()
    if leader:
        target = Path(output_dir, name)
        shutil.rmtree(target, ignore_errors=True)
        if (staging / name).exists():
            os.replace(staging / name, target)
        shutil.rmtree(staging, ignore_errors=True)
    barrier()


def _check_same(directory: Path, what: str, expected: object, got: object) -> None:
    if expected != got:
        raise TrainingError.mismatch(f"{what} of {directory}", f"{expected} (this run's)", got)
