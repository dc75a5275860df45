"""``fluxcompile doctor``: the findings as lines, or as JSON."""

import json

import typer

from fluxcompile.doctor.checks import examine
from fluxcompile.doctor.finding import Finding, Status

_COLOURS = {Status.OK: "green", Status.WARN: "yellow", Status.FAIL: "red"}


def run_doctor(lowering: str | None = None, as_json: bool = False) -> bool:
    """Print what was found; False if something does not work."""
    findings = []
    for finding in examine(lowering):
        findings.append(finding)
        if not as_json:
            _print(finding)
    works = all(finding.status is not Status.FAIL for finding in findings)
    if as_json:
        report = {"ok": works, "checks": [finding.to_dict() for finding in findings]}
        typer.echo(json.dumps(report, indent=2))
    else:
        typer.echo(_summary(findings))
    return works


def _print(finding: Finding) -> None:
    status = typer.style(f"{finding.status.value:<5}", fg=_COLOURS[finding.status])
    typer.echo(f"{status} {finding.name:<18} {finding.found}")
    if finding.advice:
        typer.echo(f"{'':5} {'':18} → {finding.advice}")


def _summary(findings: list[Finding]) -> str:
    counts = {status: sum(f.status is status for f in findings) for status in Status}
    if counts[Status.FAIL]:
        return f"{counts[Status.FAIL]} of {len(findings)} checks failed"
    if counts[Status.WARN]:
        return f"works; {counts[Status.WARN]} of {len(findings)} checks could be better"
    return "all is well"
