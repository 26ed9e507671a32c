"""The adaptive threshold, its order, refocusing, outliers and training on subsets."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from cmd_plugin.errors import InputError, ShapeError
from cmd_plugin.pointcloud import (
    SubsetDefence,
    build_network,
    importance_order,
    kept_count,
    kept_mask,
    point_importance,
    refocus,
    remove_outliers,
    statistical_outliers,
    statistical_scores,
    uncritical_subset,
)
from cmd_plugin.pointcloud.outliers import outlier_ranking
from cmd_plugin.pointcloud.rotation import rotation_consistency
from tests.helpers.foreign_networks import Linear3, Pooled, TwoLevels
from tests.helpers.public_networks import Squeezing, TNetPointNet


def cloud(batch: int = 2, count: int = 120, seed: int = 0) -> Tensor:
    return torch.randn(batch, count, 3, generator=torch.Generator().manual_seed(seed)) / 2


def network() -> nn.Module:
    torch.manual_seed(3)
    return build_network("pointnet", 4, width=0.25).eval()


def test_k_is_h_times_n_rounded_down_and_clamped() -> None:
    h = torch.tensor([0.7925, 1.0, 0.0, 0.5])
    assert kept_count(h, 4, minimum=1).tolist() == [3, 4, 1, 2]
    assert kept_count(h, 1000).tolist() == [792, 1000, 64, 500]
    assert kept_count(h, 20).tolist() == [20] * 4  # fewer points than the minimum: all stay
    assert kept_count(h, torch.tensor([100, 100, 100, 30])).tolist() == [79, 100, 64, 30]
    assert kept_count(torch.tensor([1.0 - 1e-13]), 1024).tolist() == [1024]  # rounding is no loss


def test_order_is_by_count_then_norm_then_index() -> None:
    # Tokens 0 and 3 tie in count (0), 0 and 4 in count and norm.
    points = torch.tensor([[[0.1, 0, 0], [1, 0, 0], [0, 1, 0], [0.05, 0, 0], [0.1, 0, 0]]])
    seen = point_importance(Linear3(torch.eye(3)[:2]), points, "critical++")
    assert seen.wins is not None
    assert seen.wins.tolist() == [[0, 1, 1, 0, 0]]
    assert importance_order(seen).tolist() == [[3, 0, 4, 1, 2]]
    assert importance_order(seen, "fbi").tolist() == [[3, 0, 4, 1, 2]]


def test_kept_are_the_smallest_and_all_is_everything() -> None:
    seen = point_importance(network(), cloud(), "critical++")
    assert seen.wins is not None
    kept = kept_mask(importance_order(seen), torch.tensor([50, 120]))
    assert kept.sum(dim=1).tolist() == [50, 120]
    assert seen.wins[0][kept[0]].max() <= seen.wins[0][~kept[0]].min()


def test_refocusing_asks_the_network_again_on_what_was_kept() -> None:
    model, points = network(), cloud()
    model.train()
    state = copy.deepcopy(model.state_dict())
    again = refocus(model, points)
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert model.training
    model.eval()
    entropy = again.importance.entropy
    assert entropy is not None
    assert again.kept.sum(dim=1).tolist() == kept_count(entropy, 120).tolist()
    with torch.no_grad():
        for number in range(2):
            expected = model(points[number : number + 1, again.kept[number]])
            torch.testing.assert_close(again.output[number : number + 1], expected)
        torch.testing.assert_close(again.importance.output, model(points))
        whole = refocus(model, points, keep=120)
        torch.testing.assert_close(whole.output, model(points))


def test_a_batch_equals_its_clouds() -> None:
    model, points = network(), cloud(3)
    together = refocus(model, points)
    for number in range(3):
        alone = refocus(model, points[number : number + 1])
        assert torch.equal(alone.kept[0], together.kept[number])
        torch.testing.assert_close(alone.output[0], together.output[number])


def test_hidden_points_are_never_kept() -> None:
    mask = torch.arange(120) < torch.tensor([120, 90])[:, None]

    def forward(model: nn.Module, points: Tensor) -> Tensor:
        if points.shape[:2] == (2, 120):  # the first pass sees the padding and hides it
            hidden = points.masked_fill(~mask.unsqueeze(2), 0.0)
            return model(torch.where(mask.unsqueeze(2), hidden, hidden[:, :1]))
        return model(points)

    again = refocus(network(), cloud(), mask=mask, forward=forward)
    assert not (again.kept & ~mask).any()
    assert int(again.kept[1].sum()) <= 90
    few = refocus(network(), cloud(), keep=200, mask=mask, forward=forward)
    assert few.kept.sum(dim=1).tolist() == [120, 90]


def test_refocusing_needs_a_maximum_and_a_sensible_number() -> None:
    with pytest.raises(InputError, match="not a maximum"):
        refocus(Pooled(lambda x: x.mean(dim=1)), cloud())
    with pytest.raises(InputError, match="keep must be"):
        refocus(network(), cloud(), keep=0)
    with pytest.raises(InputError, match="unknown rank"):
        refocus(network(), cloud(), rank="size")  # type: ignore[arg-type]
    seen = point_importance(network(), cloud())
    with pytest.raises(InputError, match="hold no counts"):
        importance_order(seen)


# -- outliers -------------------------------------------------------------------------------------


def test_statistical_scores_against_a_loop() -> None:
    points = cloud(1, 25).double()
    scores = statistical_scores(points, k=3)
    for index in range(25):
        others = [j for j in range(25) if j != index]
        squares = sorted(float((points[0, index] - points[0, j]).square().sum()) for j in others)
        assert float(scores[0, index]) == pytest.approx(sum(squares[:3]) / 3)
    assert statistical_scores(points[:, :1]).tolist() == [[0.0]]
    twice = torch.cat((points, points), dim=1)  # every point has a copy: its nearest is at 0
    assert statistical_scores(twice, k=1).max() == 0.0


def test_a_lonely_point_goes() -> None:
    points = cloud(2, 100) * 0.1
    points[0, 17] = 5.0
    kept = statistical_outliers(points)
    assert not kept[0, 17]
    assert kept.double().mean() > 0.8


def test_planted_outliers_win_channels_and_are_removed() -> None:
    points = torch.cat((cloud(2, 100) * 0.2, cloud(2, 6, seed=1) * 3.0), dim=1)
    for method in ("critical++", "fbi"):
        kept = remove_outliers(network(), points, method=method)  # type: ignore[arg-type]
        assert kept[:, 100:].double().mean() < 0.35
        assert kept[:, :100].double().mean() > 0.35
    shares = remove_outliers(network(), points, share=0.1)
    assert shares.sum(dim=1).tolist() == [95, 95]  # floor(0.9 * 106)
    with pytest.raises(InputError, match="share must be"):
        remove_outliers(network(), points, share=1.0)


# -- training on subsets --------------------------------------------------------------------------


def test_subsets_hold_the_least_important_points_in_their_order() -> None:
    model, points = network(), cloud(2, 600)
    subset = uncritical_subset(model, points, torch.Generator().manual_seed(5))
    k = subset.shape[1]
    assert 256 <= k < 600
    kept = kept_mask(importance_order(point_importance(model, points, "critical++")), k)
    assert torch.equal(subset, torch.stack([p[m] for p, m in zip(points, kept, strict=True)]))


def test_all_sizes_of_subsets_occur_and_statistics_stay() -> None:
    model, points = network(), cloud(2, 20)
    model.train()
    before = copy.deepcopy(model.state_dict())
    generator = torch.Generator().manual_seed(0)
    sizes = {uncritical_subset(model, points, generator, fewest=17).shape[1] for _ in range(40)}
    assert sizes == {17, 18, 19}
    small = uncritical_subset(model, points, generator, fewest=256)  # a cloud smaller than that
    assert 5 <= small.shape[1] < 20
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.training
    with pytest.raises(InputError, match="single point"):
        uncritical_subset(model, points[:, :1], generator)


# -- networks as they come ------------------------------------------------------------------------


def test_networks_that_squeeze_are_refocused_cloud_by_cloud() -> None:
    torch.manual_seed(0)
    squeezing, points = Squeezing(24).eval(), cloud()
    plain = refocus(squeezing, points, minimum=10)
    assert plain.output.shape == (2, 5)
    for number in range(2):
        alone = refocus(squeezing, points[number : number + 1], minimum=10)
        assert alone.output.shape == (1, 5)
        torch.testing.assert_close(alone.output[0], plain.output[number])


def test_networks_with_several_outputs_are_refocused_and_segmentation_is_refused() -> None:
    torch.manual_seed(0)
    assert refocus(TNetPointNet(24).eval(), cloud()).output.shape == (2, 5)
    labelling = Pooled(lambda x: x + x.amax(dim=1, keepdim=True)).eval()
    with pytest.raises(ShapeError, match=r"not one row of class scores.*segmentation"):
        refocus(labelling, cloud())


def test_a_pool_can_be_named_wherever_a_network_is_called() -> None:
    torch.manual_seed(0)
    model, points = TwoLevels().eval(), cloud()
    assert refocus(model, points, pool=1).output.shape == (2, 4)
    assert remove_outliers(model, points, pool=1).shape == (2, 120)
    subset = uncritical_subset(model, points, torch.Generator().manual_seed(0), pool=1)
    assert subset.shape[1] < 120
    assert rotation_consistency(model, points, torch.Generator(), pool=1).shape == (2,)
    assert SubsetDefence(model, 60, pool=1)(points).shape == (2, 4)


# -- do counts find outliers on this network? -----------------------------------------------------


def test_a_network_that_reaches_outwards_ranks_planted_outliers_first() -> None:
    torch.manual_seed(0)
    reaching = Linear3(nn.functional.normalize(torch.randn(400, 3), dim=1)).eval()
    ranking = outlier_ranking(reaching, cloud(2, 300) * 0.1)
    assert ranking.counts > 0.7
    assert ranking.counts_tell
    assert ranking.statistical > 0.7


def test_a_network_that_prefers_the_middle_does_not_and_says_so() -> None:
    class Inwards(Linear3):
        def forward(self, x: Tensor) -> Tensor:
            inside = (x @ self.weight.T) / (1e-3 + x.square().sum(dim=2, keepdim=True))
            return inside.amax(dim=1)

    torch.manual_seed(0)
    ranking = outlier_ranking(Inwards(torch.randn(24, 3)).eval(), cloud(1, 300) * 0.1, planted=5)
    assert ranking.counts < 0.6
    assert not ranking.counts_tell
    assert ranking.planted == 5
    with pytest.raises(InputError, match="planted and draws"):
        outlier_ranking(network(), cloud(), planted=0)
