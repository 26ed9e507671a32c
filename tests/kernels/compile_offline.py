"""Compile every launch of every Triton kernel for GPUs that are not here, and check its resources.

The public functions run as they do on a GPU; only the launch itself is replaced, by Triton's
compiler for compute capability 80 and 90. So what is compiled is what is shipped: signatures,
constants and options are those of the launches. One line a variant: capability, kernel, function,
warps, registers, bytes of a thread in local memory (spilled registers), bytes of shared memory,
bytes of the widest load and store, dtypes of what the pointers point to, and whether the launch is
the one for tensors that need strides. And one line, "race", for every load and store of the
compiled code that may overtake one another (see :mod:`races`); a kernel that is known for it shows
that this is seen.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from races import find_races
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from cmd_plugin import kernels
from cmd_plugin.errors import InputError
from cmd_plugin.kernels import _dispatch
from cmd_plugin.kernels.update_affine import Follower

# Bytes a block may have without asking for more: the least of all GPUs of these capabilities.
SHARED = 48 * 1024
CAPABILITIES = (80, 90)
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
NAMES = {
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
}
WEIGHTS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_seen: set[str] = set()


def compile_instead(self: Any, *arguments: Any, **keywords: Any) -> None:
    """Stand in for ``JITFunction.run``."""
    del keywords["grid"], keywords["warmup"]
    names = self.arg_names
    given = dict(zip(names, arguments, strict=False))
    given.update({name: keywords.pop(name) for name in names if name in keywords})
    signature, constants, attributes = {}, {}, {}
    for index, (name, parameter) in enumerate(zip(names, self.params, strict=True)):
        value = given[name]
        if parameter.is_constexpr or value is None:
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = f"*{NAMES[value.dtype]}"
            if value.data_ptr() % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
        elif value == 1:  # as a launch does: one is compiled in, multiples of 16 are made use of
            signature[name], constants[name] = "constexpr", value
        else:
            if value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
    key = f"{self.__module__}.{self.__name__} {signature} {constants} {keywords}"
    if key in _seen:
        return
    _seen.add(key)
    for capability in CAPABILITIES:
        source = ASTSource(self, signature, constants, attributes)
        target = GPUTarget("cuda", capability, 32)
        done = triton.compile(source, target=target, options=keywords)
        registers, spilled = find_resources(done.asm["cubin"])
        shared = done.metadata.shared
        assert shared <= SHARED, f"{shared} bytes of shared memory: {key}"
        where = f"sm{capability}", self.__module__.split(".")[-2:][0], self.__name__
        widths = [find_width(done.asm["ptx"], kind) for kind in ("ld", "st")]
        pointers = ",".join(kind[1:] for kind in signature.values() if kind[0] == "*")
        stepped = "strided" if given.get("shapes") is not None else "contiguous"
        warps = done.metadata.num_warps
        print(*where, warps, registers, spilled, shared, *widths, pointers, stepped)  # noqa: T201
        for race in find_races(done.asm["ttgir"]):
            print("race", *where, race)  # noqa: T201


def find_resources(cubin: bytes) -> tuple[int, int]:
    """Return (registers, bytes of local memory) of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(CUOBJDUMP), "--dump-resource-usage", file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", done.stdout)
    assert found is not None, done.stdout
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


def find_width(ptx: str, kind: str) -> int:
    """Return the bytes of the widest load ("ld") or store ("st") of global memory."""
    pattern = rf"\b{kind}\.global[\w.:]*?(?:\.v(\d))?\.[a-z](\d+)\b"
    found = re.findall(pattern, ptx)
    return max((int(count or 1) * int(bits) // 8 for count, bits in found), default=0)


def state(dtype: torch.dtype, numel: int = 3000) -> dict[str, torch.Tensor]:
    """Return a state for [N] weights of a dtype."""
    number = torch.float64 if dtype == torch.float64 else torch.float32
    arrays = {name: torch.zeros(numel, dtype=number) for name in ("slope", "mean")}
    return {"mode": torch.zeros(numel, dtype=torch.uint8), **arrays}


def exercise_follower(
    weights: kernels.FlatView, arguments: dict[str, torch.Tensor], total: torch.Tensor | None
) -> None:
    """Call the update that waits for nothing, with few modes and with as many as there can be."""
    numbers = {"decay": 1.0, "limit": 1e30, "far": 1e9, "still": 1e-60}
    for modes, members in ((4, 4), (256, 1000)):
        at = torch.arange(members)
        weight = torch.ones(members, dtype=torch.float64)
        references = at if members == modes else None
        follower = Follower(weights, at, at % modes, weight, references, **numbers)
        state = torch.zeros(4 + 4 * modes, dtype=torch.float64)
        faults = torch.zeros(2, dtype=torch.int64)
        follower.follow(**arguments, total=total, state=state, faults=faults)


def exercise_weights(weights: kernels.FlatView, dtype: torch.dtype, shrink: bool) -> None:
    """Call every kernel that finds its weights by a pointer table."""
    arguments = state(dtype)
    table = torch.zeros(4, dtype=torch.float64)
    total = torch.ones_like(arguments["mean"]) if shrink else None
    both = {"total": total, "energy": table if shrink else None}
    kernels.update_affine(weights, **arguments, gain=table, blend=0.1, total=total)
    exercise_follower(weights, arguments, total)
    out = torch.zeros_like(arguments["mean"])
    kernels.reconstruct_into(weights, **arguments, step=table, **both)
    kernels.swap_in(weights, weights.empty_like(), **arguments, step=table, **both)
    kernels.swap_out(weights, weights.empty_like())
    kernels.snapshot_delta(weights, arguments["mean"] if shrink else None, out=out)
    kernels.snapshot_delta(weights, arguments["mean"])
    flags = torch.zeros(3000, dtype=torch.bool)
    scale, offset = arguments["slope"], arguments["mean"]
    kernels.apply_embedding(weights, flags, arguments["mode"], scale, offset, table)


def exercise(dtype: torch.dtype, shrink: bool) -> None:
    """Call every kernel that reads weights, on weights of a dtype."""
    exercise_weights(kernels.FlatView([torch.zeros(3000, dtype=dtype)]), dtype, shrink)
    if shrink:
        exercise_weights(kernels.FlatView([torch.zeros(50, 60, dtype=dtype).T]), dtype, shrink)
    flags, arguments = torch.zeros(3000, dtype=torch.bool), state(dtype)
    scale, offset = arguments["slope"], arguments["mean"]
    gradient = torch.zeros(3000, dtype=dtype)
    kernels.fold_gradients(gradient, flags, arguments["mode"], scale, 4)
    with suppress(InputError):  # nothing ran: the number of NaN is whatever the memory held
        kernels.select_smallest(torch.zeros(3000, dtype=dtype), 100)
    if dtype in (torch.float32, torch.float64):
        kernels.coefficient_drift(scale, offset, scale, offset)
    profiles = torch.randn(3, 5, dtype=torch.float64)
    base = offset if shrink else None
    trajectory = torch.zeros(5 - shrink, 3000, dtype=dtype)
    kernels.assign_and_fit(trajectory, profiles, base)
    if shrink:
        kernels.assign_and_fit(trajectory.bfloat16(), profiles, base)


def exercise_points(dtype: torch.dtype) -> None:
    """Call every kernel that reads clouds."""
    for size, axes in ((1000, 3), (4000, 5)):
        points = torch.zeros(2, size, axes, dtype=dtype)
        for exclude_self in (False, True):
            kernels.knn(points, 19, exclude_self=exclude_self, backend="triton")
    points = torch.zeros(2, 1000, 3, dtype=dtype)
    kernels.farthest_point_sampling(points, 100, backend="triton")
    table = torch.zeros(2, 1000, 19, dtype=torch.int64)
    start = torch.zeros(2, 4, dtype=torch.int64)
    kernels.curve_walk(table, start, 512, seed=2**40, backend="triton")


def exercise_rows(dtype: torch.dtype) -> None:
    """Call every kernel that reads rows of features."""
    for columns, triangular in ((768, True), (700, True), (768, False)):
        matrix = torch.zeros(768, columns)
        kernels.mahalanobis(
            torch.zeros(1000, 768, dtype=dtype), matrix[:, 0], matrix, triangular=triangular
        )


@triton.jit
def _racing(values, flags, sums, BLOCK: tl.constexpr):  # noqa: ANN001, ANN202
    """Sum the flagged values and zero them: a warp may zero what another has yet to load."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    chosen = tl.load(flags + at) != 0
    part = tl.load(values + at, chosen, 0.0).to(tl.float64)
    tl.store(values + at, tl.zeros([BLOCK], dtype=values.dtype.element_ty), chosen)
    tl.store(sums + tl.program_id(0), tl.sum(part))


def exercise_racing() -> None:
    """Compile a kernel with the fault that :func:`find_races` is there to find."""
    values, sums = torch.zeros(2048), torch.zeros(2, dtype=torch.float64)
    _racing[(2,)](values, torch.zeros(2048, dtype=torch.uint8), sums, BLOCK=1024, num_warps=4)


def main() -> None:
    """Compile everything."""
    JITFunction.run = compile_instead
    exercise_racing()
    _dispatch.interpreting = lambda: True  # CPU tensors may go to Triton
    _dispatch._automatic = lambda *_: "triton"
    for dtype, shrink in product(WEIGHTS, (False, True)):
        exercise(dtype, shrink)
    for dtype in (torch.float32, torch.float64):
        exercise_points(dtype)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        exercise_rows(dtype)


if __name__ == "__main__":
    main()
