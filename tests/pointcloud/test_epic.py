"""The ensemble: twelve members, one pass per view, independence of the batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cmd_plugin.errors import InputError, ShapeError
from cmd_plugin.pointcloud import EPiC, build_network
from cmd_plugin.pointcloud.partials import anchor_points, partial_clouds

SIZES = {"patch": 30, "curve": 40, "random": 20}


class Moments(nn.Module):
    """A network whose answer is known: mean, largest and number of points."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[int, ...]] = []

    def forward(self, clouds: Tensor) -> Tensor:
        self.calls.append(tuple(clouds.shape))
        size = torch.full((len(clouds), 1), float(clouds.shape[1]))
        return torch.cat([clouds.mean(dim=1), clouds.amax(dim=1), size], dim=1)


def clouds(batch: int = 5, points: int = 60) -> Tensor:
    return torch.randn(batch, points, 3, generator=torch.Generator().manual_seed(0))


def test_twelve_members_in_one_pass_per_view() -> None:
    ensemble, points = EPiC(Moments, sizes=SIZES), clouds()
    logits, views = ensemble.votes(points)
    assert logits.shape == (5, 12, 7)
    assert views == ("patch",) * 4 + ("curve",) * 4 + ("random",) * 4 == ensemble.views
    assert [network.calls for network in ensemble.networks.values()] == [
        [(20, 30, 3)],
        [(20, 40, 3)],
        [(20, 20, 3)],
    ]
    assert logits[0, ::4, 6].tolist() == [30, 40, 20]
    assert torch.equal(ensemble(points), logits.mean(dim=1))


def test_members_see_their_own_part_of_their_own_cloud() -> None:
    ensemble, points = EPiC(Moments, sizes=SIZES, seed=3), clouds()
    logits = ensemble.votes(points).logits
    anchors = anchor_points(points, 4)
    for number, view in enumerate(("patch", "curve", "random")):
        parts = partial_clouds(points, view, anchors, SIZES[view], seed=3)
        for member in range(4):
            expected = Moments()(parts[:, member])
            assert torch.allclose(logits[:, 4 * number + member], expected, atol=1e-6)


def test_published_sizes() -> None:
    ensemble = EPiC(Moments)
    ensemble.votes(clouds(1, 1024))
    sizes = [network.calls[0][:2] for network in ensemble.networks.values()]
    assert sizes == [(4, 512), (4, 512), (4, 128)]


def test_identical_networks_on_full_clouds_are_the_single_network() -> None:
    network = build_network("pointnet", 4, 0.1).eval()
    points = clouds(3, 50)
    ensemble = EPiC({"patch": network, "random": network}, sizes={"patch": 50, "random": 50})
    with torch.no_grad():
        # Members permute the points; a max over points does not care.
        assert torch.allclose(ensemble(points), network(points), atol=1e-5)
        assert ensemble.votes(points).logits.shape == (3, 8, 4)


@pytest.mark.parametrize("name", ["pointnet", "dgcnn"])
def test_a_result_does_not_depend_on_its_batch(name: str) -> None:
    torch.manual_seed(0)
    ensemble = EPiC(lambda: build_network(name, 4, 0.1), sizes=SIZES, seed=5).eval()
    points = clouds(6)
    with torch.no_grad():
        whole = ensemble.votes(points).logits
        for picked in (torch.tensor([4, 0, 5]), torch.tensor([2])):
            part = ensemble.votes(points[picked], picked).logits
            # The parts are the same to the last bit; matrix products round by batch size.
            assert torch.allclose(part, whole[picked], atol=1e-5, rtol=1e-5)
    exact = EPiC(Moments, sizes=SIZES, seed=5)
    picked = torch.tensor([4, 2])
    assert torch.equal(exact(points[picked], picked), exact(points)[picked])


def test_extra_members_count_as_one_and_see_the_whole_cloud() -> None:
    extra, points = Moments(), clouds()
    ensemble = EPiC(Moments, sizes=SIZES, extra={"refocused": extra})
    logits, views = ensemble.votes(points)
    assert views[12:] == ("refocused",)
    assert extra.calls == [(5, 60, 3)]
    assert torch.equal(logits[:, 12], Moments()(points))
    assert torch.equal(ensemble(points), logits.mean(dim=1))


def test_channels_first_networks() -> None:
    class First(Moments):
        def forward(self, clouds: Tensor) -> Tensor:
            return super().forward(clouds.transpose(1, 2))

    points = clouds()
    first = EPiC(First, sizes=SIZES, channels_first=True, extra={"whole": First()})
    last = EPiC(Moments, sizes=SIZES, extra={"whole": Moments()})
    assert torch.allclose(first(points), last(points), atol=1e-6)


def test_networks_by_name_keep_their_place_and_their_weights() -> None:
    made = {view: build_network("pointnet", 3, 0.1) for view in ("random", "patch", "curve")}
    ensemble = EPiC(made)
    assert [*ensemble.networks] == ["patch", "curve", "random"]
    assert ensemble.networks["curve"] is made["curve"]
    other = EPiC(lambda: build_network("pointnet", 3, 0.1))
    other.load_state_dict(ensemble.state_dict())
    points = clouds()
    with torch.no_grad():
        assert torch.equal(other.eval()(points), ensemble.eval()(points))


def test_gradients_reach_the_networks() -> None:
    ensemble = EPiC(lambda: build_network("pointnet", 3, 0.1), sizes=SIZES)
    ensemble(clouds()).sum().backward()
    assert all(p.grad is not None for p in ensemble.parameters())


def test_bad_input() -> None:
    with pytest.raises(InputError, match="networks need names out of patch, curve, random"):
        EPiC({"ball": Moments()})
    with pytest.raises(InputError, match="networks need names"):
        EPiC({})
    for sizes in ({"ball": 3}, {"patch": 0}):
        with pytest.raises(InputError, match="sizes must be a positive number"):
            EPiC(Moments, sizes=sizes)
    with pytest.raises(InputError, match="cannot be named patch"):
        EPiC(Moments, extra={"patch": Moments()})
    with pytest.raises(InputError, match="anchors must be at least 1"):
        EPiC(Moments, anchors=0)
    with pytest.raises(InputError, match="seed"):
        EPiC(Moments, seed=-1)
    with pytest.raises(InputError, match="no 'curve'"):
        EPiC({"patch": Moments()}).parts(clouds(), "curve")
    with pytest.raises(ShapeError, match="points must be"):
        EPiC(Moments)(clouds()[0])
    with pytest.raises(ShapeError, match="index must be"):
        EPiC(Moments)(clouds(), torch.arange(2))

    class Wrong(nn.Module):
        def forward(self, clouds: Tensor) -> Tensor:
            return clouds

    with pytest.raises(ShapeError, match="the patch network must map"):
        EPiC(Wrong)(clouds())


def test_networks_with_several_outputs_vote_by_their_first() -> None:
    class Pair(Moments):
        def forward(self, clouds: Tensor) -> tuple[Tensor, str]:  # type: ignore[override]
            return super().forward(clouds), "features"

    plain = EPiC(Moments, sizes=SIZES, extra={"whole": Moments()})
    paired = EPiC(Pair, sizes=SIZES, extra={"whole": Pair()})
    assert torch.equal(paired.votes(clouds()).logits, plain.votes(clouds()).logits)
