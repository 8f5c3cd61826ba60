"""The comparison of NeST with other methods on the same data: fit, answer, judge, tabulate.

The package can be called: ``nest.compare(["lora", "nest"])`` is api.py's function.
"""

from __future__ import annotations

import sys
from inspect import Signature, signature
from types import ModuleType
from typing import Any


class _CompareModule(ModuleType):
    """This package: importing it takes the name that the public function has, so it answers calls as well."""

    def __call__(self, *args: Any, **settings: Any) -> dict[str, Any]:
        from nest_runtime.compare.api import compare

        return compare(*args, **settings)

    @property
    def __signature__(self) -> Signature:
        """The public function's, for ``inspect.signature`` and the ``?`` of notebooks."""
        from nest_runtime.compare.api import compare

        return signature(compare)


sys.modules[__name__].__class__ = _CompareModule
