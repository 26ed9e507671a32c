"""A table on disk survives kills and refuses what is not its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmd_plugin.errors import InputError
from cmd_plugin.runs.table import Table

COLUMNS = {"seed": int, "name": str, "loss": float}


@given(
    st.lists(
        st.tuples(
            st.integers(0, 9),
            st.text(st.characters(exclude_categories=["C", "Z"]), max_size=5),
            st.floats(allow_nan=False),
        )
    )
)
def test_rows_come_back_with_all_their_digits(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[int, str, float]]
) -> None:
    folder = tmp_path_factory.mktemp("table")
    for seal in (None, folder / "seal"):
        table = Table(folder / f"{seal is None}.csv", COLUMNS, seal)
        table.append(rows[:2])
        table.append(rows[2:])
        assert table.rows() == rows


def test_a_row_that_a_kill_cut_short_is_not_there(tmp_path: Path) -> None:
    table = Table(tmp_path / "metrics.csv", COLUMNS)
    table.append([(0, "raw", 0.5), (1, "raw", 0.25)])
    table.path.write_text(table.path.read_text()[:-3])
    assert table.rows() == [(0, "raw", 0.5)]
    table.replace(table.rows())
    table.append([(2, "raw", 0.125)])
    assert [row[0] for row in table.rows()] == [0, 2]


@pytest.mark.parametrize(
    "text", ["", "a,b\n1,2\n", "seed,name,loss\n1,raw\n", "seed,name,loss\nx,raw,1\n", "\x00\xff\n"]
)
def test_a_damaged_table_is_refused(tmp_path: Path, text: str) -> None:
    table = Table(tmp_path / "metrics.csv", COLUMNS)
    table.path.write_text(text)
    with pytest.raises(InputError, match=r"metrics\.csv is damaged"):
        table.rows()


def test_a_table_that_was_never_written_is_empty(tmp_path: Path) -> None:
    assert Table(tmp_path / "metrics.csv", COLUMNS).rows() == []


def test_a_sealed_table_notices_every_changed_byte_and_goes_on_after_a_kill(tmp_path: Path) -> None:
    seal = tmp_path / "seal"
    Table(tmp_path / "m.csv", COLUMNS, seal).append([(0, "raw", 0.5), (1, "raw", 0.25)])
    whole = (tmp_path / "m.csv").read_bytes()
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 1
        (tmp_path / "m.csv").write_bytes(bytes(changed))
        with pytest.raises(InputError, match="damaged"):
            Table(tmp_path / "m.csv", COLUMNS, seal).rows()
    (tmp_path / "m.csv").write_bytes(
        whole + b"2,raw,0.12"
    )  # a kill between the rows and their seal
    table = Table(tmp_path / "m.csv", COLUMNS, seal)
    table.append([(3, "ema", 1.5)])
    assert table.rows() == [(0, "raw", 0.5), (1, "raw", 0.25), (3, "ema", 1.5)]
    (tmp_path / "m.csv").write_bytes(whole[:20])  # rows that are lost are noticed too
    with pytest.raises(InputError, match="damaged"):
        Table(tmp_path / "m.csv", COLUMNS, seal).rows()
