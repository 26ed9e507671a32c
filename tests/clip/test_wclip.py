"""Files as the authors of Whitened CLIP publish them: score as published, and say what they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from cmd_plugin.clip import Whitening, import_wclip
from cmd_plugin.errors import InputError

DIM = 12


def files(folder: Path, *, twins: int = 0) -> tuple[Path, Path, Tensor]:
    """Write mean and matrix in float32, ``twins`` of its columns equal to their neighbours."""
    x = torch.randn(200, DIM, generator=torch.Generator().manual_seed(0)).double()
    x = x * torch.logspace(0, -2, DIM).double() + 5.0
    values, vectors = torch.linalg.eigh(x.T.cov())
    matrix = (vectors / values.sqrt()).flip(1).float()
    for column in range(0, 2 * twins, 2):
        matrix[:, column + 1] = matrix[:, column]
    torch.save(x.mean(dim=0).float(), folder / "mean.pt")
    torch.save(matrix, folder / "w_mat.pt")
    return folder / "mean.pt", folder / "w_mat.pt", x


@pytest.mark.parametrize("twins", [0, 3])
def test_rows_score_as_published(twins: int, tmp_path: Path) -> None:
    mean, matrix, x = files(tmp_path, twins=twins)
    imported = import_wclip(mean, matrix)
    read = torch.load(matrix, weights_only=True).double()
    y = (x - torch.load(mean, weights_only=True).double()) @ read
    assert torch.allclose(imported.squared_norm(x), y.square().sum(dim=1), rtol=1e-10)
    assert torch.allclose(imported.matrix, read, rtol=1e-12)
    assert torch.allclose(imported.transform(x), y, atol=1e-10)
    assert imported.rank == DIM - twins
    norm = torch.sqrt(-2 * imported.log_likelihood(x) - DIM * torch.log(torch.tensor(2 * torch.pi)))
    assert torch.allclose(norm.double(), y.norm(dim=1), rtol=1e-6)


def test_a_matrix_of_full_rank_turns_back_and_one_with_twins_refuses(tmp_path: Path) -> None:
    mean, matrix, x = files(tmp_path)
    imported = import_wclip(mean, matrix)
    assert torch.allclose(imported.inverse(imported.transform(x)), x, atol=1e-8)
    imported = import_wclip(*files(tmp_path, twins=3)[:2])
    with pytest.raises(InputError, match="rank 9 of 12 features"):
        imported.inverse(imported.transform(x))
    with pytest.raises(InputError, match="no density"):
        imported.log_density(x)


def test_variances_come_from_the_columns_and_rows_of_the_fit_are_unknown(tmp_path: Path) -> None:
    mean, matrix, x = files(tmp_path)
    imported = import_wclip(mean, matrix)
    fitted = Whitening.fit(x, shrinkage="none")
    assert torch.allclose(imported.eigenvalues, fitted.eigenvalues, rtol=1e-5)
    assert imported.logdet == pytest.approx(fitted.logdet, abs=1e-4)
    assert imported.rows == 0
    with pytest.raises(InputError, match="0 rows"):
        imported.leave_one_out(x)
    calibrated = imported.calibrate(x, held_out=True)
    calibrated.save(tmp_path / "w.safetensors")
    again = Whitening.load(tmp_path / "w.safetensors")
    assert torch.equal(again.squared_norm(x), imported.squared_norm(x))


class Payload:
    def __reduce__(self) -> tuple[object, ...]:
        return (exec, ("raise SystemExit('executed')",))


def test_nothing_is_executed_and_other_files_are_refused(tmp_path: Path) -> None:
    mean, matrix, _ = files(tmp_path)
    bad = tmp_path / "bad.pt"
    for content, says in (
        (Payload(), "is not a file of one tensor"),
        ({"mean": torch.zeros(3)}, "does not hold"),
        (torch.zeros(DIM, DIM, dtype=torch.int64), "does not hold"),
        (torch.full((DIM, DIM), torch.nan), "NaN"),
        (torch.zeros(DIM, DIM - 1), "not of one whitening"),
        (torch.zeros(DIM, DIM), "a column of zeros"),
    ):
        torch.save(content, bad)
        with pytest.raises(InputError, match=says):
            import_wclip(mean, bad)
    bad.write_bytes(b"not a file of torch")
    for paths in ((bad, matrix), (mean, bad)):
        with pytest.raises(InputError, match="is not a file of one tensor"):
            import_wclip(*paths)
    with pytest.raises(InputError, match="there is no file"):
        import_wclip(tmp_path / "none.pt", matrix)
