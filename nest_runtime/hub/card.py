"""The card (README.md) of a repository of patches: metadata that the Hub reads, and a text for people.

Every push makes it again from the patch and from what the last card says of earlier versions. What people wrote
outside the two markers stays. A card is not signed, and decides nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from nest_runtime.escape import short
from nest_runtime.hub.results import is_evaluation, rates, tables
from nest_runtime.install import install
from nest_runtime.measures import MEASURES
from nest_runtime.patch.values import thaw_json

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

    from nest_runtime.patch.patch import Patch

LIBRARY = "nest-runtime"
BEGIN, END = "<!-- nest-runtime begin: written by `push`; put your own words outside -->", "<!-- nest-runtime end -->"
VERSIONS_KEY = "nest_versions"
TAGS = ("safety", "nest-runtime", "jailbreak-defense", "safety-patch", "adapter")
MAX_RESULTS = 60
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_COUNTS = {"n", "successes", "count", "steps", "seconds", "ci95", "low", "high", "seed", "tokens"}


def render_card(
    patch: Patch,
    repo: str,
    *,
    old: str | None = None,
    license_id: str | None = None,
    results: Mapping[str, Any] | None = None,
    signed_by: str | None = None,
    base_model: str | None = None,
) -> str:
    """The card of a repository whose newest version is ``patch``.

    Args:
        patch: the version being pushed.
        repo: what users type after ``hf://``, or a mirror's place.
        old: the present card, whose versions, licence and own words are kept.
        license_id: an SPDX-like id as the Hub knows them; otherwise the old card's.
        results: the document of ``nest-runtime eval --json``, shown as tables beside the patch's own metrics; under
            ``adaptive`` that of benchmarks/adaptive.py.
        signed_by: id of the key that signed the patch.
        base_model: the base's id on the Hub; otherwise the patch's own name for it, where that is one, or the last
            card's.
    """
    from huggingface_hub import ModelCard, ModelCardData

    fields, words = _split(old)
    versions = [row for row in _versions(fields) if row["version"] != patch.version] + [_row(patch)]
    license_id = license_id or fields.get("license") or ("apache-2.0" if patch.base_model == "reference" else "other")
    measured = dict(results or {})
    whole = is_evaluation(measured)
    stated = list(eval_results({**thaw_json(patch.metrics), **({} if whole else _trees(measured))}))
    evaluations = [*(_results_of(measured) if whole else ()), *stated][:MAX_RESULTS]
    base = base_on_hub(base_model or patch.base_model) or base_on_hub(fields.get("base_model"))
    more: dict[str, Any] = {"base_model_relation": "adapter", VERSIONS_KEY: versions}
    data = ModelCardData(
        library_name=LIBRARY,
        base_model=base,
        pipeline_tag="text-generation",
        license=license_id,
        tags=list(dict.fromkeys([*TAGS, *(tag for tag in fields.get("tags") or () if isinstance(tag, str))])),
        datasets=fields.get("datasets"),
        language=fields.get("language"),
        model_name=f"{patch.name}-{patch.version}" if evaluations else None,
        eval_results=evaluations or None,
        **more,
    )
    before, after = words
    shown = tables(measured) if whole else []
    text = "\n".join([BEGIN, _text(patch, base, repo, versions, stated[:MAX_RESULTS], shown, signed_by), END])
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{before}{text}{after}"))


def eval_results(metrics: Mapping[str, Any]) -> Iterator[EvalResult]:
    """Every rate in a tree of metrics, for the Hub's model-index. Counts and intervals are arguments, not results."""
    from huggingface_hub import EvalResult

    for path, value, size in _rates(metrics, ()):
        suite, metric = _suite_and_metric(path)
        yield EvalResult(
            task_type="text-generation",
            dataset_type=suite.replace(" ", "-"),
            dataset_name=suite,
            metric_type=metric,
            metric_value=value,
            metric_args={"n": size} if size is not None else None,
        )


def _trees(measured: Mapping[str, Any]) -> dict[str, Any]:
    """What may hold rates: all that is no number or text of its own."""
    return {key: value for key, value in measured.items() if isinstance(value, Mapping)}


def _results_of(evaluation: Mapping[str, Any]) -> Iterator[EvalResult]:
    """The rates and scores of an evaluation, for the Hub's model-index."""
    from huggingface_hub import EvalResult

    for suite, metric, value, size in rates(evaluation):
        yield EvalResult(
            task_type="text-generation",
            dataset_type=suite.replace(" ", "-"),
            dataset_name=suite,
            metric_type=metric,
            metric_value=value,
            metric_args={"n": size},
        )


def _rates(value: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], float, int | None]]:
    size = value.get("n") if isinstance(value.get("n"), int) else None
    for key, item in value.items():
        if isinstance(item, Mapping):
            yield from _rates(item, (*path, str(key)))
        elif key in _COUNTS or isinstance(item, bool) or not isinstance(item, int | float):
            continue
        elif math.isfinite(item):
            yield (*path, str(key)), float(item), size


def _suite_and_metric(path: tuple[str, ...]) -> tuple[str, str]:
    """What a rate's place in the tree says: on what it was measured, and which measure it is, as the Hub calls it."""
    *where, key = path
    if key == "rate":  # of a measure that is named further up
        key = next((name for name in reversed(where) if name in MEASURES), key)
        where = [name for name in where if name != key]
    measure = MEASURES.get(key)
    return "/".join(where) or "all", (measure and measure.hub_name) or key


def _split(old: str | None) -> tuple[dict[str, Any], tuple[str, str]]:
    """A card's metadata, and what people wrote before and after our part."""
    if not old:
        return {}, ("", "\n")
    from huggingface_hub import ModelCard

    try:
        card = ModelCard(old, ignore_metadata_errors=True)
        fields = card.data.to_dict()
    except Exception:  # a card that its author broke (YAML errors of many kinds) is replaced, its words are kept
        return {}, ("", f"\n\n{old}")
    before, found, rest = card.text.partition(BEGIN)
    if not found:
        return fields, ("", f"\n\n{card.text.strip()}\n" if card.text.strip() else "\n")
    own, found, after = rest.partition(END)
    return fields, (before.lstrip("\n"), after if found else f"\n\n{own.strip()}\n")


def _versions(fields: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = fields.get(VERSIONS_KEY)
    keys = set(_KEYS)
    return [row for row in rows if isinstance(row, dict) and set(row) == keys] if isinstance(rows, list) else []


_KEYS = ("version", "serial", "digest", "parent", "created", "neurons", "parameters")


def _row(patch: Patch) -> dict[str, Any]:
    return {key: getattr(patch, key) for key in _KEYS}


def base_on_hub(name: object) -> str | None:
    """A base's name where it is an id of the Hub's, ``org/name``; None for what is a name on one machine only."""
    return name if isinstance(name, str) and _HUB_ID.fullmatch(name) else None


def _text(
    patch: Patch,
    base: str | None,
    repo: str,
    versions: list[dict[str, Any]],
    results: list[EvalResult],
    shown: list[str],
    signed_by: str | None,
) -> str:
    ref = f"{repo}@{patch.version}"
    model = (
        "reference" if patch.base_model == "reference" else base or f"FOLDER-OR-FILE-OF-{patch.base_model or 'BASE'}"
    )
    option = "" if model == "reference" else f" --model {model}"
    needs = [*(["gguf"] if str(patch.base_model or "").endswith(".gguf") else []), *(["sign"] if signed_by else [])]
    use = [install(",".join(needs)), f"nest-runtime pull {ref}", f"nest-runtime serve{option} --patch {ref}"]
    trust = "To check who signed it, add `--trust KEY.pub` to both commands, with the publisher's public key."
    parts = [
        f"# {patch.name}",
        f"A safety patch for `{patch.base_model or short(patch.base_hash)}`, made by Neuron Selective Tuning "
        f"(arXiv 2602.16835): {patch.neurons:,} safety neurons in {patch.clusters:,} clusters, "
        f"{patch.parameters:,} trained numbers. It is no model: it needs its base, and fits no other.",
        "## Use",
        "\n".join(["```bash", *use, "```"]),
        f'```python\nimport nest_runtime as nest\n\nmodel = nest.load_model("{model}").model\n'
        f'runtime = nest.PatchRuntime(model)\nruntime.add(nest.load_patch("{ref}"))\n'
        f'runtime.activate("{patch.version}")\n```',
        *([trust] if signed_by else []),
        "## Versions",
        _lineage(versions),
        f"Base model hash: `{patch.base_hash}`  \nSigned by: {f'`{signed_by}`' if signed_by else 'nobody'}",
    ]
    if results or shown:
        parts += [f"## Results of {patch.version}", *shown]
    if results:
        rows = [f"| {r.dataset_name} | {r.metric_type} | {r.metric_value:.4g} | {_size(r)} |" for r in results]
        parts += ["Stated in the patch:"] if shown else []
        parts.append("\n".join(["| on | metric | value | n |", "|---|---|---|---|", *rows]))
    parts += [
        "## Limits",
        "A patch lowers how often a model gives in to harmful requests; it is no guarantee, and it lists the model's "
        "safety neurons for anyone to read. Measure it on your own prompts before you rely on it.",
    ]
    return "\n\n".join(parts)


def _lineage(versions: list[dict[str, Any]]) -> str:
    known = {row["digest"]: row["version"] for row in versions}
    lines = ["| version | serial | made from | created | neurons | numbers | digest |", "|---|---|---|---|---|---|---|"]
    for row in sorted(versions, key=lambda r: r["serial"], reverse=True):
        parent = row["parent"]
        origin = known.get(parent, f"`{short(parent)}`") if parent else "the base"
        lines.append(
            f"| {row['version']} | {row['serial']} | {origin} | {row['created'][:10] or 'unknown'} | {row['neurons']} "
            f"| {row['parameters']} | `{row['digest'][:19]}` |"
        )
    return "\n".join(lines)


def _size(result: EvalResult) -> str:
    return str((result.metric_args or {}).get("n", ""))
