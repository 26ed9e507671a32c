"""The doctor: what it finds in metadata made for it, and on machines that lack something."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cmd_plugin import kernels
from cmd_plugin.jobs import doctor
from cmd_plugin.jobs.doctor import Check, examine

ROOT = Path(__file__).parents[2]


def install(place: Path, name: str, version: str, *lines: str) -> None:
    """Make what an installer leaves of a distribution: its metadata."""
    folder = place / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir()
    head = ("Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}")
    (folder / "METADATA").write_text("\n".join([*head, *lines]) + "\n")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose distributions are found first; this machine itself is not looked at."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(doctor, "_machine", list)
    return tmp_path


def checks(data_root: Path | None = None) -> dict[str, Check]:
    found = examine(data_root)
    assert len({check.name for check in found}) == len(found)
    return {check.name: check for check in found}


def test_versions_are_compared_with_the_bounds_of_the_metadata(place: Path) -> None:
    install(
        place,
        "cmd-plugin",
        "7.8",
        "Requires-Python: >=3.10",
        "Requires-Dist: fresh-thing>=2.5,<4",
        "Requires-Dist: old-thing>=2.5",
        "Requires-Dist: absent-thing>=3",
        'Requires-Dist: elsewhere-thing; platform_system == "Nowhere"',
        'Requires-Dist: lightning>=2.4; extra == "test"',
    )
    install(place, "fresh-thing", "2.10.1+cu130")
    install(place, "old-thing", "2.4.9")
    install(place, "lightning", "2.5.0")
    found = checks()
    assert found["cmd-plugin"] == Check("cmd-plugin", "ok", "7.8", required=True)
    assert found["Python"].state == "ok"
    assert found["fresh-thing"] == Check("fresh-thing", "ok", "2.10.1+cu130", required=True)
    assert found["old-thing"] == Check(
        "old-thing", "broken", "2.4.9, needs >=2.5", 'pip install "old-thing>=2.5"', required=True
    )
    assert found["absent-thing"] == Check(
        "absent-thing",
        "missing",
        "not installed, needs >=3",
        'pip install "absent-thing>=3"',
        required=True,
    )
    assert found["lightning"] == Check("lightning", "ok", "2.5.0")
    assert "elsewhere-thing" not in found


def test_an_extra_is_all_that_it_brings(place: Path) -> None:
    """By way of another extra of this package, and of an extra of what it brings."""
    install(
        place,
        "cmd-plugin",
        "7.8",
        "Provides-Extra: empty",
        "Provides-Extra: engine",
        "Provides-Extra: tool",
        "Provides-Extra: all",
        'Requires-Dist: big-engine[simulation]>=1; extra == "engine"',
        'Requires-Dist: small-tool>=1; extra == "tool"',
        'Requires-Dist: cmd-plugin[empty,engine,tool]; extra == "all"',
    )
    install(
        place,
        "big-engine",
        "1.5",
        "Provides-Extra: simulation",
        "Requires-Dist: engine-core",
        'Requires-Dist: fast-actors>=2; extra == "simulation"',
    )
    install(place, "small-tool", "3")
    found = checks()
    assert found["extra empty"] == Check("extra empty", "ok", "needs nothing more")
    assert found["extra tool"] == Check("extra tool", "ok", "small-tool 3")
    lacking = "fast-actors (not installed, needs >=2)"
    for name in ("engine", "all"):
        advice = f'pip install "cmd-plugin[{name}]"'
        assert found[f"extra {name}"] == Check(f"extra {name}", "missing", lacking, advice)
    install(place, "fast-actors", "1.9")
    importlib.invalidate_caches()
    assert checks()["extra engine"].state == "broken"


def test_the_extras_of_this_package_are_all_there() -> None:
    names = metadata.metadata("cmd-plugin").get_all("Provides-Extra")
    found = {check.name for check in doctor._extras()}
    assert found == {f"extra {name}" for name in names or ()}
    assert {"extra federated", "extra points", "extra fast"} <= found


def test_a_python_that_is_too_old(place: Path) -> None:
    install(place, "cmd-plugin", "7.8", "Requires-Python: >=4")
    found = checks()["Python"]
    assert found.state == "broken"
    assert found.found.endswith("needs >=4")
    assert found.required


def test_damaged_metadata_is_reported(place: Path) -> None:
    install(place, "cmd-plugin", "7.8", "Requires-Dist: torn-thing>=1")
    install(place, "torn-thing", "of yesterday")
    assert checks()["torn-thing"].found == "its metadata is damaged"


def test_a_checkout_that_was_never_installed(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    for function in ("distribution", "metadata"):
        monkeypatch.setattr(doctor.metadata, function, absent)
    found = checks(place)
    assert (found["cmd-plugin"].state, found["cmd-plugin"].required) == ("missing", True)
    assert "pip install -e ." in found["cmd-plugin"].advice


def machine() -> dict[str, Check]:
    return {check.name: check for check in doctor._machine()}


def test_a_cpu_needs_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    found = machine()
    assert found["torch runs"].state == "ok"
    assert f"threads used: {torch.get_num_threads()}" in found["processor"].found
    assert found["CUDA device"].state == "missing"
    assert not found["CUDA device"].required
    assert found["Triton kernels"].found == "no CUDA device: the CPU paths are used"


def test_the_compiled_path_is_really_run(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert machine()["numba kernels"] == Check(
        "numba kernels", "ok", "compiled and run on the CPU", required=True
    )

    def wrong(*_: Any, backend: str) -> torch.Tensor:
        return torch.full((3,), 1.0 if backend == "torch" else 1.5)

    monkeypatch.setattr(kernels, "reconstruct", wrong)
    found = machine()["numba kernels"]
    assert (found.state, found.found) == ("broken", "its numbers are not those of PyTorch")
    assert found.required


def test_numba_is_not_required(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "find_spec", lambda _: None)
    found = machine()["numba kernels"]
    assert (found.state, found.required) == ("missing", False)
    assert found.advice == 'pip install "cmd-plugin[fast]"'


def test_a_gpu_whose_kernels_do_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    about = SimpleNamespace(name="Card", major=9, minor=0, total_memory=80e9)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: about)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "Card")

    def failing(_: str) -> str:
        raise RuntimeError("ptxas\n died")

    monkeypatch.setattr(doctor, "_run_kernel", failing)
    monkeypatch.setattr(doctor, "find_spec", lambda name: name if name == "triton" else None)
    found = machine()
    text = "Card, capability 9.0, 80 GB, the first of 2"
    assert found["CUDA device"] == Check("CUDA device", "ok", text, required=True)
    assert found["Triton kernels"].found == "RuntimeError: ptxas died"
    assert found["Triton kernels"].required
    assert "CMD_PLUGIN_BACKEND=torch" in found["Triton kernels"].advice


def test_a_driver_that_is_too_old_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def unavailable() -> bool:
        import warnings

        warnings.warn("The NVIDIA driver on your system is too old", stacklevel=1)
        return False

    monkeypatch.setattr("torch.cuda.is_available", unavailable)
    found = doctor._cuda()
    assert found.state == "broken"
    assert "driver on your system is too old" in found.found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_works() -> None:
    found = machine()
    assert found["CUDA device"].state == "ok"
    assert found["Triton kernels"] == Check(
        "Triton kernels", "ok", "compiled and run on the CUDA device", required=True
    )


def test_known_data_sets_are_found(tmp_path: Path) -> None:
    for file in (
        "MNIST/raw/train-images-idx3-ubyte",
        "cifar10-jpeg/train.tar.gz",
        "pointcloud/modelnet10_chair_voxels.npy.gz",
        "pointcloud/horse.pcd",
    ):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    text = f"{tmp_path} has mnist, cifar10-jpeg, chairs-monitors, pointcloud (2 files)"
    assert doctor._data(tmp_path) == Check("data root", "ok", text, required=True)


def test_the_data_root_comes_from_the_environment_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert doctor._data(None).state == "missing"
    assert not doctor._data(None).required
    monkeypatch.setenv("CMD_PLUGIN_DATA", str(tmp_path))
    assert doctor._data(None).found == f"{tmp_path} has none of the known data sets"
    monkeypatch.setenv("CMD_PLUGIN_DATA", str(tmp_path / "nowhere"))
    found = doctor._data(None)
    assert (found.state, found.required) == ("broken", True)
    assert found.found == f"{tmp_path / 'nowhere'} does not exist"


@pytest.mark.parametrize(("free", "state"), [(5e9, "ok"), (1e6, "broken")])
def test_free_disk(monkeypatch: pytest.MonkeyPatch, free: float, state: str) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    found = doctor._disk()
    assert (found.state, found.required) == (state, False)
    assert f"{free / 1e9:.1f} GB free in {Path.cwd()}" == found.found


@pytest.mark.parametrize(
    ("package", "broken"), [("numba", "numba kernels"), ("torch", "torch runs")]
)
def test_a_broken_installation_is_reported(tmp_path: Path, package: str, broken: str) -> None:
    """In a process of its own, whose package of that name cannot be imported."""
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text(
        "raise ImportError('it was built for\\n another numpy')\n"
    )
    program = (
        f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]\n"
        "from cmd_plugin.cli.main import run; run(['doctor', '--json'])"
    )
    child = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert child.returncode == 2, child.stderr
    assert child.stderr == ""
    content = json.loads(child.stdout)
    assert content["works"] is False
    wrong = [check for check in content["checks"] if check["required"] and check["state"] != "ok"]
    assert [check["name"] for check in wrong] == [broken]
    assert wrong[0]["found"] == "ImportError: it was built for another numpy"
    assert wrong[0]["advice"]
