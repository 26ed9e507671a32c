"""Clouds as text: read right or refused, never read as something else."""

from __future__ import annotations

from pathlib import Path

import pytest

from cmd_plugin.errors import InputError
from cmd_plugin.pointcloud.files import load_cloud
from tests.helpers.sentences import assert_one_sentence

TWO = [[1.5, 2.5, 3.5], [4.0, 5.0, 6.0]]


def read(folder: Path, text: str, ending: str = ".csv") -> list[list[float]]:
    path = folder / f"cloud{ending}"
    path.write_text(text, encoding="utf-8")
    found: list[list[float]] = load_cloud(path).tolist()
    return found


@pytest.mark.parametrize(
    "text",
    [
        "1.5 2.5 3.5\n4 5 6\n",
        "1.5,2.5,3.5\n4,5,6\n",
        "1.5, 2.5, 3.5\n\n4 ,5 ,6",
        "1.5;2.5;3.5\n4;5;6\n",
        "1.5\t2.5\t3.5\t9\n4\t5\t6\t9\n",
        "# made by hand\n1.5 2.5 3.5 # first\n4 5 6\n",
        "\ufeff1.5 2.5 3.5\r\n4 5 6\r\n",
        "x,y,z\n1.5,2.5,3.5\n4,5,6\n",
        "//X Y Z\n1.5 2.5 3.5\n4 5 6\n",
        ',"z","x","y"\n0,3.5,1.5,2.5\n1,6,4,5\n',  # by name, whatever comes first
        "2\n1.5 2.5 3.5\n4 5 6\n",
        "1\n1.5 2.5 3.5\n1\n4 5 6\n",  # two blocks, as of a scanner
        "//X,Y,Z\n2\n1.5,2.5,3.5\n4,5,6\n",
    ],
)
def test_a_cloud_is_read_whatever_stands_between_its_numbers(text: str, tmp_path: Path) -> None:
    assert read(tmp_path, text) == TWO


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("1,5 2,5 3,5\n4,0 5,0 6,0\n", "commas for decimal points"),
        ("1 2,5 3\n", "commas for decimal points"),
        ("1,5;2,5;3,5\n", "commas for decimal points"),
        ("1,5\t2,5\t3,5\n", "commas for decimal points"),
        ("1.5 2.5 3.5, 4\n", "use one sign"),
        ("1,,2,3\n", "cannot be read"),
        ("1 2 3\n4 5\n", "cannot be read"),
        ("1 2 3\n4 five 6\n", "cannot be read"),
        ("1 2 1+2j\n3 4 5\n", "columns are x, y and z"),
        ("a,b,c\n1,2,3\n", "columns are x, y and z"),
        ("x,y,x\n1,2,3\n", "columns are x, y and z"),
        ("x,y,z\n1,2,3,4\n", "columns are x, y and z"),
        ("3\n1 2 3\n4 5 6\n", "as many points as"),
        ("1\n1 2 3\n4 5 6\n", "as many points as"),
        ("1 2 3\n1\n4 5 6\n", "as many points as"),
        ("x,y,z\n", "holds no points"),
        ("", "holds no points"),
        ("# nothing\n", "holds no points"),
        ("1 2\n3 4\n", "not a cloud"),
    ],
)
def test_what_may_mean_something_else_is_refused(text: str, why: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        read(tmp_path, text)
    assert_one_sentence(caught.value, "cloud.csv", why)
