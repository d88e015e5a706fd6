"""The switch, and what is asked of torch.cuda, by one that writes it down: streams, capture, replay, and broken captures."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch

import hvpfast as hf
from hvpfast.operators import graphs


class Log(list):
    """A torch.cuda that writes down what is asked of it. `broken`: what raises."""

    def __init__(self, monkeypatch, broken=()):
        log = self

        class Stream:
            def __init__(self, name):
                self.name = f"side {name}" if isinstance(name, int) else name

            def wait_stream(self, other):
                log.append(f"{self.name} waits for {other.name}")

        class Graph:
            def capture_begin(self, *, pool, capture_error_mode):
                log.append(f"begin {pool} {capture_error_mode}")
                if "begin" in broken:
                    raise RuntimeError("cannot begin")

            def capture_end(self):
                log.append("end")
                if "end" in broken:
                    raise RuntimeError("operation failed due to a previous error during capture")

            def replay(self):
                log.append("replay")

        @contextlib.contextmanager
        def stream(which):
            log.append(f"enter {which.name}")
            yield
            log.append(f"leave {which.name}")

        cuda = SimpleNamespace(
            Stream=Stream,
            CUDAGraph=Graph,
            stream=stream,
            current_device=lambda: 1,
            current_stream=lambda index: Stream(f"current of {index}"),
            graph_pool_handle=lambda: "pool",
            synchronize=lambda index: log.append("synchronize"),
        )
        for name, value in vars(cuda).items():
            monkeypatch.setattr(torch.cuda, name, value)
        for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
            monkeypatch.setattr(torch._C, name, lambda *args, name=name: log.append((name, *args)), raising=False)
        monkeypatch.setattr(graphs, "_streams", {})
        monkeypatch.setattr(graphs, "_broken", [])


def test_streams_wait_for_each_other(monkeypatch):
    log = Log(monkeypatch)
    result = SimpleNamespace(record_stream=lambda stream: log.append(f"recorded on {stream.name}"))
    recorder = graphs.Recorder(torch.device("cuda"))
    assert recorder.beside(lambda x: log.append(f"work on {x}") or result, "x") is result
    around = [
        "side 1 waits for current of 1",
        "enter side 1",
        "work on x",
        "leave side 1",
        "current of 1 waits for side 1",
    ]
    assert log == [*around, "recorded on current of 1"]
    log.clear()
    with pytest.raises(KeyError), monkeypatch.context():
        graphs.Recorder(torch.device("cuda", 1)).beside(lambda x: {}[x], "x")
    assert log == [around[0], around[1], around[-1]] and list(graphs._streams) == [1]  # one stream a device


def test_capture_and_replay(monkeypatch):
    log = Log(monkeypatch)
    replay, out = graphs.Recorder(torch.device("cuda", 0)).record(lambda: log.append("work") or "out")
    assert out == "out" and log == ["synchronize", "begin pool thread_local", "work", "end"]
    replay()
    assert log[-1] == "replay" and graphs._broken == []


@pytest.mark.parametrize("broken", [("begin",), ("end",), ("work",), ("work", "end")])
def test_a_broken_capture_is_ended(broken, monkeypatch):
    """The first error is the reason; the capture is ended, the allocator told, and the graph, which it may ask, stays alive."""
    log = Log(monkeypatch, broken)

    def work():
        log.append("work")
        if "work" in broken:
            raise ValueError("read back")

    message = "read back" if "work" in broken else {"begin": "cannot begin", "end": "previous error"}[broken[0]]
    with pytest.raises((RuntimeError, ValueError), match=message):
        graphs.Recorder(torch.device("cuda", 0)).record(work)
    began = [] if "begin" in broken else ["work", "end"]
    ended = [("_cuda_endAllocateToPool", 0, "pool"), ("_cuda_releasePool", 0, "pool")]
    assert log == ["synchronize", "begin pool thread_local", *began, *ended] and len(graphs._broken) == 1


def test_modes():
    with pytest.raises(ValueError, match="cuda_graphs: got 'always'; it must be one of off, auto, required"):
        hf.cuda_graphs("always")
    with hf.cuda_graphs("required"), hf.cuda_graphs("off"):
        assert hf.dispatch.graphs_in_use() == "off"
    assert hf.dispatch.graphs_in_use() == "off"


def test_settings_of_torch_choose_kernels_too():
    before = graphs._settings()
    torch.set_float32_matmul_precision("high")
    try:
        assert graphs._settings() != before
    finally:
        torch.set_float32_matmul_precision("highest")
    assert graphs._settings() == before
