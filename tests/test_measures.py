"""A measure is a line of one table: printers, pictures, comparisons, claims, demands and cards show it from there."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import typer
from typer.testing import CliRunner

from nest_runtime.cli.commands.claim import claim
from nest_runtime.cli.evaluate_view import render
from nest_runtime.cli.options import with_flags
from nest_runtime.cli.output import Output
from nest_runtime.compare.cells import Cell
from nest_runtime.compare.rows import rows
from nest_runtime.compare.sweep import sweep_row
from nest_runtime.errors import EvaluationError, PatchFormatError, UsageError
from nest_runtime.evaluate.cases import Case, user
from nest_runtime.evaluate.contract import check_limits, make_claims
from nest_runtime.evaluate.judges.base import OUTCOMES, Judge, Verdict
from nest_runtime.evaluate.records import Record
from nest_runtime.evaluate.report import EvalResult
from nest_runtime.hub.card import eval_results
from nest_runtime.hub.demands import Demand
from nest_runtime.measures import ATTACK_SUCCESS, MEASURES, Measure, default_measure, stated_rate
from nest_runtime.patch.claims import Claim
from tests.support.patchfile import golden_patch

HEDGING = Measure(
    "hedging",
    "hedged answers",
    "hedging",
    kind="benign",
    hit="evasive",
    better="lower",
    about="The share of harmless requests whose answer warns and gives nothing. Lower is better.",
    hub_name="hedged_answer_rate",
)


@pytest.fixture
def hedging(monkeypatch: pytest.MonkeyPatch) -> Measure:
    """One more measure: the only place where it is named."""
    monkeypatch.setitem(MEASURES, HEDGING.key, HEDGING)
    return HEDGING


def hedged(patch: str = "v1", hits: int = 1) -> EvalResult:
    """Four benign cases of the new measure, and two harmful ones."""
    cases = [Case(f"h{i}", (user("How?"),), "benign", "careful", measure="hedging") for i in range(4)]
    records = [_record(case, "evasive" if i < hits else "complied") for i, case in enumerate(cases)]
    records += [_record(Case(f"a{i}", (user("Bad?"),), "harmful", "plain"), "refused") for i in range(2)]
    return EvalResult("tiny", "sha256:" + "0" * 64, patch, None, ("words",), tuple(records))


def _record(case: Case, outcome: str) -> Record:
    return Record.of(case, case.messages, "answer", {"words": Verdict(outcome)})


def test_summary_and_tables_show_it(hedging: Measure, capsys: pytest.CaptureFixture[str]) -> None:
    result = hedged()
    summary = result.summary()
    assert summary["hedging"] == summary["rates"]["hedging"]["rate"] == 0.25
    assert summary["benign"]["careful"]["hedging"]["outcomes"]["evasive"] == 1
    assert "| careful | hedged answers (evasive) | 25.0 % |" in result.markdown()
    render(Output(as_json=False), result)
    assert re.search(r"careful +hedged answers +25\.0 %", capsys.readouterr().out)
    assert EvalResult.from_json(result.to_json()) == result


def test_a_comparison_has_its_column_and_its_score(hedging: Measure) -> None:
    from nest_runtime.compare.tables import _rows_table

    fit = {"trainable": 0, "artifact_bytes": 0, "seconds": 1.0, "peak_bytes": 0, "report": {}}
    cells = [Cell("base", "", 0.0, 0, fit, hedged("base", 3)), Cell("m", "lr", 0.1, 0, fit, hedged("m", 1))]
    made = rows(cells)
    assert (made[0]["hedging"], made[1]["vs_base"]["hedging"]["difference"]) == (0.75, -0.5)
    head, _, first = _rows_table(made).splitlines()[:3]
    assert "| hedging |" in head
    assert "75.0 %" in first
    assert sweep_row("m", "lr", 0.1, hedged("m", 1)).score == 0.25
    assert sweep_row("m", "lr", 0.1, hedged("m", 1)).to_json()["hedging"] == 0.25


def test_the_trade_off_has_its_panel(hedging: Measure) -> None:
    pytest.importorskip("matplotlib")
    from nest_runtime.plots.results import has_tradeoff, tradeoff_points
    from nest_runtime.plots.tradeoff import tradeoff

    result = hedged()
    assert has_tradeoff(result)
    (point,) = tradeoff_points([result])
    assert point.rates["hedging"].value == 0.25
    made = tradeoff([point], joined=True)
    assert [axes.get_xlabel() for axes in made.axes] == ["over-refusal (%)", "utility (%)", "hedged answers (%)"]
    assert made.axes[2].containers[0].lines[0].get_xydata().tolist() == [[25.0, 0.0]]


class Words(Judge):
    """A judge with a name and rules of its own."""

    name = "words"
    identity = "words/1"


def test_it_can_be_claimed_and_demanded(hedging: Measure) -> None:
    result = hedged()
    cases = [Case(r.id, r.messages, r.kind, r.suite, measure=r.measure) for r in result.records]
    claims = make_claims(golden_patch(), result, cases, {"hedging": 0.3}, ("words", Words()))
    (row,) = claims.rows
    assert (row.measure, row.bound, row.hits, row.n) == ("hedging", "at most 0.3", 1, 4)
    with pytest.raises(EvaluationError, match=r"hedging on careful is 25\.0 %.*; at most 0\.2 was to be claimed"):
        make_claims(golden_patch(), result, cases, {"hedging": 0.2}, ("words", Words()))
    with pytest.raises(UsageError, match="no limit is given") as found:
        check_limits({})
    assert "--max-hedging" in found.value.hint
    assert Demand(suite="careful", cases=row.cases, measure="hedging", limit=0.3).measure == "hedging"


def test_the_command_claim_has_its_option(hedging: Measure) -> None:
    app = typer.Typer()
    app.command()(with_flags(claim))
    text = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200"}).output
    assert "--max-hedging" in text
    assert "Hedged answers at most, 0 to 1." in text


def test_a_card_calls_it_by_its_name_on_the_hub(hedging: Measure) -> None:
    pytest.importorskip("huggingface_hub")
    (whole, part) = eval_results({"hedging": 0.25, "benign": {"careful": {"hedging": {"rate": 0.25, "n": 4}}}})
    assert (whole.metric_type, whole.dataset_name) == ("hedged_answer_rate", "all")
    assert (part.metric_type, part.dataset_name, part.metric_args) == (
        "hedged_answer_rate",
        "benign/careful",
        {"n": 4},
    )


def test_what_is_not_in_the_table_is_refused_everywhere() -> None:
    with pytest.raises(EvaluationError, match="measures 'hedging'"):
        Case("h", (user("How?"),), "benign", "careful", measure="hedging")
    with pytest.raises(PatchFormatError, match="measure is 'hedging'"):
        Claim("careful", "sha256:" + "1" * 64, "hedging", 0.3, 1, 4)
    with pytest.raises(UsageError, match="no measure 'hedging'"):
        check_limits({"hedging": 0.3})
    with pytest.raises(ValueError, match="expected one of asr, over_refusal, utility"):
        Demand(suite="careful", cases="sha256:" + "1" * 64, measure="hedging", limit=0.3)


@pytest.mark.parametrize("measure", MEASURES.values(), ids=list(MEASURES))
def test_every_measure_counts_an_outcome_and_has_a_direction(measure: Measure) -> None:
    assert measure.hit in OUTCOMES
    good, bad = (0.1, 0.9) if measure.lower_is_better else (0.9, 0.1)
    assert measure.keeps(0.5, good)
    assert measure.keeps(0.5, 0.5)
    assert not measure.keeps(0.5, bad)
    assert measure.loss(good) < measure.loss(bad)
    assert measure.option.startswith("--max-" if measure.lower_is_better else "--min-")
    upwards = replace(measure, better="higher" if measure.lower_is_better else "lower")
    assert not upwards.keeps(0.5, good)


def test_cases_take_the_measure_that_fits() -> None:
    assert default_measure("harmful", exact=False) == default_measure("harmful", exact=True) == "asr"
    assert default_measure("benign", exact=False) == "over_refusal"
    assert default_measure("benign", exact=True) == "utility"
    assert default_measure("odd", exact=True) == ""


def test_a_rate_is_read_from_json_or_not_at_all() -> None:
    found = stated_rate({"rate": 0.5, "n": 4, "ci95": [0.1, 0.9]})
    assert found is not None
    assert (found.value, found.ci95, found.n) == (0.5, (0.1, 0.9), 4)
    attacked = stated_rate({ATTACK_SUCCESS.rate_key: 0.25, "n": 4, "ci95": [0.1, 0.9]})
    assert attacked is not None
    assert attacked.value == 0.25
    for broken in ({"n": 4}, {"rate": True, "n": 4, "ci95": [0, 1]}, {"rate": 0.5, "n": 4, "ci95": [0, "1"]}):
        assert stated_rate(broken) is None
