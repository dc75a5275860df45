"""The summary: rows for the terminal, and a Markdown file."""

import argparse
from collections.abc import Sequence

from run_goals import Verdict
from run_parts import Part
from run_results import Results

MET = {True: "met", False: "MISSED", None: ""}


def goal_rows(verdicts: Sequence[Verdict]) -> list[dict[str, str]]:
    return [
        {
            "goal": verdict.goal,
            "found": verdict.found,
            "must": f"{verdict.must} {MET[verdict.met_must]}".strip(),
            "aim": f"{verdict.aim} {MET[verdict.met_aim]}".strip(),
            "note": verdict.note,
        }
        for verdict in verdicts
    ]


def part_rows(parts: Sequence[Part], args: argparse.Namespace) -> list[dict[str, str]]:
    return [
        {
            "part": part.name,
            "about": f"{part.minutes:g} min",
            "for goals": "yes" if part.goals else "",
            "beside others": "no" if part.alone else "",
            "command": f"{part.script}.py {' '.join(part.argv(args))}",
        }
        for part in parts
    ]


def bad_rows(results: Results) -> list[dict[str, str]]:
    """What gave no measurement, and why."""
    return [{"part": part, "row": row, "reason": why} for part, row, why in results.bad()]


def markdown(verdicts: Sequence[Verdict], results: Results) -> str:
    """Goals, what ran where, and what gave no measurement."""
    about_all = results.about()
    several = any(about["at_once"] > 1 for about in about_all.values())
    where = [
        {
            "part": part,
            "complete": "yes" if about["complete"] else "no",
            **({"parts at once": str(about["at_once"])} if several else {}),
            **{key: str(about[key]) for key in ("date", "commit", "device", "torch", "triton",
                                                "transformers")},
        }
        for part, about in about_all.items()
    ]  # fmt: skip
    sections = (
        ("Goals", goal_rows(verdicts)),
        ("Where it ran", where),
        ("Not measured", bad_rows(results)),
    )
    return "\n".join(f"## {title}\n\n{_table(rows)}\n" for title, rows in sections if rows)


def _table(rows: Sequence[dict[str, str]]) -> str:
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(x.replace('|', '/') for x in line)} |" for line in lines)
