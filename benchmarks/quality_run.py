"""Every contender on the same prompts: what must be computed, in what order, and by whom."""

import argparse
import contextlib
import os
import pickle
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from common import some_gpus, undated
from fluxcompile.config import FluxConfig
from fluxcompile.errors import OptionError
from fluxcompile.evaluation.prompts import KINDS, Cells
from fluxcompile.model_layers import attention_layers
from fluxcompile.training.patterns import serves
from fluxcompile.training.route_search import Routes, with_sparse
from quality_contenders import (
    NamedRouter,
    RouterRun,
    Run,
    StaticRun,
    same_attention,
    sparse_mode,
)
from quality_jobs import Entropies, Exchanged, Full, Greedy, Job, Pattern, Routed
from quality_outcome import Outcome
from quality_partial import Partial, prompts_digest, weights_digest
from quality_pool import InPlace, Spread
from quality_static import EXCHANGED, SEARCHED, counterparts, counts_of
from quality_worker import Worker, load
from slots import threads_each

#: by method and number of sparse layers
Exchanges = Mapping[tuple[str, int], Exchanged]

#: settings that decide what a job finds, whichever it is; others decide which jobs there are
DECISIVE = (
    "device", "dtype", "lowering", "regional", "batch", "tasks", "search_length", "search_examples",
    "search_by", "seed", "style",
)  # fmt: skip


class Bench:
    """Runs contenders in two stages: those that stand by themselves, then their counterparts.

    Args:
        pool: does the jobs.
        partial: keeps what they find.
        layers: attention layers of the model.
        args: of the command line.
    """

    def __init__(
        self, pool: InPlace | Spread, partial: Partial, layers: int, args: argparse.Namespace
    ) -> None:
        self.disagreement: float | None = None  # the largest found between the two compiles
        self._pool, self._partial, self._layers, self._args = pool, partial, layers, args
        self._found: dict[str, Outcome] = {}  # by key: what two names have in common runs once

    def run(
        self,
        configs: Sequence[FluxConfig],
        routers: Sequence[NamedRouter],
        given: Mapping[str, Routes],
    ) -> list[Run]:
        """Full attention, the routers, and static patterns for every kind of sparse attention.

        Args:
            configs: of the routers; or one for the patterns, where there are no routers.
            routers: to judge.
            given: patterns by name.
        """
        distinct: list[FluxConfig] = []
        for config in configs:
            if not any(same_attention(config, other) for other in distinct):
                distinct.append(config)
        full_job = Full(configs[0])
        routed = [self._routed(named) for named in routers]
        searches = self._searches(distinct, bool(routers))
        # The search is the longest: with others at work it begins first. Alone it comes last, and
        # leaves its compile to the patterns.
        last = self._args.gpus == 1
        jobs = [full_job, *_by_config(routed)]
        self._do([*jobs, *searches] if last else [*searches[::-1], *jobs])

        found = self._of(full_job)
        full = Run("full", full_job.config, found.results, found.through, found.seconds)
        routers_run = []
        for named, job in zip(routers, routed, strict=True):
            found = self._of(job)
            routers_run.append(
                RouterRun(named.name, job.config, found.results, found.through, found.seconds,
                          source=named)
            )  # fmt: skip
        return [full, *routers_run, *self._statics(distinct, full, routers_run, given, searches)]

    def _routed(self, named: NamedRouter) -> Routed:
        config = named.router.config
        graph = self._args.through == "graph" and serves(config)
        digest = weights_digest(named.router)
        through = "graph" if graph else "user"
        return Routed(named.name, config, named.directory, named.bias, digest, through)

    def _searches(self, distinct: Sequence[FluxConfig], routed: bool) -> list[Job]:
        """As deep as any router could ask for."""
        for config in distinct:
            if left_out := set(self._args.methods) - set(self._methods(config)):
                print(
                    f"no patterns of {sparse_mode(config)} by {sorted(left_out)}: a search wants "
                    "attention that can be trained, which has one compile for every pattern, and "
                    "prompts of its kind"
                )
        asked = [count for count in self._args.sparse_layers if 0 < count < self._layers]
        depth = self._layers - 1 if routed else max(asked, default=0)
        jobs: list[Job] = []
        if depth and "entropy" in self._args.methods:
            jobs.append(Entropies())
        # The last compile is the one that the patterns begin with.
        jobs += [
            Greedy(config, depth, method, SEARCHED[method])
            for config in reversed(distinct)
            for method in dict.fromkeys(EXCHANGED.get(m, m) for m in self._methods(config))
            if depth and method in SEARCHED
        ]
        return jobs

    def _exchanges(
        self, config: FluxConfig, routers: Sequence[RouterRun], searches: Sequence[Job]
    ) -> Exchanges:
        """For every number of sparse layers that is to be matched."""
        orders = self._orders(config, searches)
        counts = counts_of(self._layers, _alike(routers, config), self._args.sparse_layers)
        return {
            (method, count): Exchanged(
                config, with_sparse(orders[after][:count], self._layers), method, SEARCHED[after]
            )
            for method in self._methods(config)
            if (after := EXCHANGED.get(method))
            for count in counts
        }

    def _methods(self, config: FluxConfig) -> list[str]:
        """Those that were asked for, without searches that cannot be made."""
        kinds = {None, *(KINDS[task] for task in self._args.tasks)}
        return [
            method
            for method in self._args.methods
            if (searched := EXCHANGED.get(method, method)) not in SEARCHED
            or (serves(config) and SEARCHED[searched] in kinds)
        ]

    def _statics(
        self,
        distinct: Sequence[FluxConfig],
        full: Run,
        routers: Sequence[RouterRun],
        given: Mapping[str, Routes],
        searches: Sequence[Job],
    ) -> list[StaticRun]:
        expected = {cell: result.loss for cell, result in full.results.items()}
        exchanges: dict[FluxConfig, Exchanges] = {
            config: self._exchanges(config, routers, searches) for config in distinct
        }

        def jobs_with(exchanges: Mapping[FluxConfig, Exchanges]) -> list[Pattern]:
            jobs = []
            for config in distinct:
                label = "" if len(distinct) == 1 else f" {sparse_mode(config)}"
                patterns = self._patterns(
                    config, routers, given, searches, exchanges.get(config, {})
                )
                jobs += [
                    Pattern(name + label, config, routes, expected)
                    for name, routes in patterns.items()
                ]
            return jobs

        # Patterns that need no exchange keep those busy who have none to make.
        self._do([*(job for some in exchanges.values() for job in some.values()), *jobs_with({})])
        jobs = jobs_with(exchanges)
        self._do(jobs)
        runs = []
        for job in jobs:
            found = self._of(job)
            runs.append(
                StaticRun(job.name, job.config, found.results, found.through, found.seconds,
                          routes=job.routes)
            )  # fmt: skip
            if found.apart is not None:
                self.disagreement = max(self.disagreement or 0.0, found.apart)
        return runs

    def _patterns(
        self,
        config: FluxConfig,
        routers: Sequence[RouterRun],
        given: Mapping[str, Routes],
        searches: Sequence[Job],
        exchanges: Exchanges,
    ) -> dict[str, Routes]:
        found = counterparts(
            self._layers, _alike(routers, config), self._methods(config),
            self._orders(config, searches),
            {key: self._of(job).order for key, job in exchanges.items()},
            also=self._args.sparse_layers, seed=self._args.seed,
        )  # fmt: skip
        return {"all sparse": (0,) * self._layers} | dict(given) | found

    def _orders(self, config: FluxConfig, searches: Sequence[Job]) -> dict[str, tuple[int, ...]]:
        """What the searches for ``config`` have found, by method."""
        orders = {}
        for job in searches:
            if isinstance(job, Entropies):
                orders["entropy"] = self._of(job).order
            elif job.config == config:
                orders[job.method] = self._of(job).order
        return orders

    def _of(self, job: Job) -> Outcome:
        return self._found[self._partial.key(job)]

    def _do(self, jobs: Sequence[Job]) -> None:
        """All of them, but for those that have been done before."""
        left: dict[str, Job] = {}
        for job in jobs:
            key = self._partial.key(job)
            if key in self._found or key in left:
                continue
            kept = self._partial.read(key) if self._args.resume else None
            if kept is None:
                left[key] = job
            else:
                self._found[key] = Outcome.from_bytes(kept)
                print(f"{job.name}: {self._found[key]}, kept from before")
        keys = list(left)
        for i_job, data in self._pool(list(left.values())):
            key = keys[i_job]
            self._partial.keep(left[key], key, data)
            self._found[key] = Outcome.from_bytes(data)
            print(f"{left[key].name}: {self._found[key]}", flush=True)


def partial_results(
    model: nn.Module, cells: Cells, where: Mapping[str, Any], args: argparse.Namespace
) -> Partial:
    """What earlier runs with these very arguments have found, under ``--output``."""
    common = {
        "model": weights_digest(model),
        "prompts": prompts_digest(cells),
        "settings": {name: getattr(args, name) for name in DECISIVE},
        "where": undated(where),
    }
    return Partial(args.output / "partial", common)


@contextlib.contextmanager
def pool_of(
    model: nn.Module, tokenizer: Any, cells: Cells, args: argparse.Namespace
) -> Iterator[InPlace | Spread]:
    """This process for ``--gpus 1``, else as many others, which load the model for themselves."""
    if args.gpus == 1:
        worker = Worker(model, tokenizer, cells, args)
        with contextlib.closing(worker), InPlace(worker) as pool:
            yield pool
        return
    with tempfile.TemporaryDirectory() as folder:
        # Sent with the start of a process it would have to wait for each one's imports.
        file = Path(folder) / "work.pickle"
        file.write_bytes(pickle.dumps((args, cells)))
        with Spread(partial(_prepared, file), environments(args.device, args.gpus)) as pool:
            yield pool


def environments(device: str, count: int) -> list[dict[str, str]]:
    """Variables of each of ``count`` workers: a GPU of its own and its share of the cores.

    Raises:
        OptionError: there are not so many GPUs.
    """
    if device == "cpu":
        return [{} for _ in range(count)]
    gpus = some_gpus(count)
    share = str(threads_each(count))
    threads = {
        name: os.environ.get(name, share)
        for name in ("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS")
    }
    return [{"CUDA_VISIBLE_DEVICES": gpu, **threads} for gpu in gpus]


def _alike(routers: Sequence[RouterRun], config: FluxConfig) -> list[RouterRun]:
    """Those whose sparse attention is that of ``config``."""
    return [run for run in routers if same_attention(run.config, config)]


def _by_config(routed: Sequence[Routed]) -> list[Routed]:
    """Those of one config together: a worker keeps one compile open."""
    configs = list(dict.fromkeys(job.config for job in routed))
    return sorted(routed, key=lambda job: configs.index(job.config))


def check_patterns(given: Mapping[str, Routes], layers: int) -> None:
    """Refuse patterns of another model before anything takes time.

    Raises:
        OptionError: naming the first.
    """
    for name, routes in given.items():
        if len(routes) != layers:
            raise OptionError.mismatch(f"--static {name}", f"{layers} entries", len(routes))


def layers_of(model: nn.Module) -> int:
    """How many attention layers."""
    return len(attention_layers(model))


def _prepared(file: Path) -> Callable[[Job], bytes]:
    args, cells = pickle.loads(file.read_bytes())
    return Worker(*load(args), cells, args, shown=False)
