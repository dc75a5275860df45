"""Training runs as one of several processes: started by test_processes.py, by path.

Arguments: rank, number of processes, port, and the runs as JSON: a list of objects with
``directory``, ``arguments`` and perhaps ``fields``, changes to the configuration, ``poisoned``, the
example whose loss is NaN, or ``adapt``, to fine-tune the backbone instead. What a run raised is
left in its directory, in ``error-RANK.txt``.
"""

import dataclasses
import json
import os
import sys
from pathlib import Path

POISON = 60  # a token


def main() -> None:
    rank, world, port, runs = sys.argv[1:]
    os.environ |= {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world,
        "LOCAL_WORLD_SIZE": world,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
    }
    sys.path.insert(0, str(Path(__file__).parents[2]))  # of `tests`, not of bare `passes`
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(int(rank))
    for run in json.loads(runs):
        error = train(**run)
        Path(run["directory"], f"error-{rank}.txt").write_text(error)
    torch.distributed.destroy_process_group()


def train(
    directory: str,
    arguments: dict,
    fields: dict | None = None,
    poisoned: int | None = None,
    adapt: bool = False,
) -> str:
    """One run; returns its error, or nothing."""
    import torch

    from fluxcompile import FluxRouter, adapt_backbone, train_router
    from tests.training.tiny import CONFIG, QUICK, tiny_data, tiny_model

    data, model = tiny_data(), tiny_model()
    if poisoned is not None:
        with torch.no_grad():
            model.model.embed_tokens.weight[POISON] = float("nan")
        for row in data:
            row["input_ids"] = [min(token, POISON - 1) for token in row["input_ids"]]
        data[poisoned]["input_ids"][-1] = POISON
    try:
        config = dataclasses.replace(CONFIG, **(fields or {}))
        settings = QUICK | {"ddp_backend": "gloo", "config": config} | arguments
        if adapt:
            del settings["config"]
            router = FluxRouter.from_model(model, CONFIG)
            adapt_backbone(model, router, data, output_dir=directory, **settings)
        else:
            train_router(model, data, output_dir=directory, **settings)
    except Exception as error:
        import traceback

        traceback.print_exc()
        return f"{type(error).__name__}: {error}"
    return ""


if __name__ == "__main__":
    main()
