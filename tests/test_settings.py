"""Fields that carry their help and their range: what is checked, and what the docstring says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from nest_runtime.errors import UsageError
from nest_runtime.settings import check, described, required, setting, settings_of


@described
@dataclass(frozen=True)
class Oven:
    """An oven."""

    name: str = required("What it is called.", flag="--name")
    heat: float = setting(200.0, "Degrees inside.", low=30, high=300, group="Baking")
    fan: bool = setting(False, "Whether air is moved.")
    mode: Literal["top", "bottom"] = setting("top", "Where heat comes from.", choices=("top", "bottom"))
    minutes: int | None = setting(None, "How long; until it is told to stop.", above=0)
    notes: tuple[str, ...] = setting((), "Remarks.", more="None is needed.", group="Talk")
    secret: str = setting("", "Nobody reads it.", shown=False)
    manual: Path | None = None

    def __post_init__(self) -> None:
        check(self, "oven:")


def test_values_that_are_allowed_pass() -> None:
    assert Oven("a", heat=30, minutes=1, mode="bottom", notes=("x", "y")).heat == 30
    assert Oven("a").minutes is None


@pytest.mark.parametrize(
    ("values", "words", "hint"),
    [
        ({"heat": 301}, "oven: heat is 301; expected 30 to 300", "heat: Degrees inside."),
        ({"heat": float("inf")}, "oven: heat is inf; expected 30 to 300", "heat: Degrees inside."),
        ({"heat": "hot"}, "oven: heat is 'hot'; expected float", "heat: Degrees inside."),
        ({"heat": True}, "oven: heat is True; expected float", "heat: Degrees inside."),
        ({"fan": 1}, "oven: fan is 1; expected bool", "fan: Whether air is moved."),
        ({"minutes": 0}, "oven: minutes is 0; expected above 0", "minutes: How long"),
        ({"mode": "botom"}, "oven: mode is 'botom'", "did you mean 'bottom'? use one of top, bottom"),
        ({"notes": "word"}, "oven: notes is 'word'; expected a list of str", "notes: Remarks."),
        ({"notes": (1,)}, "oven: notes is (1,); expected a list of str", "notes: Remarks."),
        ({"name": None}, "oven: name is None; expected str", "name: What it is called."),
    ],
)
def test_values_that_are_not_allowed_are_named(values: dict[str, Any], words: str, hint: str) -> None:
    with pytest.raises(UsageError) as error:
        Oven(**{"name": "a", **values})
    assert error.value.message == words
    assert error.value.hint.startswith(hint)


def test_a_field_without_a_default_has_to_be_given() -> None:
    with pytest.raises(TypeError, match="name"):
        Oven()


def test_settings_know_their_names_types_and_groups() -> None:
    known = settings_of(Oven)
    assert list(known) == ["name", "heat", "fan", "mode", "minutes", "notes", "secret"]
    assert [about.group for about in known.values()] == ["", *["Baking"] * 4, *["Talk"] * 2]
    assert [about.item for about in known.values()] == [str, float, bool, str, int, str, str]
    assert [name for name, about in known.items() if about.optional] == ["minutes"]
    assert [name for name, about in known.items() if about.several] == ["notes"]
    assert [name for name, about in known.items() if about.is_required] == ["name"]


def test_the_docstring_says_them_by_group() -> None:
    text = Oven.__doc__ or ""
    assert text.startswith("An oven.\n\n    Attributes:\n        name: What it is called.\n\n    Baking:\n")
    assert "    Talk:\n        notes: Remarks. None is needed.\n" in text


def test_secrets_are_not_shown() -> None:
    assert "hush" not in repr(Oven("a", secret="hush"))
