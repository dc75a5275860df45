"""A predicate on its way to the host."""

import pytest
import torch
from torch._inductor.utils import run_and_get_code

from fluxcompile.errors import KernelError
from fluxcompile.kernels import ops

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
ROWS = [(True,), (False,), (True, True, False), (False, False), (True,) * 70, (False,) * 70]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", ROWS, ids=lambda rows: f"{sum(rows)}-of-{len(rows)}")
def test_arrives(rows, device):
    given = torch.tensor(rows, device=device)
    every = ops.await_flag(ops.send_flag(given))
    some = ops.await_flag(ops.send_flag(given, any_row=True))
    assert every.device.type == some.device.type == "cpu"
    assert every.item() is all(rows)
    assert some.item() is any(rows)


@pytest.mark.parametrize("device", DEVICES)
def test_rows_of_a_wider_tensor(device):
    routes = torch.tensor([[True, False], [True, False]], device=device)
    flags = [ops.await_flag(ops.send_flag(rows)).item() for rows in routes.unbind(1)]
    assert flags == [True, False]


@pytest.mark.gpu
def test_arrives_whatever_the_device_does_meanwhile():
    """Many flags under way at once, behind and before long work, each keeps its own value."""
    work = torch.randn(4096, 4096, device="cuda")
    for _ in range(5):
        values = (torch.rand(20, 1, device="cuda") < 0.5).unbind()
        sent = []
        for value in values:
            sent.append(ops.send_flag(value.logical_not().logical_not()))
            work = work @ work / 64
        arrived = [ops.await_flag(flag).item() for flag in sent]
        assert arrived == [value.item() for value in values]


@pytest.mark.parametrize("device", DEVICES)
def test_operators_keep_their_contract(device):
    rows = torch.tensor([True, False], device=device)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.flux.send_flag.default, (rows, True), test_utils=tests)
    sent = torch.tensor(True), [rows]
    torch.library.opcheck(torch.ops.flux.await_flag.default, sent, test_utils=tests)


def test_inductor_waits_behind_what_is_to_be_launched_first():
    def step(x, weight):
        sent = ops.send_flag(x.sum(-1) > 0)
        y = x @ weight
        return torch.where(ops.await_flag(sent, [y]), y, x)

    x, weight = torch.rand(8, 8), torch.randn(8, 8)
    out, (code,) = run_and_get_code(torch.compile(step), x, weight)
    places = [code.index(call) for call in ("flux.send_flag", "extern_kernels.mm", "await_flag")]
    assert places == sorted(places)
    torch.testing.assert_close(out, x @ weight)


def test_refuses_what_is_no_flag():
    with pytest.raises(KernelError, match=r"expected bool \[B\]"):
        ops.send_flag(torch.ones((), dtype=torch.bool))
    with pytest.raises(KernelError, match=r"expected bool \[B\]"):
        ops.send_flag(torch.ones(2))
    with pytest.raises(KernelError, match=r"expected bool \[\] on cpu"):
        ops.await_flag(torch.tensor(1))
