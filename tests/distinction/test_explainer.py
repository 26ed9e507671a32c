"""Training around a frozen classifier: nothing of the user's changes, nor does a stop."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import resnet18

from cmd_plugin.data import EpochShuffle, make_loader
from cmd_plugin.distinction import DecompositionExplainer, LossWeights, decompose
from cmd_plugin.distinction.objectives import OBJECTIVES
from cmd_plugin.errors import InputError, StateMismatch
from cmd_plugin.jobs.distinction.data import load_split_data, pixel_range
from cmd_plugin.jobs.distinction.options import TrainOptions
from cmd_plugin.runs.process import quiet_lightning
from tests.helpers.distinction import conv_net, images

SMALL: dict[str, Any] = {"branches": 2, "width": 4, "levels": 1, "critic_width": 4}


def loader(count: int = 16, channels: int = 1, classes: int = 2, shuffle: bool = True) -> Any:
    x, labels = images(count, channels), torch.arange(count) % classes
    data = TensorDataset(x + labels[:, None, None, None] * 0.5, labels)
    sampler = EpochShuffle(count, 0) if shuffle else None
    return DataLoader(data, batch_size=8, sampler=sampler)


def explainer(classifier: nn.Module | None = None, **options: Any) -> DecompositionExplainer:
    given = {**SMALL, **options}
    return DecompositionExplainer(classifier or conv_net(), 2, 1, 8, **given)


def trainer(epochs: int = 1, **options: Any) -> pl.Trainer:
    given = {"accelerator": "cpu", "enable_checkpointing": False, "logger": False, **options}
    return pl.Trainer(
        max_epochs=epochs, enable_progress_bar=False, enable_model_summary=False, **given
    )


def train(module: pl.LightningModule, epochs: int = 1, **options: Any) -> pl.Trainer:
    with quiet_lightning():
        made = trainer(epochs, **options.pop("trainer", {}))
        made.fit(module, loader(), **options)
    return made


def weights(module: DecompositionExplainer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_trains_the_generator_the_critic_and_the_average(objective: str) -> None:
    module = explainer(objective=objective)
    before = weights(module)
    made = train(module, 2)
    assert module.steps == 4
    for name, tensor in module.state_dict().items():
        trained = name.startswith(("generator.", "critic.", "decomposer.generator."))
        assert torch.equal(tensor, before[name]) != trained, name
        assert bool(tensor.isfinite().all())
    assert {"train_classes", "train_critic", "train_reconstruction"} <= made.callback_metrics.keys()


def test_the_users_classifier_is_bit_identical_afterwards() -> None:
    torch.manual_seed(0)
    network = resnet18(num_classes=3).train()
    before = copy.deepcopy(network.state_dict())
    module = DecompositionExplainer(network, 3, 3, 8, **SMALL)
    with quiet_lightning():
        trainer().fit(module, loader(channels=3, classes=3))
    assert network.training
    assert all(p.requires_grad and p.grad is None for p in network.parameters())
    frozen = module.decomposer.classifier
    assert frozen is not None
    for owner in (network, frozen.network):
        assert same(owner.state_dict(), before)
    split = decompose(module.decomposer, images(2, 3), [0, 2])
    assert split.branches.shape == (2, 2, 3, 8, 8)


def test_real_digits_are_reconstructed_after_fifty_steps() -> None:
    """On digits with a cross: all losses finite, the sum of the branches near the image."""
    given = TrainOptions(plant="cross", train_limit=800)
    data = load_split_data(given)
    pixels = pixel_range(data.mean, data.std)
    module = DecompositionExplainer(
        *(None, 2, 1, 16),
        objective="distinction",
        low=pixels.low.flatten().tolist(),
        high=pixels.high.flatten().tolist(),
    )
    losses: list[Tensor] = []

    class Recorder(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:  # noqa: ARG002
            losses.append(trainer.callback_metrics["train_reconstruction"] / 4.0)

    with quiet_lightning():
        trainer(callbacks=[Recorder()]).fit(module, make_loader(data.train, 16, shuffle_seed=0))
    assert len(losses) == 50
    assert all(bool(loss.isfinite()) for loss in losses)
    assert losses[0] > 1.0
    assert torch.stack(losses[-10:]).mean() < 0.4


def test_trainers_of_both_lightnings_train_to_the_same_bits() -> None:
    other = pytest.importorskip("lightning.pytorch")
    from cmd_plugin.distinction.lightning import DecompositionExplainer as OtherExplainer

    ours = explainer()
    train(ours, 2)
    theirs = OtherExplainer(conv_net(), 2, 1, 8, **SMALL)
    with quiet_lightning():
        made = other.Trainer(
            accelerator="cpu",
            max_epochs=2,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        made.fit(theirs, loader(), loader(shuffle=False))
    assert "split_psnr" in made.callback_metrics
    assert theirs.steps == 4
    assert same(weights(theirs), weights(ours))


def test_training_leaves_the_classifier_in_evaluation_mode() -> None:
    module = explainer().train()
    assert module.generator.training
    assert not any(m.training for m in module.decomposer.classifier.modules())  # type: ignore[union-attr]


def test_a_run_that_was_stopped_ends_with_the_same_bits(tmp_path: Path) -> None:
    whole = explainer()
    train(whole, 3)
    first = explainer()
    made = train(first, 1)
    made.save_checkpoint(tmp_path / "last.ckpt")
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert not any("classifier" in name for name in content["state_dict"])
    second = explainer()
    torch.manual_seed(1234)  # nothing is drawn from the global state
    train(second, 3, ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert second.steps == whole.steps == 6
    assert same(weights(second), weights(whole))


def test_a_checkpoint_of_another_classifier_is_refused(tmp_path: Path) -> None:
    train(explainer(), 1).save_checkpoint(tmp_path / "last.ckpt")
    other = conv_net()
    with torch.no_grad():
        other[1].running_var += 0.01
    with pytest.raises(StateMismatch, match="another classifier"):
        train(explainer(other), 2, ckpt_path=tmp_path / "last.ckpt", weights_only=True)


def test_the_same_seed_is_the_same_run_and_another_is_not() -> None:
    runs = [explainer(seed=seed) for seed in (3, 3, 4)]
    for number, module in enumerate(runs):
        torch.manual_seed(number)
        train(module)
    assert same(weights(runs[0]), weights(runs[1]))
    assert not same(weights(runs[0]), weights(runs[2]))


def test_the_average_is_the_running_mean_at_first() -> None:
    """With (t + 1) / (t + 10) as its share, the first average is nine tenths of the new weights."""
    module = explainer()
    before = weights(module)
    with quiet_lightning():
        trainer(max_steps=2).fit(module, loader())  # one step of each optimizer
    assert module.steps == 1
    for name, parameter in module.generator.named_parameters():
        wanted = 0.1 * before[f"generator.{name}"] + 0.9 * parameter
        average = module.decomposer.generator.get_parameter(name)
        torch.testing.assert_close(average, wanted.detach())


def test_mixed_precision_trains_and_keeps_full_weights() -> None:
    module = explainer()
    train(module, trainer={"precision": "bf16-mixed"})
    assert {p.dtype for p in module.generator.parameters()} == {torch.float32}
    assert all(bool(t.isfinite().all()) for t in module.state_dict().values())


def test_validation_logs_the_quality_and_warns_of_a_collapse() -> None:
    module = explainer(judge=nn.Sequential(nn.Flatten(), nn.Linear(64, 2)))
    with quiet_lightning():
        made = trainer()
        made.fit(module, loader(), loader(shuffle=False))
    names = ("psnr", "removed", "specialization", "distinct_power", "shortcut")
    assert {f"split_{name}" for name in names} <= made.callback_metrics.keys()
    module.steps = 10_000  # as if it had settled
    with torch.no_grad():
        module.decomposer.generator.head.weight.zero_()
    with quiet_lightning(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made.validate(module, loader(shuffle=False), verbose=False)
    assert any("collapsed" in str(warning.message) for warning in caught)


def test_the_penalty_can_be_taken_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    from cmd_plugin.distinction import losses

    original = losses.gradient_penalty
    monkeypatch.setattr(
        losses, "gradient_penalty", lambda *given: taken.append(1) or original(*given)
    )
    train(explainer(penalty_every=3), 2)
    assert len(taken) == 2  # of the steps 0 to 3


def test_the_mapping_of_noise_learns_at_a_hundredth_of_the_rate() -> None:
    module = explainer(noise=3)
    by_generator, _ = module.configure_optimizers()
    rates = {id(p): group["lr"] for group in by_generator.param_groups for p in group["params"]}
    mapping = {id(p) for p in module.generator.codes.parameters()}
    assert len(rates) == len([*module.generator.parameters()])
    for parameter in module.generator.parameters():
        wanted = 1e-5 if id(parameter) in mapping else 1e-3
        assert rates[id(parameter)] == pytest.approx(wanted)
    runs = [module, explainer(noise=3)]
    for run in runs:
        train(run)
    assert same(weights(runs[0]), weights(runs[1]))


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(InputError, match="choose distinction"):
        DecompositionExplainer(None, 2, 1, 8)
    with pytest.raises(InputError, match="critic_lr"):
        explainer(critic_lr=0.0)
    with pytest.raises(InputError, match="penalty_every"):
        explainer(penalty_every=0)
    with pytest.raises(InputError, match="ema"):
        explainer(ema=1.0)


def test_without_a_classifier_the_labels_are_explained() -> None:
    module = DecompositionExplainer(
        None, 2, 1, 8, objective="distinction", weights=LossWeights(sparsity=1.0), **SMALL
    )
    made = train(module)
    assert "train_sparsity" in made.callback_metrics
    assert module(images(), 1).shape == (4, 1, 8, 8)
