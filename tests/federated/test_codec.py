"""The codec: lossless where it promises to be, exact lengths, and both ends in step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cmd_plugin.errors import InputError
from cmd_plugin.federated import ModeCodec
from cmd_plugin.federated.frame import (
    FLAG_KEEP,
    FLAG_REPLY_DELTA,
    KIND_DOWN,
    OVERHEAD,
    Frame,
    FrameError,
    Header,
    NeedResync,
)
from cmd_plugin.federated.packing import Packing
from cmd_plugin.federated.values import Known, Received

Named = dict[str, Any]


def model(seed: int = 0) -> Named:
    """Arrays of every kind a state_dict may hold."""
    generator = np.random.default_rng(seed)

    def draw(*shape: int) -> np.ndarray:
        return generator.standard_normal(shape).astype(np.float32)

    return {
        "conv.weight": draw(4, 3, 2),
        "norm.weight": draw(4),
        "norm.running_mean": draw(4),
        "norm.running_var": draw(4) ** 2,
        "norm.num_batches_tracked": np.array(7 + seed),
        "half": draw(3).astype(np.float16),
        "nothing": np.empty((0, 5), np.float32),
        "scalar": draw(),
        "head.weight": draw(30, 5),
    }


def same(a: Named, b: Named) -> bool:
    """Same names in the same order, same dtypes, shapes and bits."""
    return list(a) == list(b) and all(
        a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and a[n].tobytes() == b[n].tobytes()
        for n in a
    )


def server(seed: int = 0, **options: Any) -> tuple[ModeCodec, np.ndarray, Named]:
    """A codec of the model, its modelled weights and the rest."""
    arrays = model(seed)
    codec = ModeCodec(Packing.of(arrays, **options))
    raw = {name: arrays[name] for name in codec.packing.raw.names}
    return codec, codec.packing.flatten(arrays), raw


def embed(codec: ModeCodec, count: int = 60, seed: int = 0) -> None:
    """Embed so many weights more."""
    generator = np.random.default_rng(seed)
    references = np.array([0, 100])
    members = np.setdiff1d(codec.plan.free, references)
    members = np.sort(generator.choice(members, count, replace=False))
    codec.plan.embed(
        members,
        generator.integers(0, 2, count).astype(np.uint8),
        generator.standard_normal(count),
        generator.standard_normal(count),
        references,
    )


def test_what_is_modelled() -> None:
    codec, flat, _ = server()
    names = list(codec.packing.layout.names)
    assert names == ["conv.weight", "norm.weight", "scalar", "head.weight"]
    assert flat.shape == (24 + 4 + 1 + 150,)
    assert codec.packing.layout.numel == len(flat)
    some = Packing.of(model(), include=["*.weight"], exclude=["head*"])
    assert list(some.layout.names) == ["conv.weight", "norm.weight"]
    doubles = Packing.of({name: a.astype(np.float64) for name, a in model().items()})
    assert doubles.dtype == np.float64
    with pytest.raises(InputError, match="no float32 or float64 array is left to model"):
        Packing.of(model(), include=["body*"])
    with pytest.raises(InputError, match="statistics must be one of average, local, got 'sum'"):
        Packing.of(model(), statistics="sum")


@pytest.mark.parametrize("embedded", [False, True])
def test_round_trip_is_exact(embedded: bool) -> None:
    """Names, order, dtypes, shapes, bits, down and up."""
    codec, flat, raw = server()
    if embedded:
        embed(codec)
        codec.plan.expand(flat)
    arrays = codec.packing.unflatten(flat, raw)
    data = codec.send(flat, raw).pack()
    client, received = ModeCodec.receive(None, Frame.unpack(data))
    assert same(received.arrays, arrays)
    assert client.known == codec.known
    trained = model(1)
    reply = Frame.unpack(client.reply(received, trained).pack())
    decoded = codec.accept(reply, received.header, flat, raw)
    expected = codec.packing.flatten(trained)
    codec.plan.expand(expected)
    others = {n: a for n, a in trained.items() if n in raw}
    assert same(decoded, codec.packing.unflatten(expected, others))


def test_free_values_are_the_whole_model() -> None:
    codec, flat, _ = server()
    embed(codec)
    free = codec.plan.free
    assert len(flat[free]) == len(flat) - 60
    full = codec.plan.expand(flat.copy())
    assert np.array_equal(full[free], flat[free])
    again = np.zeros_like(full)
    again[free] = full[free]
    assert np.array_equal(codec.plan.expand(again), full)


def frame_bytes(codec: ModeCodec, bits: int | None, since: int | None = None) -> int:
    """Length of a frame, part by part; ``since`` is the plan a compact one builds on."""
    free, fine = len(codec.plan.free), len(codec.plan.references)
    if bits is None:
        values = 4 * free
    else:  # codes of so many bits and a float32 a block of 256; references have 16 bits
        values = sum(
            -(-count * width // 8) + 4 * -(-count // 256)
            for count, width in ((free - fine, bits), (fine, 16))
        )
    others = 4 * 4 + 4 * 4 + 8 + 3 * 2  # mean, variance, counter, half precision
    layout = len(codec.packing.to_json()) if since is None else 0
    increments = codec.plan.since(since or 0)
    assert increments is not None
    return OVERHEAD + layout + len(increments) + values + others


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_frame_bytes(bits: int | None) -> None:
    """A frame is header + layout + plan + values + raw, to the byte."""
    codec, flat, raw = server()
    for event in range(3):
        header = Header(KIND_DOWN, bits=bits or 0)
        assert len(codec.send(flat, raw, header=header).pack()) == frame_bytes(codec, bits)
        compact = codec.send(flat, raw, codec.known, header=header).pack()
        assert len(compact) == frame_bytes(codec, bits, since=codec.plan.identity)
        if bits is None:
            others = 4 * 4 + 4 * 4 + 8 + 3 * 2  # mean, variance, counter, half precision
            assert len(compact) == OVERHEAD + 4 * (len(flat) - 50 * event) + others
        before = codec.known
        embed(codec, 50, seed=event)
        codec.plan.expand(flat)
        step = codec.send(flat, raw, before, header=header).pack()
        assert len(step) == frame_bytes(codec, bits, since=before.plan)
    assert codec.plan.since(12345) is None


def test_compact_frames_need_what_they_build_on() -> None:
    codec, flat, raw = server()
    compact = codec.send(flat, raw, codec.known)
    with pytest.raises(NeedResync, match="layout"):
        ModeCodec.receive(None, compact)
    stranger = ModeCodec(Packing.of({"other": np.zeros(3, np.float32)}))
    with pytest.raises(NeedResync, match="layout"):
        ModeCodec.receive(stranger, compact)
    client, _ = ModeCodec.receive(None, codec.send(flat, raw))
    embed(codec)
    with pytest.raises(NeedResync, match="plan"):
        ModeCodec.receive(client, codec.send(flat, raw, codec.known))


def test_memory_of_a_client() -> None:
    codec, flat, raw = server(statistics="local")
    embed(codec)
    frame = codec.send(flat, raw, result=99)
    assert frame.header.flags & FLAG_KEEP
    client, received = ModeCodec.receive(None, frame)
    client.reply(received, model(1))
    copy = ModeCodec.from_bytes(client.to_bytes())
    assert copy.known == client.known == Known(codec.packing.identity, codec.plan.identity, 99)
    assert np.array_equal(copy.values, received.flat)
    assert same(copy.statistics, client.statistics)


def test_local_statistics_stay_with_the_client() -> None:
    codec, flat, raw = server(statistics="local")
    client, received = ModeCodec.receive(None, codec.send(flat, raw))
    trained = model(1)
    reply = client.reply(received, trained)
    assert len(reply.sections.raw) == 3 * 2  # the half-precision array alone
    decoded = codec.accept(reply, received.header, flat, raw)
    for name in ("norm.running_mean", "norm.running_var", "norm.num_batches_tracked"):
        assert np.array_equal(decoded[name], raw[name])
        assert np.array_equal(client.statistics[name], trained[name])
    for known in (codec.known, None):  # the next round, and a resynchronisation
        client, received = ModeCodec.receive(client, codec.send(flat, raw, known))
        assert np.array_equal(received.arrays["norm.running_var"], trained["norm.running_var"])


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_both_ways(bits: int) -> None:
    codec, flat, raw = server()
    embed(codec)
    codec.plan.expand(flat)
    header = Header(KIND_DOWN, bits=bits, reply_bits=bits, flags=FLAG_REPLY_DELTA)
    client, received = ModeCodec.receive(None, codec.send(flat, raw, header=header))
    top = 2 ** (bits - 1) - 1
    plan = codec.plan
    references = plan.references
    free = np.setdiff1d(plan.free, references)
    step = np.abs(flat[free]).max() / top  # one block of 256
    error = np.abs(received.flat - flat)
    assert error[free].max() <= 0.5 * step * (1 + 1e-6)
    # References have 16 bits, and the weights on their curves follow what was received.
    fine = np.abs(flat[references]).max() / 32767
    assert error[references].max() <= 0.5 * fine * (1 + 1e-3)
    assert np.array_equal(received.flat, plan.expand(received.flat.copy()))
    members = np.abs(plan.scale) * error[references][plan.mode]
    assert (error[plan.members] <= members + 1e-6).all()
    moved = received.flat + 0.01 * np.random.default_rng(0).standard_normal(len(flat)).astype("f4")
    trained = client.packing.unflatten(moved, {n: received.arrays[n] for n in raw})
    reply = client.reply(received, trained, generator=np.random.default_rng(1))
    decoded = codec.packing.flatten(codec.accept(reply, received.header, flat, raw))
    # The difference is added to the server's exact weights, not to the quantised ones.
    update = (moved - received.flat)[free]
    gap = np.abs((decoded - flat)[free] - update)
    assert gap.max() <= np.abs(update).max() / top + 1e-6
    update = (moved - received.flat)[references]
    gap = np.abs((decoded - flat)[references] - update)
    assert gap.max() <= np.abs(update).max() / 32767 + 1e-6


def received_and_reply() -> tuple[ModeCodec, Received, Frame, np.ndarray, Named]:
    codec, flat, raw = server()
    embed(codec)
    codec.plan.expand(flat)
    header = Header(KIND_DOWN, round=5)
    client, received = ModeCodec.receive(None, codec.send(flat, raw, header=header))
    return codec, received, client.reply(received, model(1)), flat, raw


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"round": 4}, "round: stale: answers round 4, not 5"),
        ({"plan": 1}, "plan: stale"),
        ({"layout": 1}, "layout: the reply is for another model"),
        ({"kind": 1}, "kind: expected a client's reply"),
        ({"bits": 8}, "encoding: the reply is not encoded as it was asked for"),
        ({"flags": 1}, "encoding"),
        ({"flags": 2}, "encoding"),
    ],
)
def test_replies_that_do_not_fit_are_refused(change: dict[str, int], field: str) -> None:
    codec, received, reply, flat, raw = received_and_reply()
    wrong = Frame(replace(reply.header, **change), reply.sections)
    with pytest.raises(FrameError, match=field):
        codec.accept(wrong, received.header, flat, raw)


@pytest.mark.parametrize("section", ["values", "raw"])
def test_sections_of_another_length_are_refused(section: str) -> None:
    codec, received, reply, flat, raw = received_and_reply()
    short = replace(reply.sections, **{section: getattr(reply.sections, section)[:-4]})
    with pytest.raises(FrameError, match=f"{section}: expected"):
        codec.accept(Frame(reply.header, short), received.header, flat, raw)


def test_non_finite_values_are_refused_by_name() -> None:
    codec, received, reply, flat, raw = received_and_reply()
    values = np.frombuffer(reply.sections.values, "<f4").copy()
    values[[3, -1]] = np.nan, np.inf
    wrong = Frame(reply.header, replace(reply.sections, values=values.tobytes()))
    with pytest.raises(FrameError, match=r"'(conv|head).weight': \d+ of \d+ values are NaN"):
        codec.accept(wrong, received.header, flat, raw)
    statistics = np.full(len(reply.sections.raw) // 2, np.nan, np.float16).tobytes()
    wrong = Frame(reply.header, replace(reply.sections, raw=statistics))
    with pytest.raises(FrameError, match="'half': 3 of 3 values are NaN"):
        codec.accept(wrong, received.header, flat, raw)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda a: a.pop("scalar"), "'scalar': it is missing"),
        (lambda a: a.update({"more": np.zeros(1)}), "'more': it is not part of the model"),
        (lambda a: a.update({"scalar": np.zeros(2, "f4")}), r"'scalar': shape \(2,\)"),
        (lambda a: a.update({"scalar": np.zeros((), "f8")}), "'scalar': dtype float64"),
        (lambda a: a.update({"half": a.pop("half")}), "another order"),
        (lambda a: a["conv.weight"].__setitem__(0, np.nan), "'conv.weight': 6 of 24"),
    ],
)
def test_a_client_does_not_send_what_does_not_fit(change: Any, sentence: str) -> None:
    codec, flat, raw = server()
    client, received = ModeCodec.receive(None, codec.send(flat, raw))
    trained = model(1)
    change(trained)
    with pytest.raises(FrameError, match=sentence):
        client.reply(received, trained)


def test_layout_of_a_stranger() -> None:
    codec, flat, raw = server()
    frame = codec.send(flat, raw)
    for text, sentence in (
        (b"{", "layout: it cannot be read"),
        (b"[]", "it models nothing"),
        (b'[["a",[2],"float32",1,0]]', "its identity is not the one announced"),
        (b'[["a",[2],"float32",1,0],["a",[2],"float32",1,0]]', "a name is there twice"),
    ):
        wrong = Frame(frame.header, replace(frame.sections, layout=text))
        with pytest.raises(FrameError, match=sentence):
            ModeCodec.receive(None, wrong)
