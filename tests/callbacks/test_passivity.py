"""Training is the same, bit for bit, with and without the callback."""
# ruff: noqa: ARG002 - Lightning fixes the signatures of its hooks

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from callback_toys import (
    Counting,
    Toy,
    make_module,
    make_trainer,
    modelled_weights,
    same,
    toy_loader,
    weights_of,
)
from torch import Tensor, nn
from torch.nn.functional import cross_entropy


class Random(Toy):
    """Draws from every random stream, in training and in validation."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        noise = random.random() + np.random.rand()  # noqa: NPY002 - the stream of user code
        return super().training_step((batch[0] + 0.01 * noise, batch[1]), batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        noise = random.random() + np.random.rand() + torch.rand(())  # noqa: NPY002
        super().validation_step((batch[0] + 0.01 * noise, batch[1]), batch_idx)


class TwoOptimizers(Random):
    """Manual optimization with two optimizers."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            loss = super().training_step(batch, batch_idx)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        first, last = self.net[0].parameters(), self.net[-1].parameters()
        return [torch.optim.SGD(first, lr=0.1), torch.optim.Adam(last, lr=0.01)]


def train(callback: Any, namespace: str, kind: type, **options: Any) -> dict[str, Any]:
    """All that training leaves behind."""
    module = make_module(namespace, kind)
    identities = [id(parameter) for parameter in module.parameters()]
    pointers = [parameter.data_ptr() for parameter in module.parameters()]
    trainer = make_trainer(
        *([callback] if callback else []), namespace=namespace, max_epochs=6, **options
    )
    trainer.fit(module, toy_loader(shuffle=True), toy_loader(seed=2))
    assert [id(parameter) for parameter in module.parameters()] == identities
    assert [parameter.data_ptr() for parameter in module.parameters()] == pointers
    validation = {k: v for k, v in trainer.callback_metrics.items() if not k.startswith("cmd/")}
    if callback is not None and callback.evaluate == "modelled":
        validation = {}
    return {
        "losses": module.losses,
        "weights": weights_of(module),
        "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "validation": validation,
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state()[1].tolist(),  # noqa: NPY002
        "python": random.getstate(),
        "step": trainer.global_step,
    }


@pytest.mark.parametrize("mode", ["both", "modelled", "raw"])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (Random, {}),
        (Random, {"val_check_interval": 0.5, "accumulate_grad_batches": 2}),
        (Random, {"precision": "bf16-mixed"}),
        (TwoOptimizers, {}),
    ],
)
def test_training_does_not_notice(mode: str, kind: type, options: dict[str, Any]) -> None:
    callback = Counting(evaluate=mode)
    watched = train(callback, "pytorch_lightning", kind, **options)
    alone = train(None, "pytorch_lightning", kind, **options)
    assert callback.count("show") > 0 or mode == "raw"
    if mode == "modelled":
        alone["validation"] = {}
    for what, expected in alone.items():
        assert same(watched[what], expected), what


@pytest.mark.parametrize(
    "options",
    [
        {"shrink": True, "profile": "mean", "forgetting": 0.9},
        {"storage": "fp32", "store_device": "cpu", "buffers": "keep"},
        {"buffers": "recalibrate"},
        {"every_n_steps": 3, "warmup": 0.2},
        {"include": ("net.0.*",), "exclude": ("*.bias",)},
        {"checkpoint_weights": "modelled"},
    ],
)
def test_training_does_not_notice_any_option(namespace: str, options: dict[str, Any]) -> None:
    watched = train(Counting(**options), namespace, Random)
    assert same(watched, train(None, namespace, Random))


def test_mixed_precision_models_the_float_weights() -> None:
    callback = Counting()
    module = make_module(norm=False)
    trainer = make_trainer(callback, precision="bf16-mixed")
    trainer.fit(module, toy_loader(), toy_loader(seed=2))
    assert callback.modes is not None
    assert set(callback.modes.layout.dtypes) == {"float32"}
    # The second pass ran under the same autocast as the trainer's own validation.
    module.load_state_dict(modelled_weights(callback, module))
    module.eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for points, labels in toy_loader(seed=2):
            with torch.autocast("cpu", torch.bfloat16):
                scores = module(points)
            total += float(cross_entropy(scores.float(), labels)) * len(labels)
            count += len(labels)
    assert float(trainer.callback_metrics["cmd/val_loss"]) == pytest.approx(total / count, rel=2e-2)
    assert callback.count("show") == 3


class Lean(Toy):
    """Little to compile; with ``inside`` the network is compiled and its names get a prefix."""

    def __init__(self, inside: bool = False) -> None:
        super().__init__(dropout=0.0)
        if inside:
            self.net = torch.compile(self.net, backend="eager")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", cross_entropy(self(batch[0]), batch[1]))


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("where", ["inside", pytest.param("outside", marks=pytest.mark.slow)])
def test_compiled_module(where: str) -> None:
    """Modelled weights reach the compiled graph, because values change in place."""
    torch.compiler.reset()
    callback = Counting()
    module = make_module(kind=Lean, inside=where == "inside")
    trainer = make_trainer(callback)
    fitted = torch.compile(module, backend="eager") if where == "outside" else module
    trainer.fit(fitted, toy_loader(), toy_loader(seed=2))
    assert callback.modes is not None
    assert callback.modes.layout.names[0] == "net.0.weight"
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}

    plain = Counting()
    trainer = make_trainer(plain)
    trainer.fit(make_module(kind=Lean), toy_loader(), toy_loader(seed=2))
    assert plain.modes is not None
    assert torch.equal(callback.modes.reconstruct(), plain.modes.reconstruct())
    expected = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert logged == pytest.approx(expected)
    assert logged["cmd/val_loss"] != logged["val_loss"]
    torch.compiler.reset()


def test_tied_and_frozen_weights() -> None:
    class Tied(Toy):
        def __init__(self) -> None:
            super().__init__(norm=False, dropout=0.0)
            self.net = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.Linear(6, 3))
            self.net[2].weight = self.net[0].weight
            self.net[3].weight.requires_grad_(False)

    callback = Counting()
    module = make_module(kind=Tied)
    frozen = module.net[3].weight.clone()
    make_trainer(callback).fit(module, toy_loader(), toy_loader(seed=2))
    assert callback.modes is not None
    assert callback.modes.layout.names == ("net.0.weight", "net.0.bias", "net.2.bias", "net.3.bias")
    modelled = modelled_weights(callback, module)
    assert torch.equal(modelled["net.0.weight"], modelled["net.2.weight"])
    assert torch.equal(modelled["net.3.weight"], frozen)
    assert module.net[0].weight is module.net[2].weight


def test_weights_frozen_and_thawed_on_the_way(caplog: pytest.LogCaptureFixture) -> None:
    """What is modelled is decided at the start: thawed weights stay raw, frozen ones go on."""

    class Turning(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.net[4].bias.requires_grad_(False)

        def on_train_epoch_start(self) -> None:
            if self.trainer.current_epoch == 3:
                self.net[0].weight.requires_grad_(False)
                self.net[4].bias.requires_grad_(True)

    callback = Counting()
    module = make_module(kind=Turning)
    make_trainer(callback, max_epochs=6).fit(module, toy_loader(), toy_loader(seed=2))
    assert callback.modes is not None
    assert callback.modes.updates == 6
    assert "net.0.weight" in callback.modes.layout.names
    assert "net.4.bias" not in callback.modes.layout.names
    modelled = modelled_weights(callback, module)
    assert torch.equal(modelled["net.4.bias"], module.net[4].bias)
    assert not torch.equal(modelled["net.0.weight"], module.net[0].weight)
    assert caplog.text.count("1 tensors were unfrozen after the modes were made") == 1
    assert "(net.4.bias)" in caplog.text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("store_device", [None, "cpu"])
def test_on_a_gpu(namespace: str, store_device: str | None) -> None:
    """State beside the weights, the same random stream, and weights moved back after the run."""
    runs = []
    for callback in (Counting(store_device=store_device), None):
        module = make_module(namespace, Random)
        trainer = make_trainer(
            *([callback] if callback else []), namespace=namespace, accelerator="gpu", max_epochs=6
        )
        trainer.fit(module, toy_loader(), toy_loader(seed=2))
        runs.append((weights_of(module), torch.cuda.get_rng_state(), torch.get_rng_state()))
        if callback is not None:
            assert callback.modes is not None
            assert callback.modes.assignment.device.type == "cuda"
            trainer.test(module, toy_loader(seed=2), verbose=False)
            modelled = modelled_weights(callback, module)
            assert {tensor.device.type for tensor in modelled.values()} == {"cpu"}
            torch.set_rng_state(runs[0][2])
            torch.cuda.set_rng_state(runs[0][1])
    assert same(runs[0], runs[1])
