"""The command claim, which writes a patch with its claims, and the part of verify that measures them again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nest_runtime.cli import complete
from nest_runtime.cli.case_options import (
    BatchSizeOption,
    CaseFilesOption,
    ClaimedAttacksOption,
    JudgeOption,
    LimitOption,
    SampleSeedOption,
    SuiteOption,
)
from nest_runtime.cli.common import base_hash_of, examples, model_for, where_is, writable_file
from nest_runtime.cli.measuring import LimitFlags, cases_of, interval
from nest_runtime.cli.options import with_flags
from nest_runtime.cli.output import DeviceOption, DtypeOption, JsonOption, ModelOption, Output, percent
from nest_runtime.errors import BaseMismatch, ClaimsRefused, EvaluationError, SiteMismatch, UsageError
from nest_runtime.escape import short
from nest_runtime.io import expand
from nest_runtime.measures import ATTACK_SUCCESS, MEASURES, measures_of

if TYPE_CHECKING:
    from nest_runtime.evaluate import Case, EvalResult, Judge
    from nest_runtime.evaluate.contract import Checked
    from nest_runtime.model.load import LoadedModel
    from nest_runtime.patch.claims import Claims
    from nest_runtime.patch.patch import Patch

BehaviorsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--behaviors", metavar="FILE", help="Cases that the claims are about, beside the package's suites; repeat it."
    ),
]
AllowJudge = Annotated[
    str | None,
    typer.Option(
        "--judge",
        metavar="NAME",
        autocompletion=complete.judges,
        help="The judge of the claims, where it is none of the package: it is asked by this word only.",
    ),
]


ClaimedPatch = Annotated[
    str, typer.Argument(metavar="PATCH", autocompletion=complete.patches, help="v3, name@v3, or a file.")
]
OutOption = Annotated[Path, typer.Option("--out", metavar="FILE", help="The new patch file, with its claims.")]
ClaimedTokensOption = Annotated[
    int, typer.Option("--max-tokens", metavar="N", min=1, max=65536, help="Longest answer, in tokens.")
]
NewVersionOption = Annotated[
    str | None,
    typer.Option("--version", metavar="NAME", help="A new version's name, with the next serial; the same without."),
]


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command(
        "claim",
        rich_help_panel="Trust",
        epilog=examples(
            "nest-runtime claim v3 --max-asr 0.05 --min-utility 0.9 --out v3.safetensors",
            "nest-runtime claim v3 --suite plain --suite over-refusal \\",
            "  --max-asr 0.05 --max-over-refusal 0.1 --out v3.safetensors",
            "nest-runtime verify v3.safetensors --claims",
        ),
    )(with_flags(claim))


def claim(
    ctx: typer.Context,
    patch: ClaimedPatch,
    out_file: OutOption,
    limits: Annotated[dict[str, float], LimitFlags()],
    suite: SuiteOption = None,
    behaviors: CaseFilesOption = None,
    attacks: ClaimedAttacksOption = None,
    judge: JudgeOption = None,
    limit: LimitOption = None,
    seed: SampleSeedOption = 0,
    max_tokens: ClaimedTokensOption = 64,
    version: NewVersionOption = None,
    model: ModelOption = "reference",
    batch_size: BatchSizeOption = 64,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Measure a patch, and write it anew with what its publisher promises: suites by digest, judge, limits, figures.

    Nothing is written where a limit is broken. The new file has another digest: sign it afterwards.
    """
    from nest_runtime.evaluate.contract import check_limits, claimed_attacks, make_claims, prepared
    from nest_runtime.evaluate.judges import make_judge
    from nest_runtime.evaluate.run import check_judges
    from nest_runtime.evaluate.suites import default_judge

    out, target = Output.of(ctx, as_json), expand(out_file)
    check_limits(limits)
    writable_file(target)
    names = claimed_attacks(attacks or [])
    model = model_for(ctx, out, model, patch)
    cases = prepared(cases_of(model, suite or [], behaviors or []), limit=limit, seed=seed, attacks=names)
    judge = judge or default_judge(cases)
    own = make_judge(judge, device=device)
    check_judges([own])
    session = ClaimSession.open(model, patch, batch_size, device, dtype)
    subject = _subject(session.patch, version)
    with out.bars() as bars:
        result = session.measure(cases, own, max_tokens, bars)
    claims = make_claims(
        subject,
        result,
        cases,
        limits,
        (judge, own),
        attacks=names,
        cases_per_suite=limit,
        seed=seed,
        max_tokens=max_tokens,
    )
    _write(out, subject.evolve(claims=claims), target, claims)


def _write(out: Output, claimed: Patch, target: Path, claims: Claims) -> None:
    """Write the patch with its claims, and report them."""
    claimed.save(target)
    document = {
        "file": str(target),
        "digest": claimed.digest,
        "name": claimed.name,
        "version": claimed.version,
        "serial": claimed.serial,
        "claims": claims.to_json(),
    }

    def render() -> None:
        """The table of claims, and what to do next."""
        columns = ("SUITE", "MEASURE", "LIMIT", "MEASURED", "N")
        rows = [(row.suite, row.measure, row.bound, percent(row.value), row.n) for row in claims.rows]
        out.table(columns, rows, right=columns[3:])
        out.line(f"wrote {claimed.label} ({short(claimed.digest)}) to {target}")
        if {row.measure for row in claims.rows} == {ATTACK_SUCCESS.key}:
            others = " or ".join(measure.title for measure in measures_of("benign"))
            out.note(f"a low {ATTACK_SUCCESS.title} alone says nothing: claim {others} beside it")
        out.note(f"next: nest-runtime sign {target} --key KEY")

    out.result(document, render)


def _subject(patch: Patch, version: str | None) -> Patch:
    """The patch to make claims about: without earlier ones, and under the version asked for."""
    bare = patch.evolve(claims=None)
    if version is None or version == patch.version:
        return bare
    return bare.evolve(version=version, serial=patch.serial + 1, parent=patch.parent)


@dataclass(frozen=True)
class ClaimSession:
    """A model and a patch, loaded to be measured."""

    loaded: LoadedModel
    patch: Patch
    batch_size: int

    @classmethod
    def open(cls, model: str, patch: str | Patch, batch_size: int, device: str, dtype: str) -> ClaimSession:
        """Load both, and check that they fit. Raises BaseMismatch if they do not."""
        from nest_runtime.model.load import load_model
        from nest_runtime.resolve import load_patch
        from nest_runtime.runtime import PatchRuntime

        loaded = load_model(model, device=device, dtype=dtype)
        chosen = load_patch(patch, model_hash=loaded.hash) if isinstance(patch, str) else patch
        try:
            with PatchRuntime(loaded.model, base_hash=loaded.hash) as runtime:
                runtime.add(chosen)
        except SiteMismatch as error:
            if loaded.hash == chosen.base_hash:
                raise
            raise BaseMismatch(
                f"{model} is not the base that the patch was made on: {error.message}", error.hint
            ) from error
        return cls(loaded, chosen, batch_size)

    def measure(self, cases: list[Case], judge: Judge, max_tokens: int, bars: Any) -> EvalResult:
        """Answer the cases under the patch, and judge them."""
        from nest_runtime.evaluate import evaluate

        return evaluate(
            self.loaded.model,
            self.loaded.reader,
            cases,
            judge,
            patch=self.patch,
            model_name=self.loaded.name,
            base_hash=self.loaded.hash,
            batch_size=self.batch_size,
            max_new_tokens=max_tokens,
            progress=bars,
        )


@dataclass(frozen=True)
class Means:
    """What whoever checks claims has: the model, cases and a judge that may be asked."""

    model: str
    behaviors: list[str] = field(default_factory=list)
    judge: str | None = None
    batch_size: int = 64
    device: str = "auto"
    dtype: str = "auto"


def check(out: Output, patch: Patch, means: Means) -> list[Checked]:
    """Measure a patch's claims again. Raises EvaluationError if it has none, BaseMismatch on another model."""
    from nest_runtime.evaluate import load_behaviors
    from nest_runtime.evaluate.contract import check_claims
    from nest_runtime.evaluate.run import check_judges

    claims = patch.claims
    if claims is None:
        raise EvaluationError(
            f"{patch.label} ({short(patch.digest)}) carries no claims",
            "its publisher makes them with `nest-runtime claim`",
        )
    given = [case for file in means.behaviors for case in load_behaviors(file)]

    def measure(cases: list[Case], judge: Judge) -> EvalResult:
        check_judges([judge])
        session = ClaimSession.open(means.model, patch, means.batch_size, means.device, means.dtype)
        with out.bars() as bars:
            return session.measure(cases, judge, claims.max_tokens, bars)

    return check_claims(claims, measure, given=given, judge=means.judge)


def prover(out: Output, model: str | None, behaviors: list[str] | None, judge: str | None) -> Callable[[Patch], None]:
    """Gives what measures a patch's claims, each patch once, and raises ClaimsRefused unless every one holds."""
    proven: set[str] = set()

    def prove(patch: Patch) -> None:
        """Measure a patch's claims; a patch that was proven before passes at once."""
        if patch.digest in proven:
            return
        found = check(out, patch, means_for(patch, model, behaviors, judge))
        lost = [row for row in found if not row.ok]
        if lost:
            raise ClaimsRefused(
                f"{len(lost)} of {len(found)} claims of {patch.label} do not hold: {say(lost[0])}",
                "see them all with `nest-runtime verify PATCH --claims`",
            )
        proven.add(patch.digest)
        out.note(f"{len(found)} of {len(found)} claims of {patch.label} hold")

    return prove


def say(row: Checked) -> str:
    """One claim in words."""
    claim = row.claim
    what = f"{MEASURES[claim.measure].title} on {claim.suite}, {claim.bound}"
    return f"{what}, is {row.rate}" if row.rate is not None else f"{what}: not checkable, {row.why}"


def render_checked(out: Output, rows: list[Checked]) -> None:
    """The table of claims, and what is missing where something is."""
    columns = ("SUITE", "MEASURE", "LIMIT", "CLAIMED", "NOW", "95 % CI", "N", "STATE")
    cells = []
    for row in rows:
        claim, rate = row.claim, row.rate
        measured = ("-", "-", "-") if rate is None else (percent(rate.value), interval(rate.ci95), rate.n)
        cells.append((claim.suite, claim.measure, claim.bound, percent(claim.value), *measured, row.state))
    out.table(columns, cells, right=columns[3:7], styles={"failed": "red", "not checkable": "yellow"})
    for why in dict.fromkeys(row.why for row in rows if row.why):
        out.line(f"not checkable: {why}")


def means_for(
    patch: Patch,
    model: str | None,
    behaviors: list[str] | None = None,
    judge: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
) -> Means:
    """What a command's options give to check with; without ``--model`` the patch's base, where that is known.

    Raises:
        BaseMismatch: it is not known.
    """
    if model is not None and model.startswith("sha256:"):
        raise UsageError("--model is a hash; claims are measured on a model", "name the model itself")
    if model is None:
        known = patch.base_hash == base_hash_of("reference")
        model = "reference" if known else where_is(patch.base_hash, patch.base_model, patch.label)
    return Means(model, behaviors or [], judge, device=device, dtype=dtype)
