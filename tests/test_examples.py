"""Examples that train something run from one command and write what they measured."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
from torch import Tensor, nn

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_tiny_clip_is_trained_and_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = EXAMPLES / "tiny_clip"
    out = tmp_path / "results.json"
    arguments = ["--pairs", "700", "--held-out", "200", "--epochs", "2", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", ["run.py", *arguments, "--out", str(out)])
    monkeypatch.syspath_prepend(folder)
    try:
        runpy.run_path(str(folder / "run.py"), run_name="__main__")
    finally:
        for name in ("pictures", "model", "measures"):
            sys.modules.pop(name, None)
    assert "whole caption right" in capsys.readouterr().out
    (run,) = json.loads(out.read_text())["runs"]
    assert len(run["history"]) == 2
    assert run["history"][0]["gap"] != run["history"][1]["gap"]
    assert run["images"].keys() == {"contrastive", "cross entropy", "untrained"}
    noise = run["images"]["contrastive"]["damaged scores lower (AUROC)"]["noise 0.3"]
    assert noise["likelihood"] > 0.9
    assert str(tmp_path) not in out.read_text()


def test_pictures_have_the_captions_that_describe_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES / "tiny_clip")
    try:
        from pictures import COLOURS, PLACES, load_pictures

        train, held_out, captions = load_pictures("digits", None, 3000, 40, seed=3)
        again, _, _ = load_pictures("digits", None, 3000, 40, seed=3)
    finally:
        sys.modules.pop("pictures", None)
    assert (train.images == again.images).all()
    assert held_out.images.shape == (40, 3, 32, 32)
    words = {number: word for word, number in captions.numbers.items()}
    for image, tokens, concept in zip(
        held_out.images, held_out.tokens, held_out.concepts.tolist(), strict=True
    ):
        caption = " ".join(words[n] for n in tokens.tolist() if n)
        what, colour, place = concept
        assert captions.classes[what] in caption
        assert [*COLOURS][colour] in caption
        assert [*PLACES][place] in caption.replace(",", "")
        top, left = PLACES[[*PLACES][place]]
        outside: Tensor = image.clone()
        outside[:, top : top + 18, left : left + 18] = 0
        assert int(outside.max()) == 0
        brightest = nn.functional.normalize(image.flatten(1).amax(dim=1).float(), dim=0)
        paint = nn.functional.normalize(brightest.new_tensor([*COLOURS.values()][colour]), dim=0)
        assert float(brightest @ paint) > 0.99
    share = train.concepts[:, 1].bincount() / 3000
    assert share.tolist() == pytest.approx([0.40, 0.25, 0.15, 0.10, 0.06, 0.04], abs=0.03)
