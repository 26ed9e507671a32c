"""The device that an accelerator's name stands for."""

from __future__ import annotations

import pytest
import torch

from cmd_plugin.errors import InputError
from cmd_plugin.runs.process import pick_device


def test_a_name_stands_for_a_device_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pick_device("cpu") == torch.device("cpu")
    for there, found in ((False, "cpu"), (True, "cuda")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert pick_device("auto") == torch.device(found)
    assert pick_device("gpu") == pick_device("cuda") == torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="no gpu device was found"):
        pick_device("gpu")
