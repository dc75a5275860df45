"""``retarget_router``: a trained router's routes for each task, moved by thresholds."""

import copy
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fluxcompile.errors import DataError
from fluxcompile.layer_router import FULL
from fluxcompile.model_layers import unwrap
from fluxcompile.router import FluxRouter
from fluxcompile.soft_routes import soft_routes
from fluxcompile.training import backbone
from fluxcompile.training.chunked_loss import LOGITS_CHUNK
from fluxcompile.training.language_model import LanguageModel
from fluxcompile.training.patterns import check_served
from fluxcompile.training.route_cost import route_samples
from fluxcompile.training.route_search import Routes, Sample, one_in, searched
from fluxcompile.training.tasks import resolve_tasks
from fluxcompile.training.thresholds import separating_thresholds
from fluxcompile.training.train import collator_for

# Of a share, lest its logit be infinite: such a margin is beyond all doubt.
_EDGE = 1e-7
#: Times that thresholds are chosen: what a layer reads depends on the routes of those before it.
ROUNDS = 2
#: Of a task's prompts, for how many a layer must be full for the search to consider it.
CONSIDERED = 0.1

logger = logging.getLogger(__name__)


def retarget_router(
    model: nn.Module,
    router: FluxRouter,
    data: Iterable[Mapping[str, Any]],
    *,
    tasks: Mapping[str, float | str],
    tokenizer: Any = None,
    batch_size: int = 4,
    max_length: int = 65536,
    lowering: str = "inductor",
    regional: bool = False,
    report: Callable[[str], None] = logger.info,
) -> tuple[FluxRouter, dict[str, float]]:
    """Move a trained router to other shares of sparse attention, task by task, without training.

    For each task the layers to be full are searched: from those that the router makes full for at
    least a tenth of the task's prompts, again and again the one is made sparse that costs the
    targets least of their probability, until the wanted number is left; then single ones are
    exchanged as long as that costs less. Then every layer gets a threshold of its own, the same for
    all prompts, that tells the tasks apart as well as its router can. How sure a router is does not
    say what a layer is worth: where :meth:`FluxRouter.biased` moves all layers and tasks together
    by the one, this asks for the other.

    Args:
        model: a causal language model, not compiled; unchanged afterwards.
        router: trained for ``model``, with a sparse mode that can be trained; unchanged.
        data: as :func:`fluxcompile.train_router` takes it, some tens of examples of each task. They
            are run for every layer that the search tries: at most ``k²/2`` times, with ``k``
            layers that the router considers, and ``k`` times for every exchange. Of 96 or more,
            most tries have a part.
        tasks: name → share of layers to be sparse, as there; here it is of the hard routes, rounded
            to whole layers.
        tokenizer: for data that is text.
        batch_size: examples at once.
        max_length: of an example, in tokens.
        lowering: as the backend's option.
        regional: compile decoder layers one by one, equal ones once.
        report: takes a line for every layer that the search makes sparse, and for what is left.

    Returns:
        A new router, on the CPU; and the share of sparse attention that it reaches on the data, by
        task. Shares cannot always be met: a layer's router may not tell two tasks apart.

    Raises:
        ConfigError: the router's sparse mode has no training graph.
        DataError: data that cannot be used, or no example of a task in ``tasks``.
        RouterError: ``router`` belongs to another model.
        RewriteError: an attention that the compiler cannot route, and why.
        TrainingError: ``model`` is compiled, or cannot be trained.
    """
    model = unwrap(model)
    backbone.check_trainable(model)
    router.check_model(model)
    check_served(router.config)
    known = {name: task for name, task in resolve_tasks(tasks).items() if name in tasks}
    shortest = router.config.sink + router.config.local + 1
    examples = backbone.examples_for(model, data, tokenizer, known, shortest, max_length)
    if missing := sorted(known.keys() - {example.task for example in examples}):
        raise DataError.mismatch("data", f"examples of every task of {sorted(known)}", missing)
    device = next(model.parameters()).device
    moved = copy.deepcopy(router).to(device).eval().requires_grad_(False)
    collate = collator_for(model, known)
    batches: dict[str, list[Mapping[str, Tensor]]] = {}  # of like lengths
    for name in known:
        rows = sorted((row for row in examples if row.task == name), key=len)
        batches[name] = [collate(rows[i : i + batch_size]) for i in range(0, len(rows), batch_size)]
    every = [batch for of_one in batches.values() for batch in of_one]
    with backbone.attached(model, moved), backbone.frozen(model):
        language_model = LanguageModel.of(model).checked(model)
        how = {"regional": regional, "lowering": lowering}
        run = backbone.running(model, language_model.body, moved, **how)
        with backbone.compiler_settings(None):
            margins, of_task, routed = _read(moved, every, run)
            full = torch.zeros(len(known), len(routed), dtype=torch.bool)
            for i_task, (name, task) in enumerate(known.items()):
                mine = of_task == i_task
                samples = route_samples(
                    moved, language_model, run, batches[name], LOGITS_CHUNK, one_in(int(mine.sum()))
                )
                shares = (margins[mine] > 0).double().mean(dim=0)
                count = round((1 - task.target) * len(routed))
                stay = worth_most(
                    samples, len(router.layers), routed, shares, count, _teller(name, report)
                )
                report(f"{name}: layers {stay} stay full")
                full[i_task] = torch.tensor([layer in stay for layer in routed])
            for _ in range(ROUNDS):
                _apply(moved, routed, separating_thresholds(margins, of_task, full))
                margins, of_task, _ = _read(moved, every, run)
    sparse = (margins <= 0).double().mean(dim=1)
    reached = {name: float(sparse[of_task == i_task].mean()) for i_task, name in enumerate(known)}
    return moved.cpu().requires_grad_(True), reached


def _teller(task: str, report: Callable[[str], None]) -> Callable[[int], None]:
    return lambda layer: report(f"{task}: layer {layer} can be sparse")


def worth_most(
    samples: Sequence[Sample],
    layers: int,
    routed: Sequence[int],
    shares: Tensor,
    count: int,
    found: Callable[[int], None] = lambda layer: None,
) -> list[int]:
    """The ``count`` layers to keep full for a task.

    Args:
        samples: of what routes of all ``layers`` layers cost, on ever more of the task's prompts.
        routed: the layers to choose from.
        shares: of the task's prompts, for how many each of these is full.
        found: takes each layer that the greedy search makes sparse, before any are exchanged.
    """
    considered = shares >= CONSIDERED
    if int(considered.sum()) < count:
        considered[:] = True
    choice = [layer for layer, wanted in zip(routed, considered.tolist(), strict=True) if wanted]
    others = set(routed) - set(choice)  # sparse in any case

    def of_choice(sample: Sample) -> Sample:
        def on(routes: Routes) -> Tensor:
            chosen = dict(zip(choice, routes, strict=True))
            return sample(tuple(chosen.get(i, int(i not in others)) for i in range(layers)))

        return on

    narrowed = [of_choice(sample) for sample in samples]
    sparse = len(choice) - count
    _, stay = searched(narrowed, len(choice), sparse, found=lambda i: found(choice[i]))
    return [layer for layer, route in zip(choice, stay, strict=True) if route]


@torch.no_grad()
def _read(
    router: FluxRouter, batches: Sequence[Mapping[str, Tensor]], run: Callable[..., Any]
) -> tuple[Tensor, Tensor, list[int]]:
    """Margins ``[N, L]`` under the router's own hard routes, tasks ``[N]``, and those L layers."""
    device = next(router.parameters()).device
    margins, tasks = [], []
    for batch in batches:
        names = ("input_ids", "attention_mask", "prompt_length")
        ids, mask, length = (batch[name].to(device) for name in names)
        # At temperature 1 a share's logit is the margin; hard, the mixture is what inference does.
        with soft_routes(router, prompt_length=length, hardness=1.0) as soft:
            run(ids, attention_mask=mask, use_cache=False)
        routed = soft.routed.nonzero().flatten().tolist()
        margins.append(soft.shares()[:, routed].double().logit(eps=_EDGE).cpu())
        tasks.append(batch["task_id"])
    return torch.cat(margins), torch.cat(tasks), routed


@torch.no_grad()
def _apply(router: FluxRouter, layers: Sequence[int], thresholds: Tensor) -> None:
    """Take what a margin must exceed from the logit of full attention."""
    for i_layer, threshold in zip(layers, thresholds.tolist(), strict=True):
        router.layers[i_layer].head[-1].bias[FULL] -= threshold
