"""Who has which images: splitting a data set over clients."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cmd_plugin.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["parse_partition", "partition_indices"]

_MINIMUM = 2  # BatchNorm cannot learn from one image
_ATTEMPTS = 1000


def parse_partition(text: str) -> float | None:
    """Return the concentration of ``"dirichlet:ALPHA"``, None for ``"iid"``.

    Raises:
        InputError: If the text is something else.
    """
    if text == "iid":
        return None
    kind, _, number = text.partition(":")
    try:
        alpha = float(number)
    except ValueError:
        alpha = 0.0
    if kind != "dirichlet" or not 0.0 < alpha < float("inf"):
        raise InputError(
            f"--partition must be iid or dirichlet:ALPHA with ALPHA above 0 (for example "
            f"dirichlet:0.3), got {text!r}."
        )
    return alpha


def partition_indices(
    labels: npt.NDArray[np.int64], clients: int, partition: str, seed: int
) -> list[npt.NDArray[np.int64]]:
    """Split images over clients.

    ``"iid"`` deals a shuffled deck. ``"dirichlet:ALPHA"`` draws for every class the shares of the
    clients from a symmetric Dirichlet distribution (Hsu et al., 2019): the smaller ALPHA, the fewer
    classes a client has. It is drawn again until every client has at least two images.

    Args:
        labels: Class of each image, [N].
        clients: Number of clients, at least 1.
        partition: ``"iid"`` or ``"dirichlet:ALPHA"``.
        seed: Seed of the draw.

    Returns:
        Ascending indices of each client; together all N, none twice.

    Raises:
        InputError: If there are too few images for so many clients.
    """
    import numpy as np  # not above: the command line checks the text without it

    alpha = parse_partition(partition)
    count = len(labels)
    if clients < 1:
        raise InputError(f"--clients must be at least 1, got {clients}.")
    if count < _MINIMUM * clients:
        raise InputError(
            f"{count} training images are too few for {clients} clients: each needs {_MINIMUM}."
        )
    generator = np.random.default_rng(seed)
    if alpha is None:
        parts = np.array_split(generator.permutation(count), clients)
        return [np.sort(part) for part in parts]
    for _ in range(_ATTEMPTS):
        owner = np.empty(count, dtype=np.int64)
        for value in np.unique(labels):
            mine = generator.permutation(np.flatnonzero(labels == value))
            shares = generator.dirichlet(np.full(clients, alpha))
            bounds = np.rint(np.cumsum(shares)[:-1] * len(mine)).astype(np.int64)
            for client, part in enumerate(np.split(mine, bounds)):
                owner[part] = client
        if np.bincount(owner, minlength=clients).min() >= _MINIMUM:
            return [np.flatnonzero(owner == client) for client in range(clients)]
    raise InputError(
        f"{partition} left a client with fewer than {_MINIMUM} images in {_ATTEMPTS} draws: use a "
        "larger ALPHA, fewer clients or more images."
    )
