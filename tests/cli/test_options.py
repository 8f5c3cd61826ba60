"""Options made from settings: what a command is given, and that a new setting is written in one place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer

from nest_runtime.cli.commands import train
from nest_runtime.cli.options import Flags, with_flags
from nest_runtime.cli.training import recipe_of
from nest_runtime.errors import UsageError
from nest_runtime.settings import described, required, setting
from nest_runtime.train.recipe import Recipe
from tests.support.pages import reference

REFERENCE = reference()  # it reads the commands as they are, so before a test changes one


@dataclass(frozen=True)
class Filling:
    kind: str = required("What is in it.", flag="--filling")
    grams: int = setting(20, "How much.", low=1, high=500, flag="--grams")


@dataclass(frozen=True)
class Bread:
    flour: str = setting("rye", "The flour.", choices=("rye", "wheat"), flag="--flour")
    seeds: tuple[str, ...] = setting((), "Seeds.", flag="--seed")
    rest: float = setting(90.0, "How long it rests.", duration=True, flag="--rest", metavar="TIME")
    salted: bool = setting(True, "Leave the salt out.", flag="--no-salt")
    crust: str = setting("soft", "The crust.", flag="--hard/--soft", pair=("hard", "soft"))
    tin: Path | None = setting(None, "Its tin.", flag="--tin")
    filling: Filling | None = None
    baker: str = setting("me", "Not on the command line.")
    size: int = field(default=1)


def run(arguments: list[str], flags: Flags) -> dict[str, Any]:
    """What a command with these flags is given."""
    app, got = typer.Typer(), {}

    def bake(*, loaves, given):  # type: ignore[no-untyped-def]
        got.update(given, loaves=loaves)

    bake.__annotations__ = {"loaves": int, "given": Annotated[Mapping[str, Any], flags]}
    bake.__kwdefaults__ = {"loaves": 1}
    app.command()(with_flags(bake))
    typer.main.get_command(app).main(args=arguments, standalone_mode=False)
    return got


def test_defaults_are_those_of_the_fields() -> None:
    given = run([], Flags(Bread))
    assert given.pop("loaves") == 1
    assert given == {
        "flour": "rye",
        "seeds": (),
        "rest": 90.0,
        "salted": True,
        "crust": "soft",
        "tin": None,
        "filling": None,
    }
    assert Bread(**given) == Bread()


def test_values_are_those_of_the_fields() -> None:
    words = [
        "--flour",
        "wheat",
        "--seed",
        "a",
        "--seed",
        "b",
        "--rest",
        "2m",
        "--no-salt",
        "--hard",
        "--tin",
        "t",
        "--filling",
        "jam",
        "--loaves",
        "3",
    ]
    assert run(words, Flags(Bread)) == {
        "flour": "wheat",
        "seeds": ("a", "b"),
        "rest": 120.0,
        "salted": False,
        "crust": "hard",
        "tin": Path("t"),
        "filling": Filling("jam", 20),
        "loaves": 3,
    }


def test_a_detail_of_what_was_not_asked_for_is_refused() -> None:
    with pytest.raises(UsageError, match="--grams is given without --filling"):
        run(["--grams", "30"], Flags(Bread))
    assert run(["--grams", "20"], Flags(Bread))["filling"] is None  # the default, whoever said it


def test_what_is_not_given_can_be_told_from_a_default() -> None:
    assert run(["--soft"], Flags(Bread, only=("flour", "crust", "rest"), unset=True)) == {
        "flour": None,
        "crust": "soft",
        "rest": None,
        "loaves": 1,
    }


def test_fields_can_be_left_to_the_command() -> None:
    assert "tin" not in run([], Flags(Bread, apart=("tin", "filling")))


@pytest.mark.parametrize("words", [["--grams", "501"], ["--rest", "soon"], ["--baker", "you"], ["--salt"]])
def test_wrong_values_and_names_are_refused(words: list[str]) -> None:
    with pytest.raises(Exception) as error:  # noqa: PT011  # the parser's own, or a UsageError
        run(words, Flags(Bread))
    assert words[0] in said(error.value)


def said(error: Any) -> str:
    """The message of an error of the parser's, or of ours."""
    return str(error.format_message()) if hasattr(error, "format_message") else str(error)


@described
@dataclass(frozen=True)
class Longer(Recipe):
    """A recipe with one setting more, written here and nowhere else."""

    shine: int = setting(3, "How bright it shines.", low=1, high=9, flag="--shine", metavar="N", before=0)


def test_a_new_setting_of_training_is_written_in_one_place(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Field, flag, help, range, what older headers mean, docstring and reference page: all from the one field."""
    monkeypatch.setattr("nest_runtime.cli.commands.train.Recipe", Longer)
    monkeypatch.setattr("nest_runtime.cli.training.RECIPES", {"default": Longer(), "reference": Longer()})
    app = typer.Typer()
    train.register(app)
    command = typer.main.get_command(app)
    monkeypatch.setenv("COLUMNS", "100")
    command.main(args=["train", "--help"], standalone_mode=False)
    line = next(line for line in capsys.readouterr().out.splitlines() if "--shine" in line)
    assert " ".join(line.strip("│ ").split()) == "--shine N [1<=x<=9] How bright it shines."
    words = ["--harmful", "a", "--benign", "b", "--out", "c", "--shine", "10"]
    with pytest.raises(Exception) as error:  # noqa: PT011  # the parser's own
        command.main(args=["train", *words], standalone_mode=False)
    assert "--shine" in said(error.value)

    assert recipe_of(None, "some-model", shine=4).to_json()["shine"] == 4
    with pytest.raises(UsageError, match="recipe: shine is 10; expected 1 to 9"):
        recipe_of(None, "some-model", shine=10)
    assert "shine: How bright it shines." in (Longer.__doc__ or "")
    wanted = "| `shine` | `3` | 1 to 9 | `--shine` | How bright it shines. |"
    assert any(wanted in table for table in REFERENCE.tables(Longer, 3))
