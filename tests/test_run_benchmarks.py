"""The run of all benchmarks goes on where it stopped, and judges goals by what was measured."""

import argparse
import importlib.util
import json

import pytest

from tests.scripts import FOLDER, forget_scripts

K = 1024


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
    monkeypatch.setattr(scripts.run, "run_part", lambda part, *_: ran.append(part.name) or True)
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
                {"name": "routers", "length": at_32k, "omega": omega, "static": 1.0,
                 "added": [added, added], "control": [0.0, 0.0]}
                for omega, added in ((0.5, 0.002), (0.75, 0.02))]),
            "decode-128k": record("decode", [
                decode(at_128k, "inductor", "static", 50e-3, graphs=True),
                decode(at_128k, "flux", "static", 9e-3, 0.5),
                {**decode(at_128k, "flux", "flux", 8e-3, 0.5, graphs=True), "run": "yesterday"}]),
            "decode-routers": record("decode", [
                decode(at_128k, "flux", "flux", 8e-3, 0.5),
                decode(at_128k, "flux", "flux", 8.04e-3, 0.5, "router")]),
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
    routers = found["routers against the same fixed routes, decode at 128K"]
    assert (routers.found, routers.met_must, routers.met_aim) == ("+0.50%", True, False)
    assert found["KV bytes at 128K, Ω=0.75, of all tokens'"].met_must is None


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
