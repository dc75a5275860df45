"""A predicate on its way to the host."""

import pytest
import torch
from torch._inductor.utils import run_and_get_code

from fluxcompile.errors import KernelError
from fluxcompile.kernels import ops

from . import cases

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("value", [True, False], ids=cases.name)
def test_arrives(value, device):
    sent = ops.send_flag(torch.tensor(value, device=device))
    arrived = ops.await_flag(sent)
    assert arrived.device.type == "cpu"
    assert arrived.item() is value


@pytest.mark.gpu
def test_arrives_whatever_the_device_does_meanwhile():
    """Many flags under way at once, behind and before long work, each keeps its own value."""
    work = torch.randn(4096, 4096, device="cuda")
    for _ in range(5):
        values = (torch.rand(20, device="cuda") < 0.5).unbind()
        sent = []
        for value in values:
            sent.append(ops.send_flag(value.logical_not().logical_not()))
            work = work @ work / 64
        arrived = [ops.await_flag(flag).item() for flag in sent]
        assert arrived == [value.item() for value in values]


@pytest.mark.parametrize("device", DEVICES)
def test_operators_keep_their_contract(device):
    flag = torch.tensor(True, device=device)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.flux.send_flag.default, (flag,), test_utils=tests)
    torch.library.opcheck(torch.ops.flux.await_flag.default, (flag.cpu(), [flag]), test_utils=tests)


def test_inductor_waits_behind_what_is_to_be_launched_first():
    def step(x, weight):
        sent = ops.send_flag(x.sum() > 0)
        y = x @ weight
        return torch.where(ops.await_flag(sent, [y]), y, x)

    x, weight = torch.randn(8, 8), torch.randn(8, 8)
    out, (code,) = run_and_get_code(torch.compile(step), x, weight)
    places = [code.index(call) for call in ("flux.send_flag", "extern_kernels.mm", "await_flag")]
    assert places == sorted(places)
    torch.testing.assert_close(out, x @ weight if x.sum() > 0 else x)


def test_refuses_what_is_no_flag():
    with pytest.raises(KernelError, match=r"expected bool \[\]"):
        ops.send_flag(torch.ones(2, dtype=torch.bool))
    with pytest.raises(KernelError, match=r"expected bool \[\]"):
        ops.await_flag(torch.tensor(1))
