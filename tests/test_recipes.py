"""The recipes of the ablation parse, and the script that trains them minds its processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fluxcompile.cli import app
from fluxcompile.training import command
from fluxcompile.training.arguments import RouterTrainingArguments
from fluxcompile.training.tasks import resolve_tasks

FOLDER = Path(__file__).parents[1] / "benchmarks"
FILE = FOLDER / "recipes" / "smollm2.json"
NAMES = (
    "paper", "paper-fast", "first-variant", "cross-entropy", "distilled", "soft", "suffix-16",
    "with-prefix", "half", "retrieval-0.55", "long", "answerable", "answerable-0.6", "triangle",
    "triangle-0.7", "triangle-0.6", "triangle-start", "triangle-start-0.53", "triangle-start-0.63",
    "triangle-start-96", "triangle-0.85", "triangle-32", "longer", "longer-8k", "longer-24",
    "longer-0.65", "longer-sure", "longer-prefix", "long-24", "batch-24",
)  # fmt: skip

STEPS = {
    "long": 350, "long-24": 175, "longer": 800, "longer-8k": 560, "longer-0.65": 800,
    **{name: 20 for name in NAMES if name.startswith("triangle-start")},
    "longer-sure": 800, "longer-prefix": 800,
}  # fmt: skip

# What `fluxcompile train` does, as far as the script can see: a log, a checkpoint, a router.
FAKE = """
import json, os, sys, time
from pathlib import Path

arguments = sys.argv[1:]
value = lambda name: arguments[len(arguments) - 1 - arguments[::-1].index(name) + 1]
output, seed, steps = Path(value("--output")), int(value("--seed")), int(value("--steps"))
print("threads", os.environ["OMP_NUM_THREADS"], "gpu", os.environ.get("CUDA_VISIBLE_DEVICES"))
if "--fail" in arguments:
    sys.exit(7)
folder = output / f"checkpoint-{steps}"
folder.mkdir(parents=True, exist_ok=True)
logs = {"step": steps, "temperature": 1.0, "lm_loss/retrieval": 0.5 + seed,
        "routed_sparsity/retrieval": 0.45, "sparsity/retrieval": 0.4}
history = [logs, {"train_runtime": 1.0, "step": steps}]
(folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
if "--hang" in arguments and "--resume" not in arguments:
    time.sleep(600)
(output / "config.json").write_text(json.dumps({"format": "fluxcompile-router"}))
(output / "model.safetensors").write_text("")
"""


@pytest.fixture
def recipes(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import recipes

    yield recipes
    for name in ("recipes", "recipes_file", "recipes_run", "slots", "common"):
        sys.modules.pop(name, None)


@pytest.fixture
def fake(tmp_path):
    """Command line of the script with its trainer replaced; recipes quick, failing, hanging."""
    (tmp_path / "fake.py").write_text(FAKE)
    own = {"quick": [], "failing": ["--fail"], "hanging": ["--hang"]}
    entries = {name: {"why": f"{name}.", "arguments": own[name]} for name in own}
    content = {"common": ["smollm2", "--steps", "5"], "recipes": entries}
    (tmp_path / "recipes.json").write_text(json.dumps(content))
    return [
        sys.executable, str(FOLDER / "recipes.py"), "--cpu",
        "--recipes", str(tmp_path / "recipes.json"), "--output", str(tmp_path / "runs"),
        "--command", f"{sys.executable} {tmp_path / 'fake.py'}",
    ]  # fmt: skip


def call(command: list[str], *arguments: str) -> subprocess.CompletedProcess:
    # A script finds its neighbours beside itself, unless this is set.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"}
    return subprocess.run(
        [*command, *arguments], capture_output=True, text=True, env=environment, check=False
    )


def parsed(arguments: list[str], monkeypatch, output: Path) -> dict:
    """What ``fluxcompile train`` makes of ``arguments``, up to the training itself."""
    seen: dict = {}

    def train_router(
        model, rows, *, tasks, config, output_dir, tokenizer, model_card_kwargs, **given
    ):
        given["use_cpu"] = True
        seen.update(
            tasks={name: task.target for name, task in resolve_tasks(tasks).items()},
            config=config,
            training=RouterTrainingArguments.of_run(given, output_dir, str(output)),
        )

    def mixture(tokenizer, **recipe):
        seen["mixture"] = recipe
        return []

    monkeypatch.setattr(command, "load_model", lambda *_: (None, object()))
    monkeypatch.setattr("fluxcompile.training.train.train_router", train_router)
    monkeypatch.setattr("fluxcompile.training.data.builtin_mixture", mixture)
    result = CliRunner().invoke(app, ["train", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return seen


def test_the_recipes_are_those_of_the_ablation(recipes):
    found = recipes.read_recipes(FILE)
    assert tuple(recipe.name for recipe in found) == NAMES
    assert all(recipe.why.endswith((".", "?")) for recipe in found)


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_parses(recipes, monkeypatch, tmp_path, name):
    (recipe,) = recipes.read_recipes(FILE, [name])
    arguments = recipes.Run(recipe, 3).arguments(tmp_path)
    seen = parsed(arguments, monkeypatch, tmp_path)
    training, config = seen["training"], seen["config"]
    steps = STEPS.get(name, 400)
    triangle = name.startswith("triangle")
    assert (training.max_steps, training.seed) == (steps, 3)
    assert training.lowering == ("inductor" if triangle else "eager")
    assert training.regional == triangle
    assert config.sparse == ("triangle" if triangle else "streaming")
    assert (config.sink, config.local) == (64, 512)
    assert seen["mixture"]["examples"] >= steps * training.batch_size, "none comes twice"
    assert seen["tasks"].keys() == {"retrieval", "holistic"}


def test_what_the_recipes_say(recipes, monkeypatch, tmp_path):
    def of(name):
        (recipe,) = recipes.read_recipes(FILE, [name])
        return parsed(recipes.Run(recipe, 0).arguments(tmp_path), monkeypatch, tmp_path)

    paper, best, long = of("paper"), of("distilled"), of("long")
    assert paper["tasks"] == {"retrieval": 0.45, "holistic": 1.0}
    assert (paper["training"].learning_rate, paper["training"].distillation) == (5e-4, 0)
    assert paper["config"].pooling == recipes_pooling(100, 100)
    assert best["config"].pooling == recipes_pooling(0, 32)
    assert (best["training"].distillation, best["training"].hardness) == (1, 1)
    assert (of("cross-entropy")["training"].distillation, of("half")["training"].distillation) == (
        0, 0.5,
    )  # fmt: skip
    assert of("soft")["training"].hardness == 0
    assert of("retrieval-0.55")["tasks"] == {"retrieval": 0.55, "holistic": 0.9}
    assert long["mixture"]["length"] == [2048, 4096, 8192]
    assert long["training"].per_device_train_batch_size == 3
    assert long["tasks"] == {"retrieval": 0.65, "holistic": 1.0}
    assert of("batch-24")["training"].batch_size == 24
    targets = {name: of(name)["tasks"]["retrieval"] for name in NAMES if "triangle" in name}
    assert targets == {
        "triangle": 0.75, "triangle-0.6": 0.6, "triangle-0.7": 0.7, "triangle-0.85": 0.85,
        "triangle-32": 0.75, "triangle-start": 0.5667, "triangle-start-0.53": 0.5333,
        "triangle-start-0.63": 0.6333, "triangle-start-96": 0.5667,
    }  # fmt: skip
    assert (of("triangle")["config"].last, of("triangle-32")["config"].last) == (128, 32)
    assert of("triangle")["mixture"] == of("answerable")["mixture"]


def recipes_pooling(prefix: int, suffix: int):
    from fluxcompile import FluxConfig

    return FluxConfig(prefix_size=prefix, suffix_size=suffix).pooling


def test_unknown_recipes_and_bad_files_are_refused(recipes, tmp_path):
    from fluxcompile.errors import ConfigError

    with pytest.raises(ConfigError, match=r"--only.*papre"):
        recipes.read_recipes(FILE, ["papre"])
    bad = tmp_path / "bad.json"
    bad.write_text('{"common": "smollm2", "recipes": {}}')
    with pytest.raises(ConfigError, match="list of strings"):
        recipes.read_recipes(bad)


def test_runs_are_trained_and_recorded(fake, tmp_path):
    """One that fails is told, and the others go on."""
    done = call(fake, "--only", "failing", "quick", "--seeds", "0", "1", "--steps", "9")
    assert done.returncode == 1, done.stderr
    assert "failing-0: failed (7)" in done.stdout
    record = json.loads((tmp_path / "runs" / "recipes.json").read_text())
    assert {"date", "commit", "device"} <= record["environment"].keys()
    assert {run["name"]: run["outcome"] for run in record["runs"]} == {
        "failing-0": "failed", "failing-1": "failed", "quick-0": "done", "quick-1": "done",
    }  # fmt: skip
    quick = [run for run in record["runs"] if run["name"].startswith("quick")]
    assert [run["final"]["lm_loss/retrieval"] for run in quick] == [0.5, 1.5]
    assert quick[0]["final"]["step"] == 9, "--steps overrides the recipe's"
    assert quick[0]["arguments"][:3] == ["smollm2", "--steps", "5"]
    threads = len(os.sched_getaffinity(0))
    assert f"threads {threads}" in (tmp_path / "runs" / "quick-0.log").read_text()
    assert "quick-1: done (0) after" in done.stdout
    assert f"--router quick={tmp_path / 'runs' / 'quick-0'} " in done.stdout
    assert not list((tmp_path / "runs").glob("*/checkpoint-*"))


def test_the_limit_stops_and_resuming_goes_on(fake, tmp_path):
    done = call(fake, "--only", "hanging", "--seeds", "0", "1", "--seconds", "1.5")
    assert done.returncode == 3
    assert "hanging-0: stopped" in done.stdout
    assert "hanging-1: not begun" in done.stdout
    done = call(fake, "--only", "hanging", "--seeds", "0", "--resume")
    assert done.returncode == 0, done.stdout
    again = call(fake, "--only", "hanging", "--seeds", "0", "--resume")
    assert "0 runs" in again.stdout
    assert again.returncode == 0


def test_no_process_outlives_the_script(fake, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"}
    script = subprocess.Popen(
        [*fake, "--only", "hanging", "--seeds", "0"], env=environment, stdout=subprocess.DEVNULL
    )
    state = tmp_path / "runs" / "hanging-0" / "checkpoint-5" / "trainer_state.json"
    until = time.monotonic() + 60
    while not state.exists() and time.monotonic() < until:
        time.sleep(0.1)
    script.send_signal(signal.SIGTERM)
    assert script.wait(30) == 128 + signal.SIGTERM
    commands = [read(file) for file in Path("/proc").glob("[0-9]*/cmdline")]
    assert not [text for text in commands if str(tmp_path / "fake.py") in text]


def read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""


def test_gpus_go_by_the_names_that_processes_are_given(recipes, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert recipes.visible_gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-5")
    assert recipes.visible_gpus() == ["3", "GPU-5"]
