"""The mixture through AOTAutograd and Inductor: gradients, precision, memory, recomputation."""

import pytest
import torch

from fluxcompile.mixing import mix
from tests.parity.models import prompt
from tests.training import cases
from tests.training.cases import LONG


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_aot_eager(kind, padding):
    case = cases.compiled(cases.trainable(kind), lowering="aot_eager")
    batch, noise = prompt(3, LONG, padding), None
    for _ in range(2):
        got = cases.compiled_step(case, batch, noise)
        cases.assert_same(got, cases.eager_step(case, batch, noise))
        noise = cases.noise_for(case.router, 3)


def test_aot_eager_triangle_with_symbolic_lengths():
    case = cases.trainable("llama", sparse="triangle", last=5)
    cases.compiled(case, lowering="aot_eager", dynamic=True)
    for rows, length in ((2, LONG), (3, LONG + 8)):
        batch, prompts = prompt(rows, length, "left"), torch.arange(rows) + length - 12
        got = cases.compiled_step(case, batch, None, prompts)
        cases.assert_same(got, cases.eager_step(case, batch, None, prompt_length=prompts))


def test_inductor():
    """Two lengths of one graph, in fp32, with a training step in between."""
    case = cases.compiled(
        cases.trainable("qwen3", dtype=torch.float32), lowering="inductor", dynamic=True
    )
    for rows, length in ((2, LONG), (3, LONG + 8)):
        batch, noise = prompt(rows, length, "left"), cases.noise_for(case.router, rows)
        got = cases.compiled_step(case, batch, noise)
        cases.assert_same(got, cases.eager_step(case, batch, noise), rtol=2e-3, shares=1e-4)
        with torch.no_grad():
            for p in case.router.parameters():
                p.sub_(0.1 * p.grad)


def test_gradients_in_bfloat16():
    """No further from fp64 than twice what eager bf16 is, over several prompts' gradients."""
    low = cases.trainable("llama", dtype=torch.bfloat16)
    exact = cases.trainable("llama")
    exact.model.load_state_dict(low.model.state_dict())  # the same rounded weights
    cases.compiled(low, lowering="aot_eager")
    eager = ours = 0.0
    for seed in range(4):
        batch = prompt(2, LONG, "left", seed=seed)
        expected = cases.eager_step(exact, batch, None)
        eager += _error(cases.eager_step(low, batch, None), expected)
        ours += _error(cases.compiled_step(low, batch, None), expected)
    assert ours <= 2 * eager


def _error(found: cases.Step, expected: cases.Step) -> float:
    """Worst relative error of a parameter's gradient."""
    errors = ((found.gradients[n] - e).norm() / e.norm() for n, e in expected.gradients.items())
    return max(errors).item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gradient_of_a_share(dtype):
    """It sums small differences of large numbers, with only the operands' own rounding."""
    generator = torch.Generator().manual_seed(0)
    full, grad = (torch.randn(2, 300, 4, 16, generator=generator) for _ in range(2))
    sparse = full + 0.02 * torch.randn(2, 300, 4, 16, generator=generator)
    full, sparse, grad = full.to(dtype), sparse.to(dtype), grad.to(dtype)
    share = torch.tensor([0.3, 0.8], requires_grad=True)
    mix(full, sparse, share).backward(grad)
    exact = (grad.double() * (full.double() - sparse.double())).sum(dim=(1, 2, 3))
    torch.testing.assert_close(share.grad.double(), exact, rtol=1e-4, atol=1e-5)


def test_mixture_at_its_ends_is_one_of_the_two():
    full, sparse = torch.randn(2, 5, 2, 4) * 1e-4, torch.randn(2, 5, 2, 4) * 1e4
    out = mix(full, sparse, torch.tensor([1.0, 0.0]))
    assert torch.equal(out[0], full[0])
    assert torch.equal(out[1], sparse[1])


class Saved:
    """Counts what autograd saves inside it, parameters apart."""

    def __init__(self) -> None:
        self._storages: dict[int, int] = {}
        self.tensors: list[torch.Tensor] = []

    @property
    def bytes(self) -> int:
        return sum(self._storages.values())

    def __enter__(self):
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda x: x)
        self._hooks.__enter__()
        return self

    def __exit__(self, *problem):
        self._hooks.__exit__(*problem)

    def _pack(self, x: torch.Tensor) -> torch.Tensor:
        if not isinstance(x, torch.nn.Parameter):
            storage = x.untyped_storage()
            self._storages[storage.data_ptr()] = storage.nbytes()
            self.tensors.append(x)
        return x


def test_nothing_wide_is_kept():
    """What the mixture keeps for its backward is the two attentions, in the model's dtype."""
    torch._dynamo.reset()
    mixed = torch.compile(mix, backend="aot_eager_decomp_partition", fullgraph=True)
    full, sparse = (torch.randn(2, 9, 4, 16, dtype=torch.bfloat16) for _ in range(2))
    share = torch.tensor([0.3, 0.8], requires_grad=True)
    with Saved() as saved:
        mixed(full.requires_grad_(), sparse.requires_grad_(), share)
    large = [x for x in saved.tensors if x.numel() == full.numel()]
    assert [x.dtype for x in large] == [torch.bfloat16] * 2


def test_recomputation_by_memory_budget():
    """The partitioner may recompute our operators: less is saved, the gradients are the same."""
    batch = prompt(2, LONG, "left")
    found = {}
    for budget in (1.0, 0.2):
        case = cases.trainable("llama", overrides={"num_hidden_layers": 4})
        with torch._functorch.config.patch(activation_memory_budget=budget):
            cases.compiled(case, lowering="aot_eager")
            with Saved() as saved:
                step = cases.compiled_step(case, batch, None)
            found[budget] = step, saved.bytes
    cases.assert_same(found[0.2][0], found[1.0][0])
    assert found[0.2][1] < 0.6 * found[1.0][1]
