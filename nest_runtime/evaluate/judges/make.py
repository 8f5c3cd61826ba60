"""A judge from the text the command line takes. Nothing is loaded or reached before ``check()``."""

from __future__ import annotations

import os

from nest_runtime.errors import UsageError
from nest_runtime.evaluate.judges.base import Judge
from nest_runtime.evaluate.judges.local import LocalJudge
from nest_runtime.evaluate.judges.phrases import PhraseJudge
from nest_runtime.evaluate.judges.reference import ReferenceJudge
from nest_runtime.hints import did_you_mean

JUDGE_FORMS = "reference, local, phrases, hf:MODEL[#FORMAT] or openai:MODEL[@URL]"


def make_judge(spec: str, *, device: str = "auto") -> Judge:
    """A judge by name.

    Args:
        spec: ``reference`` (the reference world's exact judge), ``local`` (the shipped linear judge), or ``phrases``
            (refusal phrases). ``hf:MODEL`` is a Hugging Face classifier or guard; ``#FORMAT`` names a shipped prompt
            format or a JSON file. ``openai:MODEL`` is an OpenAI-compatible endpoint, at ``@URL`` or $OPENAI_BASE_URL,
            with $OPENAI_API_KEY. $NEST_JUDGE_PRICES is dollars per million input and output tokens, as in
            ``0.15,0.60``.
        device: where a Hugging Face judge runs.

    Raises:
        UsageError: there is no such judge.
    """
    kind, _, rest = spec.partition(":")
    if spec == "reference":
        return ReferenceJudge()
    if spec == "local":
        return LocalJudge()
    if spec in ("phrases", "refusal"):
        return PhraseJudge()
    if kind == "hf" and rest:
        from nest_runtime.evaluate.judges.classifier import ClassifierJudge

        model, _, layout = rest.partition("#")
        return ClassifierJudge(model, layout or None, device=device)
    if kind == "openai" and rest:
        from nest_runtime.evaluate.judges.openai import RubricJudge

        model, _, url = rest.partition("@")
        return RubricJudge(
            model,
            base_url=url or os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1",
            api_key=os.environ.get("OPENAI_API_KEY", ""),
            prices=_prices(os.environ.get("NEST_JUDGE_PRICES", "")),
        )
    near = did_you_mean(spec.partition(":")[0], ("reference", "local", "phrases", "hf", "openai"))
    raise UsageError(f"there is no judge {spec!r}", f"{near}use {JUDGE_FORMS}")


def _prices(text: str) -> tuple[float, float] | None:
    if not text:
        return None
    try:
        given, taken = (float(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(
            f"NEST_JUDGE_PRICES is {text!r}; expected two numbers",
            "give dollars per million input and output tokens, as in 0.15,0.60",
        ) from error
    return given, taken
