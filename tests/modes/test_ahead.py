"""Updates that nobody waits for: reported at the next look, and no bit different on resuming.

They are the updates of a GPU. Here they run on Triton's interpreter, in a process of their own that
``tests/kernels/test_other_processes.py`` starts.
"""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from mode_toys import Net, assert_one_sentence, same_state, sgd, train_step, walks
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from cmd_plugin.errors import NonFiniteError
from cmd_plugin.kernels import _dispatch, last_backend
from cmd_plugin.modes import Embedding, OnlineModes
from cmd_plugin.modes import tracker as tracker_module

pytestmark = [
    pytest.mark.interpret,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs the interpreter"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy warns of the NaN this is about
]

OPTIONS: dict[str, Any] = {"modes": 3, "warmup": 4, "samples": 60, "buffers": "model"}


@pytest.fixture(autouse=True)
def through_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(_dispatch.VARIABLE, "triton")


class Vector(nn.Module):
    """A network of two tensors that a test writes."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.one, self.two = (
            nn.Parameter(rows[0, :300].clone()),
            nn.Parameter(rows[0, 300:].clone()),
        )

    @torch.no_grad()
    def put(self, row: Tensor) -> None:
        self.one.copy_(row[:300])
        self.two.copy_(row[300:])


def vector_run(rows: Tensor, upto: int, **options: Any) -> tuple[Vector, OnlineModes]:
    net = Vector(rows)
    modes = OnlineModes(net, **{**OPTIONS, **options})
    for row in rows[:upto]:
        net.put(row)
        modes.update()
    return net, modes


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, Any]:
    """The state of a run of 12 snapshots in which nothing went wrong."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(_dispatch.VARIABLE, "triton")
        return vector_run(walks(12, 1400).float(), 12)[1].state_dict()


@pytest.mark.parametrize(
    "options", [{}, {"shrink": True}, {"forgetting": 0.8}, {"profile": "mean"}], ids=str
)
def test_the_same_modes_as_at_once(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = walks(11, 1400).float()
    _, ahead = vector_run(rows, 11, **options)
    assert last_backend("update_affine") == "triton"
    monkeypatch.setenv(_dispatch.VARIABLE, "torch")
    _, at_once = vector_run(rows, 11, **options)
    torch.testing.assert_close(ahead.reconstruct(), at_once.reconstruct(), rtol=1e-4, atol=1e-5)
    assert ahead.explained_variance() == pytest.approx(at_once.explained_variance(), rel=1e-5)
    one, other = ahead.decomposition(), at_once.decomposition()
    assert list(one.epochs) == list(other.epochs)
    torch.testing.assert_close(one.profiles, other.profiles)


@pytest.mark.parametrize(
    ("stop", "options"), [(5, {}), (8, {"shrink": True, "forgetting": 0.8})], ids=str
)
def test_stop_and_continue(stop: int, options: dict[str, Any]) -> None:
    net = Net()
    net.train()
    whole = OnlineModes(net, **OPTIONS, **options)
    parts = OnlineModes(net, **OPTIONS, **options)
    optimizer = sgd(net)
    for epoch in range(10):
        if epoch == stop:
            state = parts.state_dict()
            parts = OnlineModes(net, **OPTIONS, **options)
            parts.load_state_dict(state)
        train_step(net, optimizer, epoch)
        whole.update(label=3 * epoch)
        parts.update(label=3 * epoch)
    assert same_state(whole.state_dict(), parts.state_dict())


LOOKS: dict[str, Callable[[OnlineModes], Any]] = {
    "update": lambda modes: modes.update(),
    "swap": lambda modes: modes.swap().__enter__(),
    "reconstruct": lambda modes: modes.reconstruct(),
    "state_dict": lambda modes: modes.state_dict(),
    "explained_variance": lambda modes: modes.explained_variance(),
    "scale": lambda modes: modes.scale,
}


@pytest.mark.parametrize("look", list(LOOKS))
def test_nan_is_reported_by_name_at_the_next_look(look: str, undisturbed: dict[str, Any]) -> None:
    rows = walks(12, 1400).float()
    net, modes = vector_run(rows, 8)
    before = modes.state_dict()
    with torch.no_grad():
        net.two[41] = math.nan
    modes.update()  # nobody waits for what becomes of it
    net.put(rows[9])
    with pytest.raises(NonFiniteError) as caught:
        LOOKS[look](modes)
    assert_one_sentence(caught.value, "1 of 1400", "snapshot 8", "'two' at position 41")
    assert same_state(modes.state_dict(), before)
    assert modes.updates == 8
    # The run goes on as if that snapshot had never been.
    for row in rows[8:]:
        net.put(row)
        modes.update()
    assert same_state(modes.state_dict(), undisturbed)


def test_snapshots_after_a_refused_one_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer may arrive late: until then nothing is taken in."""
    from cmd_plugin.modes.ahead import Ahead

    rows = walks(12, 1400).float()
    net, modes = vector_run(rows, 8)
    before = modes.state_dict()
    monkeypatch.setattr(Ahead, "has_bad_news", False)
    net.put(torch.full((1400,), 1e30))
    modes.update()
    for row in rows[9:]:
        net.put(row)
        modes.update()
    monkeypatch.undo()
    with pytest.raises(NonFiniteError) as caught:
        modes.reconstruct()
    assert_one_sentence(caught.value, "so large", "snapshot 8", "the 3 snapshots taken since")
    monkeypatch.setenv(_dispatch.VARIABLE, "triton")
    assert same_state(modes.state_dict(), before)


def test_a_long_history_is_thinned_as_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracker_module, "_HISTORY", 8)
    rows = walks(30, 400).float()
    _, ahead = vector_run(rows, 30)
    monkeypatch.setenv(_dispatch.VARIABLE, "torch")
    _, at_once = vector_run(rows, 30)
    assert ahead.tracker.history()[0] == at_once.tracker.history()[0]
    torch.testing.assert_close(ahead.tracker.history()[1], at_once.tracker.history()[1])


def test_embedding_looks_at_once() -> None:
    net, modes = vector_run(walks(12, 1400).float(), 8, embedding=Embedding(2, 20))
    modes.project()
    with torch.no_grad():
        net.two[41] = math.inf
    with pytest.raises(NonFiniteError, match="snapshot 8"):
        modes.update()


def test_weights_that_move_are_followed(undisturbed: dict[str, Any]) -> None:
    rows = walks(12, 1400).float()
    net, modes = vector_run(rows, 8)
    net.one = nn.Parameter(net.one.detach().clone())  # as load_state_dict(assign=True) does
    for row in rows[8:]:
        net.put(row)
        modes.update()
    assert same_state(modes.state_dict(), undisturbed)


class Waits(TorchDispatchMode):
    """Counts what would wait for a GPU: numbers read by the host, and values looked for."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = function.overloadpacket.__name__
        self.count += name.startswith(self.NAMES)
        # Copies between devices are copies here, too: of each, whoever waits makes one.
        self.count += name in ("_to_copy", "index_put_")
        return function(*args, **(kwargs or {}))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that are launched, as they are."""
    made: list[str] = []

    def counting(launch: Callable[..., None]) -> Callable[..., None]:
        def counted(kernel: Any, programs: int, *arguments: Any, **options: Any) -> None:
            made.append(kernel.__name__)
            launch(kernel, programs, *arguments, **options)

        return counted

    for module in ("_triton", "update_affine._triton_follow"):
        name = f"cmd_plugin.kernels.{module}"
        loaded = importlib.import_module(name)
        monkeypatch.setattr(loaded, "launch", counting(loaded.launch))
    return made


def test_an_update_is_four_launches_and_no_wait(launches: list[str]) -> None:
    _, modes = vector_run(walks(12, 1400).float(), 8)
    launches.clear()
    with Waits() as waits:
        modes.update()
        modes.update()
    assert launches == ["_check", "_plan", "_update", "_finish"] * 2
    assert waits.count == 0


def test_a_swap_and_the_explained_variance_wait_a_few_times(launches: list[str]) -> None:
    """A number that does not grow with the tensors; on a GPU each is some microseconds."""
    _, modes = vector_run(walks(12, 1400).float(), 8)
    launches.clear()
    with Waits() as waits, modes.swap():
        pass
    assert launches == ["_swap_in", "_swap_out"]
    assert waits.count <= 12
    with Waits() as waits:
        modes.explained_variance()
    assert waits.count <= 6
