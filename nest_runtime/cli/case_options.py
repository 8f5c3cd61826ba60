"""Options that eval, claim and compare share: which cases, in which attacks, judged by whom, and how they are asked."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from nest_runtime.cli import complete

JUDGE_NAMES = "reference, local, phrases, hf:MODEL, openai:MODEL"
WORLD_SUITES = "reference, plain, jailbreak-seen, jailbreak-held-out, over-refusal, utility"
STANDARD_SUITES = f"standard (or parts: standard:wild,mmlu), {WORLD_SUITES}"


def suite_option(suites: str) -> Any:
    """``--suite``, with the suites that a command takes."""
    return typer.Option("--suite", metavar="NAME", autocompletion=complete.suites, help=f"{suites}; repeat it.")


SuiteOption = Annotated[list[str] | None, suite_option(WORLD_SUITES)]
StandardOption = Annotated[list[str] | None, suite_option(STANDARD_SUITES)]
DataOption = Annotated[
    Path | None,
    typer.Option(
        "--data",
        metavar="DIR",
        envvar="NEST_TEST_DATA",
        help="The folder of public prompt sets that the standard suite asks.",
    ),
]
CaseFilesOption = Annotated[
    list[str] | None,
    typer.Option("--behaviors", metavar="FILE", help="Cases of a file: HarmBench, XSTest, others; repeat it."),
]
AttacksOption = Annotated[
    list[str] | None,
    typer.Option(
        "--attacks",
        metavar="NAME",
        autocompletion=complete.attacks,
        help="Attack the harmful cases too: all, NAME, NAME:N, a template file; repeat it.",
    ),
]
ClaimedAttacksOption = Annotated[
    list[str] | None,
    typer.Option(
        "--attacks",
        metavar="NAME",
        autocompletion=complete.attacks,
        help="Attack the harmful cases too: all, NAME, NAME:N; repeat it.",
    ),
]
JudgeOption = Annotated[
    str | None,
    typer.Option("--judge", metavar="NAME", autocompletion=complete.judges, help=f"{JUDGE_NAMES}."),
]
JudgesOption = Annotated[
    list[str] | None,
    typer.Option(
        "--judge", metavar="NAME", autocompletion=complete.judges, help=f"{JUDGE_NAMES}; the first one counts."
    ),
]
LimitOption = Annotated[
    int | None, typer.Option("--limit", metavar="N", min=1, help="At most N cases of each suite, drawn by seed.")
]
SampleSeedOption = Annotated[int, typer.Option("--seed", metavar="N", min=0, help="Seed of --limit and --attacks.")]
MaxTokensOption = Annotated[int, typer.Option("--max-tokens", metavar="N", min=1, help="Longest answer, in tokens.")]
BatchSizeOption = Annotated[int, typer.Option("--batch-size", metavar="N", min=1, help="Prompts in one batch.")]
