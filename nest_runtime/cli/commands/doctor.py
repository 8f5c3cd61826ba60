"""The command doctor: whether this installation is in order, and what to do where it is not (doctor/)."""

from __future__ import annotations

from typing import Annotated

import typer

from nest_runtime.cli.common import examples
from nest_runtime.cli.output import JsonOption, Output

STYLES = {"ok": "green", "note": "yellow", "problem": "bold red"}


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command(
        "doctor",
        rich_help_panel="Look",
        epilog=examples("nest-runtime doctor", "nest-runtime doctor --timeout 2 --json"),
    )(doctor)


def doctor(
    ctx: typer.Context,
    timeout: Annotated[
        float, typer.Option("--timeout", metavar="SECONDS", min=0.1, help="How long the Hub may take to answer.")
    ] = 5.0,
    as_json: JsonOption = False,
) -> None:
    """Check versions, devices, caches, the store, trust and the Hub, and say what to do.

    Exits with 1 where something will not work. Nothing is changed.
    """
    from nest_runtime.cli.commands.hub import quiet_client
    from nest_runtime.doctor import PROBLEM, examine

    out = Output.of(ctx, as_json)
    quiet_client(ctx)
    with out.bars() as bars:
        findings = []
        for number, finding in enumerate(examine(timeout), start=1):
            findings.append(finding)
            bars("looking", number, 0)
    problems = sum(finding.status == PROBLEM for finding in findings)

    def render() -> None:
        """A row for each finding, and one for what to do about it."""
        rows: list[tuple[str, str, str]] = []
        for item in findings:
            rows.append((item.status, item.name, item.found))
            rows += [(" ", " ", f"-> {item.advice}")] if item.advice else []
        out.table(("", "WHAT", "FOUND"), rows, styles=STYLES)
        out.line()
        out.line("all is well" if not problems else f"{problems} problem{'s' if problems > 1 else ''}, see above")

    out.result({"ok": not problems, "checks": [finding.to_json() for finding in findings]}, render)
    if problems:
        raise typer.Exit(1)
