"""The run of all benchmarks goes on where it stopped, and judges goals by what was measured."""

import argparse
import importlib.util
import json
import os
import re
import sys
from dataclasses import replace

import pytest

from tests.scripts import FOLDER, forget_scripts

K = 1024

# A script as `run.py` sees one: it parses, writes a record, and prints where it runs.
FAKE = """
import argparse, json, os, sys, time
from pathlib import Path

def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser()
    for name in ("--do", "--device", "--lowering", "--json"):
        parser.add_argument(name)
    parser.add_argument("--at-once", type=int, default=1)
    parser.add_argument("--resume", action="store_true")
    return parser.parse_args(arguments)

if __name__ == "__main__":
    args = parse_arguments()
    print("GPU", os.environ.get("CUDA_VISIBLE_DEVICES"), "threads", os.environ["OMP_NUM_THREADS"],
          "cores", len(os.sched_getaffinity(0)), flush=True)
    if args.do == "die":
        sys.exit(3)
    asked = Path(args.json).with_suffix(".asked")
    if args.do == "hang" and not asked.exists():
        asked.touch()
        time.sleep(60)
    environment = dict.fromkeys(("date", "device", "torch", "triton", "transformers"), "x")
    settings = {"do": args.do, "device": args.device, "lowering": args.lowering}
    Path(args.json).write_text(json.dumps({
        "benchmark": "fake", "complete": True, "settings": settings,
        "environment": environment | {"commit": "c0ffee"},
        "results": [{"name": args.do, "run": "today", "at_once": args.at_once}]}))
"""


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import run

    import run_goals
    import run_parts
    import run_plots
    import run_results
    import run_summary

    yield argparse.Namespace(
        run=run,
        goals=run_goals,
        parts=run_parts,
        plots=run_plots,
        summary=run_summary,
        Results=run_results.Results,
    )
    forget_scripts()


def test_what_is_there_is_not_run_again(scripts, monkeypatch, tmp_path, capfd):
    command = ["--device", "cpu", "--tiny", "--lowering", "eager", "--no-plots",
               "--output", str(tmp_path), "--parts", "tiny-memory"]  # fmt: skip
    scripts.run.main(command)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["parts"]["tiny-memory"]["complete"]
    assert "tiny-memory" in (tmp_path / "summary.md").read_text()
    ran = []
    job_of = scripts.run.job_of

    def noted(part, *rest):
        ran.append(part.name)
        return replace(job_of(part, *rest), command=["true"])

    monkeypatch.setattr(scripts.run, "job_of", noted)
    scripts.run.main(command)
    assert not ran
    record = json.loads((tmp_path / "tiny-memory.json").read_text())
    record["environment"]["commit"] = "another"
    (tmp_path / "tiny-memory.json").write_text(json.dumps(record))
    scripts.run.main(command)
    assert ran == ["tiny-memory"]
    scripts.run.main([*command, "--fresh"])
    assert not (tmp_path / "tiny-memory.json").exists()


def test_a_part_that_time_is_too_short_for_is_left(scripts, tmp_path, capfd):
    scripts.run.main(
        ["--device", "cpu", "--tiny", "--no-plots", "--output", str(tmp_path),
         "--minutes", "0.001", "--parts", "tiny-memory", "tiny-decode"]
    )  # fmt: skip
    assert "2 parts are left (tiny-decode, tiny-memory)" in capfd.readouterr().out


@pytest.fixture
def fakes(scripts, monkeypatch, tmp_path):
    """`run.main` on two GPUs, or as it is told, with fake parts of the names and jobs given."""
    (tmp_path / "fake.py").write_text(FAKE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(scripts.run, "FOLDER", tmp_path)
    monkeypatch.setattr(scripts.run, "git_commit", lambda: "c0ffee")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")

    def main(parts, *arguments):
        for module in (scripts.run, scripts.parts):
            monkeypatch.setattr(module, "PARTS", tuple(parts))
        scripts.run.main(["--output", str(tmp_path / "out"), "--no-plots", "--gpus", "2",
                          *arguments])  # fmt: skip
        return tmp_path / "out"

    yield main
    sys.modules.pop("fake", None)


def test_parts_run_side_by_side_longest_first(scripts, fakes, capfd):
    def part(name, do, minutes, **more):
        return scripts.parts.Part(name, "fake", f"--do {do}", minutes, **more)

    parts = [part("short", "write", 1), part("alone", "write", 9, alone=True),
             part("long", "write", 5), part("dies", "die", 3),
             part("later", "write", 8, goals=False)]  # fmt: skip
    folder = fakes(parts)
    said = capfd.readouterr().out
    begun = [line.split()[1].rstrip(":") for line in said.splitlines() if ": begins" in line]
    assert begun == ["long", "dies", "short", "alone", "later"]
    assert "== dies: failed after" in said
    assert "s, status 3" in said
    assert "1 parts failed: dies" in said
    logs = {part.name: (folder / "logs" / f"{part.name}.log").read_text() for part in parts}
    cores = len(os.sched_getaffinity(0))
    share = max(1, cores // 2)
    assert logs["long"] == f"GPU 0 threads {share} cores {share if cores > 1 else cores}\n"
    assert logs["dies"].startswith("GPU 1 ")
    assert logs["alone"] == f"GPU 0 threads 7 cores {cores}\n"
    summary = json.loads((folder / "summary.json").read_text())["parts"]
    assert {name: about["at_once"] for name, about in summary.items()} == {
        "short": 2, "long": 2, "alone": 1, "later": 1,
    }  # fmt: skip
    table = (folder / "summary.md").read_text().split("## Where it ran")[1]
    assert "| parts at once |" in table
    # On one GPU what is there stays, and nothing is limited.
    fakes(parts, "--gpus", "1")
    said = capfd.readouterr().out
    assert [line for line in said.splitlines() if "is there" in line] == [
        f"== {name}: is there" for name in ("short", "alone", "long", "later")
    ]
    assert f"GPU None threads 7 cores {cores}" in said


def test_at_the_limit_parts_are_stopped_and_the_same_command_goes_on(scripts, fakes, capfd):
    parts = [scripts.parts.Part(name, "fake", "--do hang", 1) for name in ("a", "b", "c")]
    folder = fakes(parts, "--minutes", "0.02")
    said = capfd.readouterr().out
    assert "== a: stopped after" in said
    assert "3 parts are left (a, b, c)" in said
    assert not (folder / "c.asked").exists(), "there are two GPUs"
    (folder / "c.asked").touch()
    fakes(parts)
    assert "are left" not in capfd.readouterr().out
    assert (folder / "logs" / "a.log").read_text().startswith("GPU 0 ")
    summary = json.loads((folder / "summary.json").read_text())["parts"]
    assert all(about["complete"] for about in summary.values())


def test_more_gpus_than_there_are_is_refused(scripts, fakes):
    from fluxcompile.errors import OptionError

    with pytest.raises(OptionError, match="at most 2, got 3"):
        fakes([scripts.parts.Part("a", "fake", "--do write", 1)], "--gpus", "3")
    with pytest.raises(SystemExit):
        scripts.run.parse_arguments(["--output", "x", "--device", "cpu", "--gpus", "2"])


@pytest.mark.parametrize("tiny", [False, True], ids=["full", "tiny"])
def test_every_part_can_be_parsed(scripts, tiny):
    args = argparse.Namespace(tiny=tiny, lowering="inductor")
    parts = scripts.parts.TINY if tiny else scripts.parts.PARTS
    assert len({part.name for part in parts}) == len(parts)
    for part in parts:
        parsed = part.parsed(args)
        assert (parsed.device, parsed.tiny) == (part.device, tiny)


def record(benchmark, rows, shape="llama-3.1-8b"):
    rows = [{"run": "today", **row} for row in rows]
    return {"benchmark": benchmark, "complete": True, "settings": {"shape": shape},
            "environment": dict.fromkeys(
                ("date", "commit", "device", "torch", "triton", "transformers", "threads"), "x"),
            "results": rows}  # fmt: skip


def prefill(length, peer, seconds, floor=0.1, **more):
    return {"name": f"{length} tokens: {peer}", "peer": peer, "length": length,
            "median": seconds, "floor": floor, **more}  # fmt: skip


def decode(length, compiler, cache, seconds, omega=0.0, routes="static", graphs=False, floor=1e-3):
    name = f"{compiler}{' + graphs' * graphs}, {cache} cache"
    name += f", Ω={omega:.2f}, {routes}" * (compiler == "flux")
    return {"name": f"KV {length}, batch 1: {name}", "length": length, "batch": 1,
            "compiler": compiler, "cache": cache, "graphs": graphs, "omega": omega,
            "routes": routes, "median": seconds, "floor": floor}  # fmt: skip


def cost(length, omega, static, added, **more):
    return {"name": f"{length}: routers, Ω={omega:.2f}", "length": length, "batch": 1,
            "omega": omega, "routes": "router", "static": static,
            "added": [added - 1, added, added + 1], "control": [0.0, 0.0], **more}  # fmt: skip


@pytest.fixture
def results(scripts):
    at_32k, at_128k = 32 * K, 128 * K
    return scripts.Results(
        {
            "prefill-32k": record("prefill", [
                prefill(at_32k, "eager", 1.2), prefill(at_32k, "inductor", 2.0),
                prefill(at_32k, "flux", 1.0, omega=0.0)]),
            "prefill-128k": record("prefill", [
                prefill(at_128k, "eager", 10.0),
                prefill(at_128k, "flux Ω=0.50", 5.0, floor=4.0, omega=0.5),
                {"name": f"{at_128k} tokens: flux Ω=0.75", "wrong": "logits differ"}]),
            "routers-32k": record("prefill", [
                cost(at_32k, omega, 1.0, added) for omega, added in ((0.5, 0.002), (0.75, 0.02))]),
            "decode-128k": record("decode", [
                decode(at_128k, "inductor", "static", 50e-3, graphs=True),
                decode(at_128k, "flux", "static", 9e-3, 0.5),
                {**decode(at_128k, "flux", "flux", 8e-3, 0.5, graphs=True), "run": "yesterday"}]),
            "decode-routers-128k": record("decode", [
                cost(at_128k, omega, 8e-3, added, graphs=True)
                for omega, added in ((0.0, 0.04e-3), (0.5, -0.01e-3))]),
            "decode-routers-32k": record("decode", [  # as it was before there were pairs
                decode(at_32k, "flux", "flux", 8e-3, 0.5, graphs=True),
                decode(at_32k, "flux", "flux", 9e-3, 0.5, "router", graphs=True)]),
        }
    )  # fmt: skip


def test_goals_are_judged_by_their_rows(scripts, results):
    found = {verdict.goal: verdict for verdict in scripts.goals.goals(results)}
    better = found["prefill 32K, Ω=0, against the better of eager and Inductor"]
    assert (better.found, better.met_must, better.met_aim) == ("1.20×", True, True)
    half = found["prefill 128K, Ω=0.5, against eager"]
    assert (half.value, half.met_must, half.met_aim) == (2.0, True, True)
    assert found["prefill 128K, Ω=0.5, of the floor"].met_aim is False
    wrong = found["prefill 128K, Ω=0.75, against eager"]
    assert (wrong.found, wrong.met_must) == ("—", None)
    plain = found["decode at 128K, Ω=0.5, against Inductor + CUDA graphs"]
    assert plain.value == pytest.approx(6.25)
    assert (plain.met_must, plain.met_aim) == (True, False)
    assert plain.note == "flux + graphs, flux cache, Ω=0.50, static; rows of several runs"
    routers = found["routers against the same fixed routes, prefill 32K"]
    assert (routers.found, routers.met_must) == ("+2.00%", False)
    assert routers.note == "worst of Ω 0.5, 0.75"
    routers = found["routers against the same fixed routes, decode at 128K"]
    assert (routers.found, routers.met_must, routers.met_aim) == ("+0.50%", True, False)
    assert routers.note == "worst of Ω 0, 0.5, with CUDA graphs"
    older = found["routers against the same fixed routes, decode at 32K"]
    assert (older.found, older.met_must, older.note) == ("—", None, "not run")
    assert found["KV bytes at 128K, Ω=0.75, of all tokens'"].met_must is None


def test_goals_read_the_parts_that_are_for_goals(scripts):
    read = set()

    class Seen(dict):
        def get(self, name, default=None):
            read.add(name)
            return default

    scripts.goals.goals(scripts.Results(Seen()))
    assert read == {part.name for part in scripts.parts.PARTS if part.goals}


def test_parts_leave_out_no_row_that_a_goal_reads(scripts):
    """Some parts run only some rows of their script."""
    from memory import contenders as memory_contenders

    from compile_worker import CONTENDERS
    from decode_contenders import contenders, routed_contenders

    args = argparse.Namespace(tiny=False, lowering="inductor")
    parsed = {part.name: part.parsed(args) for part in scripts.parts.PARTS}
    only = parsed["compile"].only
    assert [name for name in CONTENDERS if re.search(only, name)] == [
        "inductor", "flux", "flux regional",
    ]  # fmt: skip
    memory = parsed["memory-128k"]
    assert [one.name for one in memory_contenders(memory) if re.search(memory.only, one.name)] == [
        "eager, dynamic cache", "eager, static cache", "flux, flux cache, Ω=0.75",
        "flux, flux-growing cache, Ω=0.75",
    ]  # fmt: skip
    at_8k = [one for one in contenders(parsed["decode-8k"], 1)
             if re.search(parsed["decode-8k"].only, f"KV 8192, batch 1: {one.name}")]  # fmt: skip
    flux = [(one.cache, one.graphs, one.omega) for one in at_8k if one.compiler == "flux"]
    assert {("flux", True, 0.0), ("static", False, 0.0), ("flux", True, 0.75)} <= set(flux)
    assert ("static", True, 0.75) not in flux
    assert "inductor + graphs, static cache" in [one.name for one in at_8k]
    routers = parsed["decode-routers-128k"]
    assert not [one for one in contenders(routers, 1) if re.search(routers.only, one.name)]
    assert routers.router_pairs
    assert [(one.cache, one.graphs, one.omega) for one in routed_contenders(routers)] == [
        ("flux", True, omega) for omega in (0.0, 0.5, 0.75)
    ]


def test_figures_of_parts_side_by_side_say_so(scripts, results):
    for row in results.records["prefill-32k"]["results"]:
        row["at_once"] = 8
    found = {verdict.goal: verdict for verdict in scripts.goals.goals(results)}
    note = found["prefill 32K, Ω=0, against the better of eager and Inductor"].note
    assert note == "8 parts at once"


def test_summary_names_what_was_not_measured(scripts, results):
    text = scripts.summary.markdown(scripts.goals.goals(results), results)
    assert "wrong: logits differ" in text
    assert "≥ 1.08× met" in text


def test_plots(scripts, results, tmp_path):
    if importlib.util.find_spec("matplotlib") is None:
        pytest.skip("no matplotlib")
    scripts.plots.prefill_plot(results, tmp_path / "prefill.png")
    scripts.plots.decode_plot(results, tmp_path / "decode.png")
    assert {file.name for file in tmp_path.iterdir()} == {"prefill.png", "decode.png"}
