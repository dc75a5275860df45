"""What a router is held to on SmolLM2-135M, and whether it gets there."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from fluxcompile.errors import DataError
from fluxcompile.evaluation import Cell
from fluxcompile.evaluation.compare import (
    Measure,
    certainty,
    context_awareness,
    judged,
    metric,
    omega,
    quality_difference,
    relative,
    relative_difference,
    retrieval_and_loss,
)
from fluxcompile.evaluation.intervals import Estimate
from quality_contenders import RouterRun, Run, StaticRun, same_attention
from quality_static import sparse_layers

NEEDLE = {4096: 0.97, 8192: 0.92}  # accuracy over full attention's, by length
NEEDLE_OMEGA = 0.5
OTHERS = 0.93
LOSS = 0.035  # over full attention's
LOSS_OMEGA = 0.75
AWARENESS = 0.2
GAIN = 1e-3  # of full attention's quality: rounding in two compiles is no gain
# Of retrieval by the probability of right answers: what two patterns differ in moves few answers.
BETTER_RETRIEVAL = "retrieval over every static's at equal Ω, at any loss: interval > 0"
BETTER_QUALITY = f"quality over the best static's at equal Ω: interval > {GAIN}"

Compared = Mapping[str, list[Cell]]


@dataclass(frozen=True)
class Verdict:
    """One goal of one router.

    Attributes:
        found: with an interval where there is one.
        omega: of the prompts it was found on, where the goal bounds it.
        met: by the value found (against static patterns: by the whole interval); None where it
            cannot be judged, for the reason in ``note``.
    """

    router: str
    recipe: str
    goal: str
    found: Estimate | None
    omega: float | None
    met: bool | None
    note: str = ""


def goals(runs: Sequence[Run], seed: int) -> list[Verdict]:
    """Every goal of every router."""
    full = runs[0]
    routers = [run for run in runs if isinstance(run, RouterRun)]
    statics = [run for run in runs if isinstance(run, StaticRun)]
    return [verdict for run in routers for verdict in _Judge(run, full, seed).all(statics)]


class _Judge:
    def __init__(self, run: RouterRun, full: Run, seed: int) -> None:
        self.run, self.full, self.seed = run, full.results, seed
        self.results = run.results

    def all(self, statics: Sequence[StaticRun]) -> list[Verdict]:
        verdicts = [self._needle(length, bound) for length, bound in NEEDLE.items()]
        others = dict.fromkeys(
            cell.task for cell in self.full if cell.kind == "retrieval" and cell.task != "needle"
        )
        verdicts += [self._other(task) for task in others]
        return [*verdicts, self._loss(), self._awareness(), *self._static(statics)]

    def _needle(self, length: int, bound: float) -> Verdict:
        goal = f"needle at {length} ≥ {bound} of full, Ω ≥ {NEEDLE_OMEGA}"
        return self._accuracy(goal, [Cell("needle", length)], bound, NEEDLE_OMEGA)

    def _other(self, task: str) -> Verdict:
        cells = [cell for cell in self.full if cell.task == task]
        return self._accuracy(f"{task} ≥ {OTHERS} of full", cells, OTHERS, None)

    def _accuracy(
        self, goal: str, cells: list[Cell], bound: float, least_omega: float | None
    ) -> Verdict:
        if not all(cell in self.full for cell in cells):
            return self._verdict(goal, note="not run")
        good = [cell for cell in cells if cell in judged(self.full)]
        if not good:
            return self._verdict(goal, note="full attention fails it")
        found = relative(self.results, self.full, good, seed=self.seed)
        share = omega(self.results, good)
        met = found.value >= bound and (least_omega is None or share >= least_omega)
        left = [str(cell.length) for cell in cells if cell not in good]
        note = f"without {', '.join(left)}: full attention fails it" if left else ""
        return self._verdict(goal, found, share, met, note)

    def _loss(self) -> Verdict:
        goal = f"code and prose: loss ≤ {LOSS:+.1%} over full, Ω ≥ {LOSS_OMEGA}"
        cells = retrieval_and_loss(self.full)["loss"]
        if not cells:
            return self._verdict(goal, note="not run")
        over = relative(self.results, self.full, cells, seed=self.seed)
        found = Estimate(*(value - 1 for value in over))
        share = omega(self.results, cells)
        return self._verdict(goal, found, share, found.value <= LOSS and share >= LOSS_OMEGA)

    def _awareness(self) -> Verdict:
        goal = f"Ω(holistic) − Ω(retrieval) ≥ {AWARENESS} at every length"
        try:
            found = {n: context_awareness(self.results, n) for n in {c.length for c in self.full}}
        except DataError as problem:
            return self._verdict(goal, note=str(problem))
        least = min(found.values())
        note = ", ".join(f"{value:+.2f} at {n}" for n, value in sorted(found.items()))
        estimate = Estimate(least, float("nan"), float("nan"))
        return self._verdict(goal, estimate, None, least >= AWARENESS, note)

    def _static(self, statics: Sequence[StaticRun]) -> list[Verdict]:
        """On retrieval and loss; of in-context learning full attention knows too little here."""
        count = sparse_layers(self.results)
        rivals = [
            rival
            for rival in statics
            if rival.sparse_layers == count and same_attention(rival.config, self.run.config)
        ]
        compared = retrieval_and_loss(self.full)
        verdicts = []
        for goal, judge, cells in (
            (BETTER_RETRIEVAL, self._retrieval, compared["retrieval"]),
            (BETTER_QUALITY, self._quality, [cell for some in compared.values() for cell in some]),
        ):
            if rivals and cells:
                verdicts.append(judge(rivals, cells, compared))
            else:
                note = (
                    "not run" if rivals else f"no static pattern of {count} sparse layers was run"
                )
                verdicts.append(self._verdict(goal, note=note))
        return verdicts

    def _retrieval(
        self, rivals: Sequence[StaticRun], cells: list[Cell], compared: Compared
    ) -> Verdict:
        """Against the most that a fixed pattern keeps of retrieval, whatever loss it has for it.

        So no pattern of the router's loss, or of less, keeps as much.
        """
        best, found = _hardest(rivals, lambda rival: self._apart(rival, cells, certainty))
        return self._against(BETTER_RETRIEVAL, best, found, found.low > 0, compared)

    def _quality(
        self, rivals: Sequence[StaticRun], cells: list[Cell], compared: Compared
    ) -> Verdict:
        """Retrieval and loss together, a percent of the one for a percent of the other."""
        ours, settings = self.results, {"by": certainty, "seed": self.seed}
        best, found = _hardest(
            rivals,
            lambda rival: quality_difference(ours, rival.results, self.full, cells, **settings),
        )
        return self._against(BETTER_QUALITY, best, found, found.low > GAIN, compared)

    def _against(
        self, goal: str, best: StaticRun, found: Estimate, met: bool, compared: Compared
    ) -> Verdict:
        measures = {
            "probability": ("retrieval", certainty),
            "accuracy": ("retrieval", metric),
            "loss": ("loss", metric),
        }
        apart = [
            f"{name} {self._apart(best, compared[kind], by).value:+.3f}"
            for name, (kind, by) in measures.items()
            if compared[kind]
        ]
        note = ", ".join([f"{best.name}, Ω {omega(best.results):.2f}", *apart])
        return self._verdict(goal, found, omega(self.results), met, note)

    def _apart(self, rival: StaticRun, cells: list[Cell], by: Measure) -> Estimate:
        """What the router has minus what the rival has, in shares of what full attention has."""
        both = self.results, rival.results
        return relative_difference(*both, self.full, cells, by, seed=self.seed)

    def _verdict(
        self,
        goal: str,
        found: Estimate | None = None,
        share: float | None = None,
        met: bool | None = None,
        note: str = "",
    ) -> Verdict:
        source = self.run.source
        return Verdict(source.name, source.recipe, goal, found, share, met, note)


def _hardest(
    rivals: Sequence[StaticRun], ahead: Callable[[StaticRun], Estimate]
) -> tuple[StaticRun, Estimate]:
    """The rival that the router is the least ahead of, and by how much."""
    return min(((rival, ahead(rival)) for rival in rivals), key=lambda pair: pair[1].value)
