"""Serves prompts as one of two processes: started by test_serving.py, by path.

Arguments: rank, port, a directory with the models, and the jobs as JSON: a list of objects with
``name``, ``kind``, ``parallel`` ("tensor" or "data"), ``calls`` ("forward", "generate"), and
perhaps ``lowering``. Each leaves what it computed in ``NAME-RANK.pt``, or an ``error`` in it.
"""

import json
import os
import sys
import traceback
from pathlib import Path


def main() -> None:
    rank, port, directory, jobs = sys.argv[1:]
    os.environ |= {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": "1",
    }
    sys.path.insert(0, str(Path(__file__).parents[2]))  # of `tests`, not of bare `passes`
    import torch

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    for job in json.loads(jobs):
        try:
            result = serve(int(rank), Path(directory), **job)
        except Exception:
            result = {"error": traceback.format_exc()}
        torch.save(result, Path(directory, f"{job['name']}-{rank}.pt"))
    torch.distributed.destroy_process_group()


def serve(
    rank: int,
    directory: Path,
    name: str,
    kind: str,
    parallel: str,
    calls: tuple[str, ...],
    lowering: str = "eager",
) -> dict:
    """Logits and routes of a prompt, or greedy tokens with theirs, or both."""
    import torch
    from transformers import AutoModelForCausalLM

    import fluxcompile
    from tests.parallel.cases import GIVEN, NEW, row_of
    from tests.parity.harness import compiled, forward, generate

    torch._dynamo.reset()
    plan = {"tp_plan": "auto"} if parallel == "tensor" else {}
    model = AutoModelForCausalLM.from_pretrained(directory / kind, **plan)
    model.eval().requires_grad_(False)
    fluxcompile.attach(model, fluxcompile.FluxRouter.from_pretrained(directory / f"{kind}-router"))
    made = compiled(model, lowering=lowering, strict=True)
    given = GIVEN if parallel == "tensor" else row_of(GIVEN, rank)
    result = {}
    if "forward" in calls:
        result["logits"] = forward(model, given, use_cache=False)
        result["routes"] = fluxcompile.routes(model).fa
    if "generate" in calls:
        got = generate(model, given, NEW)
        result |= {"tokens": got.tokens, "token_logits": got.logits}
        result["generated_routes"] = fluxcompile.routes(model).fa
    heads = {str(row.query_shape) for report in made.reports for row in report.rows}
    return result | {"became": made.became, "heads": heads}


if __name__ == "__main__":
    main()
