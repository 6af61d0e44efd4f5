"""What the process takes of the machine's memory, and gives back."""

from __future__ import annotations

import subprocess
import sys

import pytest

PIECES = """
import torch
from topiarist.core import meter

if meter._glibc("mallopt") is None:
    print("another C library")
    raise SystemExit
torch.ones(7_000_000)  # 28 MB: glibc keeps pieces of that size from now on
{call}
pieces = [torch.ones(1_000_000) for _ in range(80)]
full = meter.resident_bytes()
del pieces[:-1]  # the last one holds the heap's end
print((full - meter.resident_bytes()) // 4_000_000)
"""


@pytest.mark.parametrize(("call", "freed"), [("", range(10)), ("meter.give_back_at_once()", range(70, 81))])
def test_freed_pieces_are_given_back_at_once(call, freed):
    found = subprocess.run([sys.executable, "-c", PIECES.format(call=call)], capture_output=True, text=True, check=True)
    if "another" in found.stdout:
        pytest.skip("not glibc")
    assert int(found.stdout) in freed
