"""What works on this machine, and what to install for the rest."""

from __future__ import annotations

import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion

from cmd_plugin.data.names import MARKS, ROOT_VARIABLE
from cmd_plugin.errors import InputError, PluginError

__all__ = ["Check", "examine"]

_OWN = "cmd-plugin"
_OPTIONAL = ("lightning", "numba")  # worth a row of their own where nothing requires them
_LITTLE_SPACE = 1_000_000_000  # bytes

# Point clouds, in the data root's folder "pointcloud" or in the data root itself.
_CLOUDS = {"chairs-monitors": "modelnet10_*_voxels.npy.gz", "hdf5": "*.h5"}

State = Literal["ok", "missing", "broken"]


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: What.
        state: Whether it works; ``"broken"`` is there and does not.
        found: Its version, or what was found instead.
        advice: What to do; empty if nothing has to be done.
        required: Whether commands fail without it.
    """

    name: str
    state: State
    found: str
    advice: str = ""
    required: bool = False


def examine(data_root: str | Path | None = None) -> list[Check]:
    """Look at this installation and this machine; nothing is raised, downloaded or written.

    Which versions are new enough, and which package belongs to which extra, is read from the
    metadata of this package.

    Args:
        data_root: Where data lies; by default the environment variable ``CMD_PLUGIN_DATA``.
    """
    return [*_packages(), *_machine(), *_extras(), _data(data_root), _disk()]


# -- packages ------------------------------------------------------------------------------------


def _packages() -> list[Check]:
    """Python, this package, what it requires, and what it can do without."""
    python = ".".join(map(str, sys.version_info[:3]))
    try:
        own = metadata.distribution(_OWN)
    except metadata.PackageNotFoundError:
        advice = "run pip install -e . where its pyproject.toml is"
        return [
            Check("Python", "ok", python, required=True),
            Check(_OWN, "missing", "not installed: what it needs is not known", advice, True),
        ]
    bound = own.metadata["Requires-Python"] or ""
    new_enough = SpecifierSet(bound).contains(python, prereleases=True)
    advice = f"make an environment with Python {bound}"
    checks = [
        Check("Python", "ok", python, required=True)
        if new_enough
        else Check("Python", "broken", f"{python}, needs {bound}", advice, required=True),
        Check(_OWN, "ok", own.version, required=True),
    ]
    required = _requirements(_OWN)
    checks += [_package(requirement, required=True) for requirement in required]
    named = {canonicalize_name(requirement.name) for requirement in required}
    for requirement in map(Requirement, own.requires or ()):
        name = canonicalize_name(requirement.name)
        if name in _OPTIONAL and name not in named:
            named.add(name)
            checks.append(_package(requirement, required=False))
    return checks


def _package(requirement: Requirement, *, required: bool) -> Check:
    state, found = _version(requirement)
    advice = "" if state == "ok" else f'pip install "{requirement.name}{requirement.specifier}"'
    return Check(requirement.name, state, found, advice, required)


def _version(requirement: Requirement) -> tuple[State, str]:
    """Return whether a package is there and new enough, and its version."""
    bound = str(requirement.specifier)
    try:
        version = metadata.version(requirement.name)
        fits = requirement.specifier.contains(version, prereleases=True)
    except metadata.PackageNotFoundError:
        return "missing", f"not installed, needs {bound}" if bound else "not installed"
    except (InvalidVersion, KeyError, TypeError):
        return "broken", "its metadata is damaged"
    return ("ok", version) if fits else ("broken", f"{version}, needs {bound}")


def _requirements(distribution: str, extra: str = "") -> list[Requirement]:
    """Return what a distribution requires on this machine, or what an extra adds to that."""
    found = []
    for text in metadata.requires(distribution) or ():
        requirement = Requirement(text)
        marker = requirement.marker
        plain, wanted = (marker is None or marker.evaluate({"extra": e}) for e in ("", extra))
        if wanted and (not extra or not plain):
            found.append(requirement)
    return found


def _extras() -> list[Check]:
    """What each extra brings, and which of its packages are not there."""
    try:
        names = metadata.metadata(_OWN).get_all("Provides-Extra") or []
    except metadata.PackageNotFoundError:
        return []
    return [_extra(name) for name in names]


def _extra(name: str) -> Check:
    looked_at = {r.name: _version(r) for r in _brought(name)}
    wrong = {package: found for package, (state, found) in looked_at.items() if state != "ok"}
    if not wrong:
        versions = [f"{package} {version}" for package, (_, version) in looked_at.items()]
        return Check(f"extra {name}", "ok", ", ".join(versions) or "needs nothing more")
    missing = any(state == "missing" for state, _ in looked_at.values())
    return Check(
        f"extra {name}",
        "missing" if missing else "broken",
        ", ".join(f"{package} ({found})" for package, found in wrong.items()),
        f'pip install "{_OWN}[{name}]"',
    )


def _brought(extra: str) -> list[Requirement]:
    """Return what an extra brings, also by way of other extras, and by extras of others."""
    found: list[Requirement] = []
    for requirement in _requirements(_OWN, extra):
        if canonicalize_name(requirement.name) == _OWN:
            for other in sorted(requirement.extras):
                found += _brought(other)
            continue
        found.append(requirement)
        if requirement.extras and _version(requirement)[0] != "missing":
            for other in sorted(requirement.extras):
                found += _requirements(requirement.name, other)
    return found


# -- machine -------------------------------------------------------------------------------------


def _machine() -> list[Check]:
    """Processor, torch, devices, and whether compiled paths really run on them."""
    advice = "install torch anew, see https://pytorch.org/get-started/locally"
    torch = _attempt("torch runs", _run_torch, advice, required=True)
    if torch.state != "ok":
        return [torch]
    return [torch, _attempt("processor", _describe_processor), *_accelerators(), _numba()]


def _attempt(
    name: str, work: Callable[[], str], advice: str = "", *, required: bool = False
) -> Check:
    """Return what ``work`` finds; if it raises, that this is broken."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Check(name, "ok", work(), required=required)
    except Exception as error:  # a damaged installation fails in any way
        return Check(name, "broken", _reason(error), advice, required)


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())[:200]
    return text if isinstance(error, PluginError) else f"{type(error).__name__}: {text}"


def _run_torch() -> str:
    import torch

    if torch.ones(2, 2).sum().item() != 4.0:
        raise PluginError("a sum of four ones is not four")
    version = torch.version.cuda
    return f"built for CUDA {version}" if version else "built without CUDA"


def _describe_processor() -> str:
    from cmd_plugin.machine import describe_machine

    machine = describe_machine()
    return f"{machine['processor']}, cores: {machine['cores']}, threads used: {machine['threads']}"


def _accelerators() -> Iterable[Check]:
    import torch

    yield _cuda()
    if torch.cuda.is_available():
        if find_spec("triton") is None:
            advice = "pip install triton (Linux only)"
            yield Check("Triton kernels", "missing", "PyTorch's paths are used", advice)
        else:
            advice = "install the triton of this torch, or set CMD_PLUGIN_BACKEND=torch"
            yield _attempt("Triton kernels", lambda: _run_kernel("triton"), advice, required=True)
    else:
        yield Check("Triton kernels", "missing", "no CUDA device: the CPU paths are used")
    if sys.platform == "darwin":
        there = torch.backends.mps.is_available()
        yield Check("MPS device", "ok" if there else "missing", "Metal" if there else "none")


def _cuda() -> Check:
    import torch

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        there = torch.cuda.is_available()
    if there:
        return _attempt("CUDA device", _describe_cuda, required=True)
    if said:
        found = " ".join(str(said[0].message).split())[:200]
        advice = "update the NVIDIA driver, or install a torch that is built for it"
        return Check("CUDA device", "broken", found, advice)
    if torch.version.cuda is None and shutil.which("nvidia-smi"):
        advice = "install a torch that is built for CUDA, see https://pytorch.org"
        return Check("CUDA device", "missing", "this torch is built without CUDA", advice)
    return Check("CUDA device", "missing", "none")


def _describe_cuda() -> str:
    import torch

    about = torch.cuda.get_device_properties(0)
    count = torch.cuda.device_count()
    several = f", the first of {count}" if count > 1 else ""
    memory = about.total_memory / 1e9
    return f"{about.name}, capability {about.major}.{about.minor}, {memory:.0f} GB{several}"


def _numba() -> Check:
    name = "numba kernels"
    if find_spec("numba") is None:
        found = "not installed: PyTorch does the same in about twice the time"
        return Check(name, "missing", found, f'pip install "{_OWN}[fast]"')
    advice = f'pip install --upgrade "{_OWN}[fast]", or set CMD_PLUGIN_BACKEND=torch'
    # Where numba is installed it is chosen, so then it has to work.
    return _attempt(name, lambda: _run_kernel("numba"), advice, required=True)


def _run_kernel(backend: Literal["numba", "triton"]) -> str:
    """Run the smallest of the kernels, and compare it with PyTorch's path."""
    import torch

    from cmd_plugin.kernels import reconstruct

    device = torch.device("cuda" if backend == "triton" else "cpu")
    values = torch.arange(1000.0, device=device)
    mode = (values % 3).to(torch.uint8)
    step = torch.tensor([0.25, -1.5, 7.0], dtype=torch.float64)
    got, expected = (
        reconstruct(mode, values, values.sqrt(), step, backend=path) for path in (backend, "torch")
    )
    if not torch.equal(got, expected):
        raise PluginError("its numbers are not those of PyTorch")
    return "compiled and run on " + ("the CUDA device" if device.type == "cuda" else "the CPU")


# -- data and disk -------------------------------------------------------------------------------


def _data(data_root: str | Path | None) -> Check:
    chosen = data_root or os.environ.get(ROOT_VARIABLE)
    if not chosen:
        advice = f"set {ROOT_VARIABLE} or pass --data-root to use data on your disk"
        return Check("data root", "missing", "none is named: digits and shapes need none", advice)
    root = Path(chosen).expanduser()
    advice = f"correct --data-root or {ROOT_VARIABLE}"
    return _attempt("data root", lambda: _describe_data(root), advice, required=True)


def _describe_data(root: Path) -> str:
    if not root.exists():
        raise InputError(f"{root} does not exist")
    known = [name for name, mark in MARKS.items() if (root / mark).exists()]
    clouds = root / "pointcloud" if (root / "pointcloud").is_dir() else root
    known += [name for name, pattern in _CLOUDS.items() if any(clouds.glob(pattern))]
    if clouds != root:
        known.append(f"pointcloud ({sum(1 for _ in clouds.iterdir())} files)")
    return f"{root} has {', '.join(known) or 'none of the known data sets'}"


def _disk() -> Check:
    def describe() -> str:
        free = shutil.disk_usage(Path.cwd()).free
        text = f"{free / 1e9:.1f} GB free in {Path.cwd()}"
        if free < _LITTLE_SPACE:
            raise InputError(text)
        return text

    return _attempt("disk", describe, "free some space, or work in another folder")
