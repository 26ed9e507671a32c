"""Both archives hold exactly what the tree holds, and nothing leaks a generic name.

The rooms ``callbacks/`` and ``kernels/`` are links inside ``cmd_plugin/``. On a checkout without
links, setuptools builds a wheel without these rooms and reports no error, so the lists of files are
compared one by one.
"""

from __future__ import annotations

import shutil
import stat
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LINKED = ("callbacks", "kernels")
GENERIC = ("callbacks", "kernels", "tests", "benchmarks")
FOREIGN = ("pytorch_lightning", "lightning", "flwr", "diffusers", "open_clip")


def run_python(*arguments: str, folder: Path) -> str:
    """Run this interpreter in ``folder``; a failure shows what the child printed."""
    child = subprocess.run(
        [sys.executable, *arguments], cwd=folder, capture_output=True, text=True, check=False
    )
    if child.returncode != 0:
        pytest.fail(f"{arguments} exited with {child.returncode}:\n{child.stdout}{child.stderr}")
    return child.stdout


@pytest.fixture(scope="module")
def tracked() -> list[str]:
    """Every path git tracks and the working tree holds, links included."""
    if not (ROOT / ".git").exists():
        pytest.skip("the comparison needs git's list of files, and this is no git checkout")
    listing = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    paths = [(name, ROOT / name) for name in listing.split("\0")]
    return [name for name, path in paths if path.is_symlink() or path.is_file()]


@pytest.fixture(scope="module")
def archives(tracked: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Source archive and wheel, the wheel built from the source archive as ``pip`` would."""
    folder = tmp_path_factory.mktemp("archives")
    source = folder / "tree"
    for name in tracked:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, source / name, follow_symlinks=False)
    run_python("-m", "build", "--no-isolation", "--outdir", str(folder / "dist"), folder=source)
    (sdist,) = (folder / "dist").glob("*.tar.gz")
    (wheel,) = (folder / "dist").glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def unpacked(archives: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel as it would lie in ``site-packages``."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(archives[1]) as wheel:
        wheel.extractall(folder)
    return folder


def expected_in_wheel(tracked: list[str]) -> set[str]:
    """Package files of the tree under the names an installed package has."""
    names = set()
    for name in tracked:
        if not name.endswith((".py", ".yaml", ".md", "py.typed")):
            continue
        room = name.split("/")[0]
        if room in LINKED:
            names.add(f"cmd_plugin/{name}")
        elif room == "cmd_plugin":
            names.add(name)
    return names


def test_the_rooms_are_links_in_the_tree() -> None:
    for room in LINKED:
        link = ROOT / "cmd_plugin" / room
        assert link.is_symlink(), f"{link} is no link: check out with core.symlinks=true"
        assert link.resolve() == ROOT / room


def test_wheel_holds_exactly_the_tracked_files(
    tracked: list[str], archives: tuple[Path, Path]
) -> None:
    with zipfile.ZipFile(archives[1]) as wheel:
        names = {entry.filename for entry in wheel.infolist() if not entry.is_dir()}
        links = [entry for entry in wheel.infolist() if stat.S_ISLNK(entry.external_attr >> 16)]
    held = {name for name in names if ".dist-info/" not in name}
    assert held == expected_in_wheel(tracked)
    assert links == []
    assert "cmd_plugin/py.typed" in held
    for room in LINKED:
        assert f"cmd_plugin/{room}/__init__.py" in held


def test_wheel_says_what_it_is(unpacked: Path) -> None:
    (info,) = unpacked.glob("*.dist-info")
    assert (info / "top_level.txt").read_text().split() == ["cmd_plugin"]
    assert "cmd-plugin = cmd_plugin.cli.main:run" in (info / "entry_points.txt").read_text()
    described = metadata.PathDistribution(info).metadata
    assert described["License-Expression"] == "Apache-2.0"
    assert described["Requires-Python"] == ">=3.10"
    assert set(described.get_all("Provides-Extra") or []) == {
        "all",
        "clip",
        "diffusion",
        "docs",
        "fast",
        "federated",
        "points",
        "test",
        "xai",
    }
    assert (info / "licenses" / "LICENSE").is_file()


def test_source_archive_holds_tests_and_benchmarks_and_each_room_once(
    tracked: list[str], archives: tuple[Path, Path]
) -> None:
    with tarfile.open(archives[0]) as sdist:
        members = sdist.getmembers()
    names = {member.name.split("/", 1)[1] for member in members if member.isfile()}
    assert not [member.name for member in members if member.issym() or member.islnk()]
    assert expected_in_wheel(tracked) <= names
    assert {name for name in tracked if name.startswith(("tests/", "benchmarks/"))} <= names
    assert {"CHANGELOG.md", "LICENSE", "README.md", "pyproject.toml"} <= names
    assert not [name for name in names if name.startswith(("callbacks/", "kernels/"))]
    assert not [name for name in names if "__pycache__" in name]


def run_with_wheel(code: str, unpacked: Path, folder: Path, *flags: str) -> str:
    """Run ``code`` where ``cmd_plugin`` can only come from the unpacked wheel."""
    start = f"import sys; sys.path.insert(0, {str(unpacked)!r})\n"
    return run_python("-I", *flags, "-c", start + code, folder=folder)


@pytest.mark.parametrize("name", ["cmd_plugin", "cmd_plugin.callbacks", "cmd_plugin.kernels"])
def test_installed_names_import_from_an_empty_folder(
    name: str, unpacked: Path, tmp_path: Path
) -> None:
    code = f"import {name} as module; print(module.__file__)"
    assert Path(run_with_wheel(code, unpacked, tmp_path).strip()).is_relative_to(unpacked)


@pytest.mark.parametrize("name", GENERIC)
def test_the_wheel_brings_no_generic_name(name: str, unpacked: Path, tmp_path: Path) -> None:
    code = f"import importlib.util; print(importlib.util.find_spec({name!r}))"
    # -S: without this environment's own packages, which may well have a folder named tests
    assert run_with_wheel(code, unpacked, tmp_path, "-S").strip() == "None"


@pytest.mark.parametrize("name", GENERIC)
def test_this_installation_brings_no_generic_name(name: str, tmp_path: Path) -> None:
    code = (
        "import importlib.util; "
        f"found = importlib.util.find_spec({name!r}); "
        "print(found and [found.origin, *(found.submodule_search_locations or [])])"
    )
    assert str(ROOT) not in run_python("-I", "-c", code, folder=tmp_path)


@pytest.mark.parametrize("room", LINKED)
def test_importing_a_room_by_its_folder_name_is_refused(room: str) -> None:
    code = f"""
import sys
sys.path.insert(0, "")
try:
    import {room}
except ImportError as error:
    print(error)
"""
    message = run_python("-c", code, folder=ROOT)
    assert f"cmd_plugin.{room}" in message
    assert "write" in message


def loaded_by(name: str, unpacked: Path, folder: Path) -> set[str]:
    """Top-level names that a fresh interpreter holds after importing ``name``."""
    code = f"import {name}; print(*{{name.split('.')[0] for name in sys.modules}})"
    return set(run_with_wheel(code, unpacked, folder).split())


def test_the_package_itself_is_light(unpacked: Path, tmp_path: Path) -> None:
    assert not {"torch", "numpy", *FOREIGN} & loaded_by("cmd_plugin", unpacked, tmp_path)


@pytest.mark.parametrize("room", ["modes", "kernels", "pointcloud"])
def test_methods_import_no_framework_beyond_torch(
    room: str, unpacked: Path, tmp_path: Path
) -> None:
    assert not set(FOREIGN) & loaded_by(f"cmd_plugin.{room}", unpacked, tmp_path)
