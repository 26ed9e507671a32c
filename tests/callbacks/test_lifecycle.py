"""Construction, refusals, copies, and what is left behind."""

from __future__ import annotations

import copy
import importlib
import pickle
from typing import Any

import pytest
import torch
from callback_toys import Counting, Toy, make_module, make_trainer, same, toy_loader, weights_of
from torch import nn

from cmd_plugin.callbacks import CMDCallback
from cmd_plugin.errors import InputError, NonFiniteError, PluginError


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modes": 0}, r"modes must be a whole number, 1 to 256; it is 0\."),
        ({"modes": 300}, r"modes must be .* it is 300"),
        ({"modes": True}, r"modes must be"),
        (
            {"warmup": 1},
            r"warmup must be a whole number, at least 2, or a fraction between 0 and 1",
        ),
        ({"warmup": 1.0}, r"warmup must be .* it is 1\.0"),
        ({"warmup": 20.0}, r"warmup must be .* it is 20\.0"),
        ({"warmup": float("nan")}, r"warmup must be .* it is nan"),
        ({"samples": 0}, r"samples must be"),
        ({"every_n_epochs": 0}, r"every_n_epochs must be"),
        ({"every_n_steps": 0}, r"every_n_steps must be"),
        ({"every_n_steps": 5, "every_n_epochs": 2}, r"exclude each other"),
        ({"evaluate": "cooked"}, r"evaluate must be one of both, modelled, raw; it is 'cooked'\."),
        ({"test": "both"}, r"test must be one of modelled, raw"),
        ({"storage": "int4"}, r"storage must be one of delta-bf16, fp32"),
        ({"buffers": "average"}, r"buffers must be one of"),
        ({"profile": "pca"}, r"profile must be one of"),
        ({"checkpoint_weights": "both"}, r"checkpoint_weights must be one of"),
        ({"forgetting": 0.0}, r"forgetting must"),
        ({"forgetting": 1.5}, r"forgetting must"),
        ({"include": "net.*"}, r"include must be a list of patterns"),
        ({"exclude": (1,)}, r"exclude must be a list of patterns"),
        ({"recalibration_batches": 0}, r"recalibration_batches must be"),
    ],
)
def test_wrong_arguments_fail_where_they_are_written(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        CMDCallback(**options)


def test_it_is_a_callback_of_every_installed_distribution(namespace: str) -> None:
    assert isinstance(CMDCallback(), importlib.import_module(namespace).Callback)


def test_patterns_that_leave_nothing_are_refused() -> None:
    trainer = make_trainer(CMDCallback(include=("backbone.*",)))
    with pytest.raises(InputError, match=r"backbone"):
        trainer.fit(make_module(), toy_loader())


@pytest.mark.parametrize("kind", ["FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy"])
def test_sharded_strategies_are_refused(namespace: str, kind: str) -> None:
    strategies = importlib.import_module(f"{namespace}.strategies")
    # Real ones need several GPUs to start, so a trainer that runs borrows the name.
    base = getattr(strategies, kind)
    assert isinstance(base, type)
    borrowed = type(kind, (strategies.SingleDeviceStrategy,), {})("cpu")
    module = make_module(namespace)
    trainer = make_trainer(CMDCallback(), namespace=namespace, strategy=borrowed)
    with pytest.raises(PluginError, match=rf"CMDCallback needs the whole model .* {kind}"):
        trainer.fit(module, toy_loader())
    assert not module.losses


def test_weight_averaging_wants_the_same_place(namespace: str) -> None:
    callbacks = importlib.import_module(f"{namespace}.callbacks")
    if not hasattr(callbacks, "WeightAveraging"):
        pytest.skip("this Lightning has no WeightAveraging")
    trainer = make_trainer(
        callbacks.WeightAveraging(),
        CMDCallback(checkpoint_weights="modelled"),
        namespace=namespace,
    )
    with pytest.raises(PluginError, match="WeightAveraging both want the state_dict"):
        trainer.fit(make_module(namespace), toy_loader())


@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor")
@pytest.mark.filterwarnings("ignore:Found `dataloader_iter` argument")
def test_a_step_that_fetches_its_batches_is_refused_for_both() -> None:
    class Fetching(Toy):
        def validation_step(self, dataloader_iter: Any) -> None:
            batch, _, _ = next(dataloader_iter)
            self.log("val_size", float(len(batch[0])), batch_size=1)

    with pytest.raises(PluginError, match="evaluate='modelled' or 'raw'"):
        make_trainer(CMDCallback()).fit(
            make_module(kind=Fetching), toy_loader(), toy_loader(seed=2)
        )
    callback = Counting(evaluate="modelled")
    make_trainer(callback).fit(make_module(kind=Fetching), toy_loader(), toy_loader(seed=2))
    assert callback.count("show") == 3


def test_diverged_weights_stop_the_run_with_one_sentence() -> None:
    class Diverging(Toy):
        def on_train_epoch_start(self) -> None:
            if self.trainer.current_epoch == 3:
                with torch.no_grad():
                    self.net[0].weight[0, 0] = float("nan")

    trainer = make_trainer(Counting(), max_epochs=6)
    with pytest.raises(NonFiniteError, match="NaN or infinite"):
        trainer.fit(make_module(kind=Diverging), toy_loader())


def test_two_callbacks_in_one_trainer(namespace: str) -> None:
    few, many = Counting(modes=1, prefix="few/"), Counting(modes=8, prefix="many/")
    trainer = make_trainer(few, many, namespace=namespace)
    trainer.fit(make_module(namespace), toy_loader(), toy_loader(seed=2))
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert metrics["few/explained_variance"] < metrics["many/explained_variance"]
    assert metrics["few/val_loss"] != metrics["many/val_loss"]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
@pytest.mark.parametrize("epochs", [0, 2, 5])
def test_copies_carry_the_state_and_no_model(duplicate: Any, epochs: int) -> None:
    callback = Counting(buffers="recalibrate")
    module = make_module()
    if epochs:
        make_trainer(callback, max_epochs=epochs).fit(module, toy_loader(), toy_loader(seed=2))
    twin = duplicate(callback)
    assert twin.modes is None
    assert same(twin.state_dict(), callback.state_dict())
    assert not [name for name, value in vars(twin).items() if holds_a_module(value)]
    assert twin.number_of_modes == 3
    # Both go on with the same module and see the same weights.
    if epochs:
        make_trainer(callback, max_epochs=4).fit(copy_of(module), toy_loader())
        make_trainer(twin, max_epochs=4).fit(copy_of(module), toy_loader())
        assert twin.modes is not None
        assert twin.modes.updates == epochs + 4


def holds_a_module(value: Any) -> bool:
    """Whether an attribute is a module or a method of one."""
    return isinstance(value, nn.Module) or isinstance(getattr(value, "__self__", None), nn.Module)


def copy_of(module: nn.Module) -> Any:
    """A new module of the same weights."""
    twin = make_module()
    twin.load_state_dict(weights_of(module))
    return twin


def hooks_of(module: nn.Module) -> int:
    """Number of hooks of any kind in the whole module."""
    return sum(
        len(hooks)
        for part in module.modules()
        for name, hooks in vars(part).items()
        if "hook" in name and isinstance(hooks, dict)
    )


@pytest.mark.parametrize("mode", ["both", "modelled"])
@pytest.mark.parametrize("ending", ["success", "exception", "interrupt"])
def test_nothing_is_left_on_the_module(namespace: str, mode: str, ending: str) -> None:
    class Ending(Toy):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            super().validation_step(batch, batch_idx)
            if self.trainer.current_epoch == 3 and ending == "exception":
                raise RuntimeError("broken")
            if self.trainer.current_epoch == 3 and ending == "interrupt":
                raise KeyboardInterrupt

    module = make_module(namespace, Ending)
    attributes, hooks = set(vars(module)), hooks_of(module)
    callback = Counting(evaluate=mode)
    trainer = make_trainer(callback, namespace=namespace)
    if ending == "success":
        trainer.fit(module, toy_loader(), toy_loader(seed=2))
    else:
        with pytest.raises((RuntimeError, SystemExit)):
            trainer.fit(module, toy_loader(), toy_loader(seed=2))
    assert set(vars(module)) - {"_hparams"} == attributes  # Lightning makes that one on demand
    assert hooks_of(module) == hooks
    assert callback.showing == "raw"
    assert all(isinstance(part, nn.Module) for part in module.modules())


def test_barebones_trainer() -> None:
    callback = Counting()
    module = make_module()
    trainer = importlib.import_module("pytorch_lightning").Trainer(
        accelerator="cpu", devices=1, max_epochs=5, barebones=True, callbacks=[callback]
    )
    with pytest.warns(UserWarning, match="barebones"):
        trainer.fit(module, toy_loader(), toy_loader(seed=2))
    assert callback.modes is not None
    assert callback.modes.updates == 5
    assert callback.modes.ready
