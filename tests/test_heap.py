"""Memory that passes use again: what is given back, and when."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hvpfast import heap

needs_glibc = pytest.mark.skipif(heap._malloc() is None, reason="glibc's malloc, without settings of the user's own")
LARGE = 12 << 20  # floats, 48 MB: more than malloc keeps of itself


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def faults_of_writing(numbers: int) -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(numbers).fill_(1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_spacious_memory_is_memory():
    for shape, dtype in (
        ((3, 5), torch.float64),
        ((1100, 1000), torch.float32),
        ((3 << 20,), torch.bfloat16),
        ((0, 4), torch.float32),
    ):
        x = heap.spacious(shape, dtype, torch.device("cpu"))
        assert (x.shape, x.dtype, x.is_contiguous()) == (shape, dtype, True)
        assert int((x.fill_(3) == 3).sum()) == x.numel()


@needs_glibc
@pytest.mark.parametrize(
    "check", ["what_is_used_again", "pieces_leave_where_the_heap_grows", "no_more_than_a_share_stays"]
)
def test_what_the_process_holds(check):
    """In a process of its own: where a block is put depends on the free pieces that others left in the heap."""
    code = f"import pytest, test_heap; test_heap.check_{check}(pytest.MonkeyPatch())"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def check_what_is_used_again(_):
    heap.release()
    start = resident()
    with heap.reused():
        assert faults_of_writing(LARGE) > 1000
        with heap.reused():  # somewhat less each time: glibc looks for room for the alignment too
            assert faults_of_writing(LARGE - 5000) < 100
        assert faults_of_writing(LARGE - 10000) < 100, "the end of an inner block is not the outer one's"
    heap.release()
    assert resident() - start < LARGE
    assert faults_of_writing(LARGE) > 1000
    assert resident() - start < LARGE, "a large block is mapped, and unmapped when it is freed"


def check_pieces_leave_where_the_heap_grows(monkeypatch):
    heap.release()
    with heap.reused():
        monkeypatch.setattr(heap, "_settled", 0)  # grown since, wherever the pieces find room
        pieces = [torch.ones(LARGE // 8) for _ in range(16)]
        del pieces[::2]
        before = resident()
        heap.settle()
        assert before - resident() > 3 * LARGE, "the heap grew, and a quarter of it is free"
        before = resident()
        pieces.append(torch.ones(1000))
        heap.settle()
        assert before - resident() < LARGE // 8, "it did not grow since"


def check_no_more_than_a_share_stays(monkeypatch):
    heap.release()
    start = resident()
    malloc = heap._malloc()._replace(kept=LARGE)
    monkeypatch.setattr(heap, "_malloc", lambda: malloc)
    with pytest.raises(RuntimeError), heap.reused():
        last = [torch.ones(LARGE), torch.ones(1000)]
        faults_of_writing(LARGE)
        raise RuntimeError
    del last[0]
    with heap.reused():
        pass
    assert heap._inside == 0
    assert resident() - start < LARGE


def test_where_malloc_is_not_glibcs_nothing_is_done(monkeypatch):
    monkeypatch.setattr(heap, "_malloc", lambda: None)
    with heap.reused():
        assert heap._inside == 0
    heap.settle()
    heap.release()


@needs_glibc
def test_only_where_it_is_wanted():
    with heap.reused(False):
        assert heap._inside == 0


@pytest.mark.parametrize("name, value", [("MALLOC_TRIM_THRESHOLD_", "1"), ("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")])
def test_the_users_own_settings_stand(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    assert heap._malloc.__wrapped__() is None
