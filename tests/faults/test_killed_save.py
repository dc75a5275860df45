"""``save_pretrained`` killed at any system call that matters: the old router or the new one."""

import subprocess
import sys

import pytest
import torch

from fluxcompile.router import FluxRouter
from tests.router_models import random_router

#: (function of os, which call of it) at which a process that saves another router is killed
CALLS = {
    ("fsync", 1): "the new weights are not on disk",
    ("fsync", 2): "the new config is not",
    ("link", 1): "both are new nowhere",
    ("replace", 1): "both are on disk, under other names",
    ("replace", 2): "new weights beside the old config",
}
#: one process for all, as starting one takes seconds: it forks, and each child is killed
SCRIPT = """
import os, signal, sys
from fluxcompile import FluxConfig, FluxRouter

router = FluxRouter(FluxConfig(sink=7), layer_names=["a"], head_dim=8)

def save(name, at, directory):
    real, calls = getattr(os, name), []

    def killing(*args, **kwargs):
        calls.append(args)
        if len(calls) == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    setattr(os, name, killing)
    router.save_pretrained(directory)

for case in sys.argv[2:]:
    name, at = case.split("-")
    child = os.fork()
    if child == 0:
        save(name, int(at), os.path.join(sys.argv[1], case))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (case, status)
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The router that was there before, and a directory for each call."""
    root, old = tmp_path_factory.mktemp("killed"), random_router()
    names = [f"{name}-{at}" for name, at in CALLS]
    for name in names:
        old.save_pretrained(root / name)
    command = [sys.executable, "-c", SCRIPT, str(root), *names]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return old, root


@pytest.mark.parametrize(("name", "at"), CALLS, ids=CALLS.values())
def test_the_old_router_is_intact(killed, name, at):
    old, root = killed
    loaded = FluxRouter.from_pretrained(root / f"{name}-{at}")
    assert loaded.config == old.config
    assert all(map(torch.equal, loaded.parameters(), old.parameters()))


def test_the_next_save_is_not_in_the_way(killed):
    _, root = killed
    directory, other = root / "replace-2", random_router(head_dim=8)
    other.save_pretrained(directory)
    assert FluxRouter.from_pretrained(directory).head_dim == 8
    assert not (directory / ".model.safetensors.previous").exists()
