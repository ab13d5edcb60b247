"""The allocator keeps what was freed."""

from __future__ import annotations

import subprocess
import sys

import pytest

from rm_gallery.host_memory import keep_freed_memory

_PROBE = """
import resource, sys, torch
from rm_gallery.host_memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def pages():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for step in range(12):
    if step == 4:
        before = pages()
    layers = [torch.ones(size) for size in (12_000_000, 20_000_000, 9_000_000)]
    del layers
print(pages() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's setting")
def test_tensors_are_made_of_the_memory_of_freed_ones() -> None:
    found = [int(subprocess.run([sys.executable, "-c", _PROBE, how], capture_output=True, text=True, check=True).stdout)
             for how in ("default", "keep")]  # fmt: skip
    # Kept memory is fetched once more at most (the heap may still grow), where a step fetches all of it, eight times.
    assert found[1] < found[0] / 3, "pages fetched anew"


def test_the_environment_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "65536")
    assert not keep_freed_memory()
