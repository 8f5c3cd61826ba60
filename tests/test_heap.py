"""Memory that was freed between pieces still in use goes back to the system."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, re, sys
from pathlib import Path

def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

from nest_runtime.heap import release

big, small = [], []
for _ in range(2000):  # 64 kB to free beside a little to keep, as activations lie beside kept states
    big.append(bytearray(65_000))
    small.append(bytearray(600))
del big
before = resident()
release()
print(before - resident())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_freed_pages_between_kept_ones_are_released() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert float(done.stdout) > 80  # of 124 MiB freed
