"""Measuring a model, with and without a patch: cases in, judged answers and rates out.

    cases = load_suites(["reference"])                    # suites.py; attacks.apply_attacks adds jailbreaks
    result = evaluate(model, tokenizer, cases, judge)     # run.py
    print(result.markdown()); result.save("eval.json")    # report.py

Importing this package loads neither torch nor transformers. It can be called: ``nest.evaluate("reference", "v3")`` is
api.py's function, which does all of this at once.
"""

from __future__ import annotations

import sys
from importlib import import_module
from inspect import Signature, signature
from types import ModuleType
from typing import TYPE_CHECKING, Any

_HOMES = {
    "Case": "nest_runtime.evaluate.cases",
    "EvalResult": "nest_runtime.evaluate.report",
    "Record": "nest_runtime.evaluate.records",
    "Rate": "nest_runtime.evaluate.stats",
    "PairedChange": "nest_runtime.evaluate.stats",
    "Judge": "nest_runtime.evaluate.judges",
    "Verdict": "nest_runtime.evaluate.judges",
    "make_judge": "nest_runtime.evaluate.judges",
    "load_suites": "nest_runtime.evaluate.suites",
    "load_suite": "nest_runtime.evaluate.suites",
    "load_behaviors": "nest_runtime.evaluate.suites",
    "sample_cases": "nest_runtime.evaluate.suites",
    "apply_attacks": "nest_runtime.evaluate.attacks",
    "parse_attacks": "nest_runtime.evaluate.attacks",
    "evaluate": "nest_runtime.evaluate.run",
    "evaluate_answers": "nest_runtime.evaluate.run",
}

__all__ = [*_HOMES]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'nest_runtime.evaluate' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


class _EvaluateModule(ModuleType):
    """This package: importing it takes the name that the public function has, so it answers calls as well."""

    def __call__(self, *args: Any, **settings: Any) -> EvalResult:
        from nest_runtime.evaluate.api import evaluate

        return evaluate(*args, **settings)

    @property
    def __signature__(self) -> Signature:
        """The public function's, for ``inspect.signature`` and the ``?`` of notebooks."""
        from nest_runtime.evaluate.api import evaluate

        return signature(evaluate)


sys.modules[__name__].__class__ = _EvaluateModule

if TYPE_CHECKING:
    from nest_runtime.evaluate.attacks import apply_attacks as apply_attacks
    from nest_runtime.evaluate.attacks import parse_attacks as parse_attacks
    from nest_runtime.evaluate.cases import Case as Case
    from nest_runtime.evaluate.judges import Judge as Judge
    from nest_runtime.evaluate.judges import Verdict as Verdict
    from nest_runtime.evaluate.judges import make_judge as make_judge
    from nest_runtime.evaluate.records import Record as Record
    from nest_runtime.evaluate.report import EvalResult as EvalResult
    from nest_runtime.evaluate.run import evaluate as evaluate
    from nest_runtime.evaluate.run import evaluate_answers as evaluate_answers
    from nest_runtime.evaluate.stats import PairedChange as PairedChange
    from nest_runtime.evaluate.stats import Rate as Rate
    from nest_runtime.evaluate.suites import load_behaviors as load_behaviors
    from nest_runtime.evaluate.suites import load_suite as load_suite
    from nest_runtime.evaluate.suites import load_suites as load_suites
    from nest_runtime.evaluate.suites import sample_cases as sample_cases
