r"""Users' own attacks from a file: templates with exactly one ``{prompt}`` slot.

TXT holds a template a line (``\n`` in it stands for a line break), JSONL and CSV have a ``template``
column and may have ``name``, ``family`` and ``citation``. Other braces are left alone.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from nest_runtime.errors import DataError
from nest_runtime.evaluate.attacks.base import Attack, text_attack
from nest_runtime.io import expand
from nest_runtime.prompts.readers import read_rows

SLOT = "{prompt}"


def read_templates(path: str | Path) -> list[Attack]:
    """The attacks of a template file.

    Raises:
        DataError: no such file, no rows, no ``template`` column, no slot or more than one, or a name twice.
    """
    file = expand(path)
    attacks: dict[str, Attack] = {}
    for line, fields in read_rows(file, "templates"):
        attack = _template(file, line, {str(key).strip().lower(): value for key, value in fields.items()})
        if attack.name in attacks:
            raise DataError(
                f"{file}:{line}: the name {attack.name!r} appears twice", "give every template its own name"
            )
        attacks[attack.name] = attack
    return list(attacks.values())


def _template(file: Path, line: int, row: dict[str, Any]) -> Attack:
    text = row.get("template", row.get("prompt"))
    if not isinstance(text, str):
        found = ", ".join(map(repr, row)) or "nothing"
        raise DataError(f"{file}:{line}: no 'template' column; found {found}", f"write the template with a {SLOT} slot")
    if file.suffix.lower() == ".txt":
        text = text.replace("\\n", "\n")
    slots = text.count(SLOT)
    if slots != 1:
        raise DataError(
            f"{file}:{line}: the template has {slots or 'no'} {SLOT} slot{'s' if slots > 1 else ''}; expected one",
            f"write {SLOT} once, where the behavior goes",
        )
    head, tail = text.split(SLOT)

    def fill(prompt: str, _: random.Random) -> str:
        return f"{head}{prompt}{tail}"

    name = str(row.get("name") or f"{file.stem}-{line}")
    family = str(row.get("family") or "user-template")
    return text_attack(name, family, str(row.get("citation") or str(file.name)), text[:100], fill)
