"""What is called a race in compiled code, on statements written by hand."""

from __future__ import annotations

import pytest
from races import find_races

CODE = """
module {{
  tt.func public @_kernel(%x: !tt.ptr<f32>) {{
    %a = tt.splat %x : !tt.ptr<f32> -> tensor<1024x!tt.ptr<f32>, #blocked>
    %b = tt.splat %x : !tt.ptr<f32> -> tensor<1024x!tt.ptr<f32>, #blocked1>
    {0}
    tt.return
  }}
}}
"""
LOAD = "%v = tt.load %a : tensor<1024x!tt.ptr<f32>, #blocked>"
CONVERT = "%w = ttg.convert_layout %v : tensor<1024xf32, #blocked> -> tensor<1024xf32, #blocked1>"
STORE = "tt.store %b, {} : tensor<1024x!tt.ptr<f32>, #blocked1>"
SAME = "tt.store %a, %zero : tensor<1024x!tt.ptr<f32>, #blocked>"
CARRIED = """%r = scf.for %i = %c0 to %n step %c1 iter_args(%s = %zero) -> (f32)  : i32 {
      %t = arith.addf %s, %w : f32
      scf.yield %t : f32
    }"""


@pytest.mark.parametrize(
    ("lines", "racing"),
    [
        ([LOAD, STORE.format("%zero")], True),
        ([STORE.format("%zero"), LOAD], True),
        ([LOAD, "gpu.barrier", STORE.format("%zero")], False),
        ([LOAD, "scf.if %c {", "gpu.barrier", "}", STORE.format("%zero")], True),
        ([LOAD, "scf.if %c {", "gpu.barrier", STORE.format("%zero"), "}"], False),
        ([LOAD, CONVERT, STORE.format("%w")], False),
        ([LOAD, CONVERT, CARRIED, STORE.format("%r")], False),
        ([LOAD, SAME], False),
        (["scf.if %c {", LOAD, "} else {", STORE.format("%zero"), "}"], False),
        (["scf.if %c {", LOAD, "}", STORE.format("%zero")], True),
    ],
    ids=[
        "zeros stored",
        "stored, then loaded",
        "a barrier between",
        "a barrier that may be passed by",
        "a barrier on the way to the store",
        "the loaded values stored",
        "their sum stored",
        "one layout",
        "two branches",
        "one branch",
    ],
)
def test_a_load_and_a_store_that_may_overtake_one_another_are_found(
    lines: list[str], racing: bool
) -> None:
    assert len(find_races(CODE.format("\n    ".join(lines)))) == racing
