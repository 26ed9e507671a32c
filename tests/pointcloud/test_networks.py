"""The reference networks: official names, published arithmetic, any width and any small cloud."""

from __future__ import annotations

import pytest
import torch

from cmd_plugin.errors import InputError
from cmd_plugin.pointcloud import build_network
from cmd_plugin.pointcloud.networks import NETWORKS, PCT, PointNet, PointNet2
from cmd_plugin.pointcloud.networks._neighbours import (
    ball_query,
    farthest_points,
    gather_points,
    nearest,
)
from cmd_plugin.pointcloud.networks.dgcnn import DGCNN, edge_convolution

# A few names and shapes of each published checkpoint.
PUBLISHED = {
    "pointnet": {
        "feature_model.conv5.weight": (1024, 128, 1),
        "feature_model.bn5.running_var": (1024,),
        "linear1.weight": (512, 1024),
        "bn2.weight": (256,),
        "linear3.bias": (40,),
    },
    "pointnet-aligned": {
        "feat.stn.fc3.weight": (9, 256),
        "feat.fstn.fc3.weight": (4096, 256),
        "feat.conv3.weight": (1024, 128, 1),
        "fc1.weight": (512, 1024),
    },
    "pointnet2": {
        "sa1.mlp_convs.0.weight": (64, 3, 1, 1),
        "sa2.mlp_convs.0.weight": (128, 131, 1, 1),
        "sa3.mlp_convs.2.weight": (1024, 512, 1, 1),
        "sa3.mlp_bns.2.running_mean": (1024,),
        "fc3.weight": (40, 256),
    },
    "dgcnn": {
        "conv1.0.weight": (64, 6, 1, 1),
        "conv4.0.weight": (256, 256, 1, 1),
        "conv5.0.weight": (1024, 512, 1),
        "bn5.weight": (1024,),
        "linear1.weight": (512, 2048),
    },
    "pct": {
        "gather_local_1.conv2.weight": (256, 256, 1),
        "pt_last.sa4.q_conv.weight": (64, 256, 1),
        "pt_last.sa1.after_norm.weight": (256,),
        "conv_fuse.0.weight": (1024, 1280, 1),
        "linear2.weight": (256, 512),
    },
}


def cloud(batch: int, count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, count, 3, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", NETWORKS)
def test_layers_have_the_published_names_and_shapes(name: str) -> None:
    state = build_network(name, 40).state_dict()
    found = {key: tuple(state[key].shape) for key in PUBLISHED[name]}
    assert found == PUBLISHED[name]


@pytest.mark.parametrize("name", NETWORKS)
def test_a_narrow_network_learns_and_takes_clouds_smaller_than_its_graph(name: str) -> None:
    network = build_network(name, 5, width=0.25)
    network.train()
    network(cloud(2, 40)).square().sum().backward()
    without = [n for n, p in network.named_parameters() if p.grad is None]
    assert without == []
    network.eval()
    with torch.no_grad():
        assert network(cloud(1, 7)).shape == (1, 5)  # a batch of one, fewer points than neighbours


@pytest.mark.parametrize("name", ["pointnet", "pointnet-aligned", "dgcnn"])
def test_point_order_does_not_matter_to_networks_without_sampling(name: str) -> None:
    network = build_network(name, 5, width=0.25).double().eval()
    points = cloud(2, 64).double()
    order = torch.randperm(64)
    with torch.no_grad():
        torch.testing.assert_close(network(points[:, order]), network(points))


def test_the_cheaper_edge_convolution_is_the_published_one() -> None:
    network = DGCNN(4, width=0.25).double()
    x = torch.randn(2, 50, 16, dtype=torch.float64)
    neighbours = nearest(x, x, 9)
    around = gather_points(x, neighbours)
    own = x.unsqueeze(2).expand_as(around)
    edges = torch.cat((around - own, own), dim=3).permute(0, 3, 1, 2)
    published = network.conv2(edges).amax(dim=3).transpose(1, 2)
    torch.testing.assert_close(edge_convolution(network.conv2, x, neighbours), published)


def test_farthest_points_maximise_the_distance_to_those_picked_before() -> None:
    points = cloud(2, 60).double()
    picks = farthest_points(points, 20)
    assert picks[:, 0].tolist() == [0, 0]
    for batch in range(2):
        for step in range(1, 20):
            before = points[batch, picks[batch, :step]]
            distance = torch.cdist(points[batch], before).amin(dim=1)
            assert distance[picks[batch, step]] == distance.max()


def test_ball_query_takes_the_first_inside_and_fills_up_with_the_first() -> None:
    line = torch.tensor([[[0.0, 0, 0], [1, 0, 0], [0.2, 0, 0], [0.1, 0, 0]]])
    assert ball_query(line[:, :2], line, 0.3, 3).tolist() == [[[0, 2, 3], [1, 1, 1]]]
    far = torch.tensor([[[9.0, 0, 0]]])
    assert ball_query(far, line, 0.3, 2).tolist() == [[[1, 1]]]


@pytest.mark.parametrize("kind", [PCT, PointNet2])
def test_token_points_are_where_the_tokens_are(kind: type) -> None:
    network = kind(4, width=0.25, tokens=(32, 16))
    points = cloud(2, 100)
    chosen = network.token_points(points)
    assert chosen.shape == (2, 16)
    assert all(len(set(row)) == 16 for row in chosen.tolist())


def test_wrong_names_and_widths_are_refused() -> None:
    with pytest.raises(InputError, match="did you mean pointnet"):
        build_network("pointnt", 4)
    with pytest.raises(InputError, match="width must be above 0"):
        PointNet(4, width=0.0)
