"""The monitor of CLIP-like models: right values, a training left alone, exact resumption."""

# ruff: noqa: ARG002 - Lightning fixes the signatures of its hooks

from __future__ import annotations

import importlib
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from clip_toys import QUIET, Resumable, make_clip, pairs
from torch import Tensor, nn
from torch.utils.data import DataLoader

from cmd_plugin.callbacks import EmbeddingGeometryMonitor
from cmd_plugin.clip import (
    Whitening,
    alignment,
    conformity,
    fit_ellipsoid,
    modality_gap,
    uniformity,
)
from cmd_plugin.errors import InputError, StateMismatch


class Watched(EmbeddingGeometryMonitor):
    """Remembers what it was given and what it logged."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.seen: list[tuple[int, int]] = []
        self.logged: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
        before = self._statistics.get("image")
        rows = 0 if before is None else before.rows
        super().on_train_batch_end(trainer, pl_module, *rest)
        after = self._statistics.get("image")
        if after is not None and (after is not before or after.rows != rows):
            self.seen.append((trainer.current_epoch, rest[-1]))

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            found = trainer.callback_metrics.items()
            self.logged.append({k: float(v) for k, v in found if k.startswith("geometry/")})


def fit(
    namespace: str, *callbacks: Any, train: Any = None, module: Any = None, **options: Any
) -> Any:
    """Train; the trainer."""
    lightning = importlib.import_module(namespace)
    ckpt_path = options.pop("ckpt_path", None)
    settings = {**QUIET, "max_epochs": 3, "enable_checkpointing": False, **options}
    trainer = lightning.Trainer(callbacks=list(callbacks), **settings)
    trainer.fit(
        make_clip(namespace) if module is None else module,
        Resumable() if train is None else train,
        DataLoader(pairs(50, seed=1), batch_size=16),
        ckpt_path=ckpt_path,
    )
    return trainer


def test_logged_values_are_those_of_the_functions(namespace: str) -> None:
    monitor = Watched(pairs=40, reference_batches=1)
    trainer = fit(namespace, monitor)
    module = trainer.lightning_module.eval()
    points, words = pairs(50, seed=1)[:40]
    order = torch.randperm(96, generator=torch.Generator().manual_seed(2)).split(16)[-1]
    last_points, last_words = pairs(96)[order]
    with torch.no_grad():
        images, texts = module.encode_image(points), module.encode_text(words)
        last = {"image": module.encode_image(last_points), "text": module.encode_text(last_words)}
    gap = modality_gap(images, texts)
    expected = {
        "gap": gap.l2m,
        "paired_cosine": gap.paired_cosine,
        "alignment": alignment(images, texts),
        "skipped": 0.0,
    }
    for name, x in (("image", images), ("text", texts)):
        shape = fit_ellipsoid(x)
        expected[f"{name}_uniformity"] = uniformity(x)
        expected[f"{name}_conformity"] = float(conformity(x).mean())
        expected[f"{name}_anisotropy"] = shape.anisotropy
        expected[f"{name}_norm_variation"] = shape.thickness / shape.radius
        fitted = Whitening.fit(last[name], shrinkage="ledoit-wolf")
        expected[f"{name}_log_likelihood"] = float(fitted.log_likelihood(x).mean())
        expected[f"{name}_train_log_likelihood"] = float(fitted.log_likelihood(last[name]).mean())
    assert len(monitor.logged) == 3
    assert monitor.logged[-1].keys() == {f"geometry/{name}" for name in expected}
    for name, value in expected.items():
        assert monitor.logged[-1][f"geometry/{name}"] == pytest.approx(value, rel=1e-5, abs=1e-6)


def test_watching_changes_nothing(namespace: str) -> None:
    plain = fit(namespace)
    random = torch.get_rng_state()
    watched = fit(namespace, EmbeddingGeometryMonitor())
    assert torch.equal(random, torch.get_rng_state())
    expected, found = (t.lightning_module.state_dict() for t in (plain, watched))
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_the_reference_is_the_last_batches_before_each_validation(namespace: str) -> None:
    monitor = Watched(reference_batches=2, pairs=10)
    fit(namespace, monitor)
    assert monitor.seen == [(epoch, batch) for epoch in range(3) for batch in (4, 5)]
    often = Watched(reference_batches=2)
    fit(namespace, often, val_check_interval=4)  # nothing follows batches 4 and 5
    assert often.seen == [(epoch, batch) for epoch in range(3) for batch in (2, 3)]
    seldom = Watched(reference_batches=99)
    fit(namespace, seldom, check_val_every_n_epoch=2)
    assert seldom.seen == [(1, batch) for batch in range(6)]
    never = Watched(reference_batches=0)
    fit(namespace, never)
    assert never.seen == []
    assert not any("likelihood" in name for name in never.logged[-1])


def test_how_often_to_look(namespace: str) -> None:
    monitor = Watched(every_n_epochs=3)
    fit(namespace, monitor, max_epochs=3)
    assert [bool(logged) for logged in monitor.logged] == [False, False, True]


@pytest.mark.parametrize("step", [4, 11, 12])
def test_a_resumed_run_equals_an_uninterrupted_one(
    namespace: str, tmp_path: Path, step: int
) -> None:
    callbacks = importlib.import_module(f"{namespace}.callbacks")

    def run(**options: Any) -> Watched:
        monitor = Watched(reference_batches=4)
        keep = callbacks.ModelCheckpoint(
            tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=step
        )
        module = make_clip(namespace)
        module.image[2].p = 0.0  # the random stream is not in a checkpoint
        fit(namespace, monitor, keep, module=module, enable_checkpointing=True, **options)
        return monitor

    whole = run()
    path = tmp_path / f"step={step}.ckpt"
    state = torch.load(path, weights_only=True)["callbacks"]
    assert any("image" in held for held in state.values())
    resumed = run(ckpt_path=path)
    assert resumed.logged == whole.logged[-len(resumed.logged) :]
    assert len(resumed.logged) == 3 - step // 6


def test_a_state_of_another_version_or_damaged_is_refused(namespace: str) -> None:
    monitor = Watched()
    with pytest.raises(StateMismatch, match="version 9"):
        monitor.load_state_dict({"version": 9})
    fit(namespace, monitor, val_check_interval=4)
    state = monitor.state_dict()
    assert state.keys() == {"version", "image", "text"}
    fresh = EmbeddingGeometryMonitor()
    fresh.load_state_dict(state)
    assert torch.equal(fresh.state_dict()["text"]["second"], state["text"]["second"])
    state["text"]["second"] = torch.zeros(2)
    with pytest.raises(StateMismatch, match="second"):
        fresh.load_state_dict(state)


def test_memory_is_bounded() -> None:
    monitor = EmbeddingGeometryMonitor(pairs=20)
    trainer = fit("pytorch_lightning", monitor)
    for index in range(50):
        monitor.on_validation_batch_end(
            trainer, trainer.lightning_module, None, list(pairs(16)[:]), index
        )
    assert sum(len(images) for images, _ in monitor._kept) == 20


def test_batches_and_networks_of_other_kinds(namespace: str) -> None:
    module = make_clip(namespace)
    monitor = EmbeddingGeometryMonitor(text_key="caption")
    points, words = pairs(4)[:]
    images, texts = monitor.embed(module, {"image": points, "caption": words})
    assert images.shape == texts.shape == (4, 5)
    with pytest.raises(InputError, match="text_key="):
        monitor.embed(module, {"image": points, "text": words})
    with pytest.raises(InputError, match="no submodule 'net'"):
        EmbeddingGeometryMonitor(network="net").embed(module, [points, words])
    with pytest.raises(InputError, match="no image tower"):
        EmbeddingGeometryMonitor(network="image").embed(module, [points, words])


def test_embeddings_that_are_normalised_are_warned_of(namespace: str) -> None:
    module = make_clip(namespace)
    raw = module.encode_image
    module.encode_image = lambda x: nn.functional.normalize(raw(x))
    with pytest.warns(UserWarning, match="divided by their norms"):
        EmbeddingGeometryMonitor().embed(module, list(pairs(4)[:]))


def test_embeddings_that_went_wrong_do_not_stop_the_training(
    namespace: str, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(Watched):
        """Gives one infinite row, and later equal ones."""

        def embed(self, pl_module: Any, batch: Any) -> tuple[Tensor, Tensor]:
            images, texts = super().embed(pl_module, batch)
            images[0] = torch.inf
            return (images, texts) if pl_module.current_epoch < 2 else (images * 0.0 + 1.0, texts)

    monitor = Broken()
    fit(namespace, monitor)
    assert [logged.get("geometry/skipped") for logged in monitor.logged[:2]] == [4.0, 4.0]
    assert "Nothing is logged of epoch 2" in caplog.text


def test_validation_alone_is_looked_at(namespace: str) -> None:
    monitor = EmbeddingGeometryMonitor(every_n_epochs=5)
    lightning = importlib.import_module(namespace)
    trainer = lightning.Trainer(callbacks=[monitor], enable_checkpointing=False, **QUIET)
    found = trainer.validate(make_clip(namespace), DataLoader(pairs(50), 16), verbose=False)[0]
    assert found["geometry/gap"] > 0.0
    assert "geometry/image_log_likelihood" not in found


@pytest.mark.parametrize(
    ("name", "value"), [("pairs", 2), ("reference_batches", -1), ("every_n_epochs", 0)]
)
def test_wrong_arguments_are_refused(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=name):
        EmbeddingGeometryMonitor(**{name: value})


@pytest.mark.filterwarnings("ignore:(?s).*(JsonargparseDeprecationWarning|was deprecated in v)")
def test_it_pickles_and_reads_from_a_configuration() -> None:
    jsonargparse = pytest.importorskip("jsonargparse")
    again = pickle.loads(pickle.dumps(EmbeddingGeometryMonitor(pairs=7)))
    assert again.pairs == 7
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(EmbeddingGeometryMonitor, "monitor")
    kind = "cmd_plugin.callbacks.EmbeddingGeometryMonitor"
    config = {"class_path": kind, "init_args": {"pairs": 9, "network": "clip"}}
    made = parser.instantiate_classes(parser.parse_object({"monitor": config})).monitor
    assert (made.pairs, made.network) == (9, "clip")
