"""Everything that was measured, as JSON."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fluxcompile.evaluation.compare import omega, quality
from fluxcompile.evaluation.evaluate import CellResult
from fluxcompile.evaluation.intervals import LEVEL, RESAMPLES
from quality_contenders import RouterRun, Run, StaticRun
from quality_goals import Verdict
from quality_run import Bench


def as_record(
    where: dict, args: argparse.Namespace, bench: Bench, runs: Sequence[Run],
    verdicts: Sequence[Verdict],
) -> dict[str, Any]:  # fmt: skip
    settings = {
        name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()
    }
    full = runs[0].results
    return {
        "benchmark": "quality",
        "environment": where,
        "settings": settings,
        "intervals": {"level": LEVEL, "resamples": RESAMPLES, "seed": args.seed},
        "two_compiles_of_full_attention_apart": bench.disagreement,
        "runs": [_run(run, full, args.seed) for run in runs],
        "goals": [_verdict(verdict) for verdict in verdicts],
    }


def _run(run: Run, full: dict, seed: int) -> dict[str, Any]:
    about: dict[str, Any] = {"name": run.name, "kind": run.kind, "through": run.through}
    if isinstance(run, RouterRun):
        about |= {"recipe": run.source.recipe, "directory": run.source.directory,
                  "bias": run.source.bias}  # fmt: skip
    if run.sparse is not None:
        about["sparse"] = run.sparse
    if isinstance(run, StaticRun):
        about["routes"] = list(run.routes)
    return {
        **about,
        "flux_config": run.config.to_dict(),
        "seconds": run.seconds,
        "omega": omega(run.results),
        "quality": quality(run.results, full, seed=seed)._asdict(),
        "cells": [_cell(result, seed) for result in run.results.values()],
    }


def _cell(result: CellResult, seed: int) -> dict[str, Any]:
    return {
        "task": result.cell.task,
        "length": result.cell.length,
        "metric": result.cell.metric,
        "prompts": len(result.values),
        **result.estimate(seed)._asdict(),
        "loss": float(result.loss.mean()),
        "omega": float(result.omega.mean()),
        "share_full": [round(x, 4) for x in result.full.double().mean(dim=0).tolist()],
        "values": [round(x, 5) for x in result.values.tolist()],
    }


def _verdict(verdict: Verdict) -> dict[str, Any]:
    found = None if verdict.found is None else _finite(verdict.found._asdict())
    return {**vars(verdict), "found": found}


def _finite(numbers: dict[str, float]) -> dict[str, float | None]:
    return {name: x if x == x else None for name, x in numbers.items()}
