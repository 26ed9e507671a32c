from __future__ import annotations

import math
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from cmd_plugin import errors


@pytest.mark.parametrize(
    ("name", "builtin"),
    [
        ("InputError", ValueError),
        ("ShapeError", ValueError),
        ("NonFiniteError", ValueError),
        ("StateMismatch", ValueError),
        ("MissingDependency", ImportError),
    ],
)
def test_each_error_is_ours_and_also_the_builtin_a_caller_would_catch(
    name: str, builtin: type[Exception]
) -> None:
    error = getattr(errors, name)
    assert issubclass(error, errors.PluginError)
    assert issubclass(error, builtin)


@pytest.mark.parametrize("name", ["ShapeError", "NonFiniteError", "StateMismatch"])
def test_wrong_input_of_any_kind_is_an_input_error(name: str) -> None:
    with pytest.raises(errors.InputError, match=r"^said once$"):
        raise getattr(errors, name)("said once")


def test_a_missing_dependency_is_no_input_error() -> None:
    assert not issubclass(errors.MissingDependency, errors.InputError)


@pytest.mark.parametrize("name", [name for name in errors.__all__ if name[0].isupper()])
def test_errors_cross_process_boundaries(name: str) -> None:
    error = getattr(errors, name)("a sentence")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == "a sentence"


def test_require_returns_the_module_that_was_asked_for() -> None:
    assert errors.require("math", "points") is math
    assert errors.require("os.path", "points") is sys.modules["os.path"]


@pytest.mark.parametrize("module", ["no_such_package_here", "no_such_package_here.inner"])
def test_require_names_the_module_and_the_extra(module: str) -> None:
    with pytest.raises(errors.MissingDependency) as caught:
        errors.require(module, "clip")
    message = str(caught.value)
    assert repr(module) in message
    assert 'pip install "cmd-plugin[clip]"' in message
    assert message.count(". ") == 0, "one sentence"
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


def test_require_does_not_hide_a_fault_inside_an_installed_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "half_broken_package.py").write_text("import no_such_package_here\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="no_such_package_here") as caught:
        errors.require("half_broken_package", "clip")
    assert not isinstance(caught.value, errors.MissingDependency)


def test_errors_import_nothing_heavy() -> None:
    code = "import sys, cmd_plugin.errors; print(*sys.modules, sep='\\n')"
    loaded = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout.split()
    assert not {"torch", "numpy", "lightning", "pytorch_lightning"} & set(loaded)
