"""Launches that are recorded once and played back, where the host would be slower than the GPU."""

from __future__ import annotations

from collections.abc import Callable

import torch

__all__ = ["Replay"]


class Replay:
    """Work of a GPU that is the same at every call, as one launch instead of many.

    A launch takes the host some 50 us, longer than the GPU needs for the weights of a small
    network. So the first call does the work (which compiles and loads its kernels), the second
    records it as a CUDA graph, and from then on a call plays the graph back: the same kernels in
    the same order, and the same bits. On another device, and while the caller records a graph of
    its own, every call does the work.

    Args:
        work: Launches kernels on the current stream, on tensors that stay where they are and that
            it keeps alive. It allocates nothing and waits for nothing.
        device: Where it does so.
    """

    def __init__(self, work: Callable[[], None], device: torch.device) -> None:
        self._work = work
        self._device = device
        self._done = False
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        """Do the work."""
        if self._device.type != "cuda" or torch.cuda.is_current_stream_capturing():
            self._work()
            return
        if self._graph is None:
            if not self._done:
                self._work()
                self._done = True
                return
            self._graph = _record(self._work, self._device)
        self._graph.replay()


def _record(work: Callable[[], None], device: torch.device) -> torch.cuda.CUDAGraph:
    """Return the launches of the work, none of which has run yet."""
    graph = torch.cuda.CUDAGraph()
    aside = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    with torch.cuda.stream(aside):  # that of the caller cannot be recorded
        # Other threads, which load data, may go on doing what a recording forbids.
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            work()
        finally:
            graph.capture_end()
    return graph
