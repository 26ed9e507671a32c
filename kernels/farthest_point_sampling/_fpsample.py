"""CPU path of ``farthest_point_sampling``: the library fpsample, cloud by cloud.

Of its methods only ``fps_sampling`` does what the contract says. Measured with version 1.0.2: the
bucketed ones (QuickFPS) are faster, but begin at another point than the one they are given, and
``fps_npdu_sampling`` is no farthest point sampling on clouds without order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cmd_plugin.errors import require
from cmd_plugin.kernels.farthest_point_sampling import reference

__all__ = ["farthest_point_sampling"]


def farthest_point_sampling(points: Tensor, count: int, start: Tensor) -> Tensor:
    """Return [B, count] int64 positions; see the public function for the arguments."""
    library = require("fpsample", "points")
    result = torch.empty(len(points), count, dtype=torch.int64)
    for number, (cloud, first) in enumerate(zip(points, start.tolist(), strict=True)):
        given = cloud.detach().float().contiguous().numpy()
        found = library.fps_sampling(given, count, start_idx=first)
        picked = torch.from_numpy(found.astype("int64"))
        if len(set(picked.tolist())) < count:
            # Fewer different points than asked for: the library repeats one, the contract does not.
            picked = reference.farthest_point_sampling(cloud[None], count, start[number, None])[0]
        result[number] = picked
    return result
