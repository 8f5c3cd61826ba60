"""What computes beside the engine leaves no OpenMP helpers behind: they would put the engine's own to sleep."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

PROGRAM = """
import json, os, time
import torch
from nest_runtime.serve.pools import apart

def compute():
    left = torch.randn(600, 600)
    return float((left @ left).exp().sum())

def helpers():
    time.sleep(0.5)  # threads end a moment after they are joined
    return len(os.listdir("/proc/self/task"))

found = [helpers()]
apart("test", compute)
found.append(helpers())
compute()
found.append(helpers())
print(json.dumps(found))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_a_thread_of_its_own_takes_its_helpers_along() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
    )
    before, apart, here = json.loads(done.stdout)
    assert apart == before
    assert here == before + 1  # the same work in the main thread keeps one


def test_what_a_thread_of_its_own_raises_is_raised_here() -> None:
    from nest_runtime.serve.pools import apart

    with pytest.raises(ValueError, match="invalid literal"):
        apart("test", int, "x")
    assert apart("test", int, "7") == 7
