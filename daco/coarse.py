"""A dictionary in bytes, near the real one by a known distance; tensors in, tensors out.

A product with it reads a quarter of the memory, and says of almost all atoms that they cannot matter.
"""

from functools import cache
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

LIMIT = 127
"""The largest number in a byte, signs included."""

FEW = 0.125
"""Share of the products above which making all of them anew is cheaper than picking them."""


class Near(NamedTuple):
    """Products that may not be exact."""

    value: Tensor
    """`[n, n_atoms]`."""
    slack: Tensor
    """Likewise: no exact product is further away than this, unless squares of a row underflow (norms below
    1e-20). `[]` where all are exact."""

    @property
    def exact(self) -> bool:
        """Whether all of them are."""
        return self.slack.ndim == 0

    def of(self, rows: Tensor | slice) -> "Near":
        """Some of the rows."""
        return Near(self.value[rows], self.slack if self.exact else self.slack[rows])


class Coarse(NamedTuple):
    """Rows of a dictionary rounded to bytes."""

    rows: Tensor
    """`[n_atoms, d_model]` int8."""
    scale: Tensor
    """`[n_atoms]`: what a row is multiplied by."""
    norm: Tensor
    """`[n_atoms]`: norms of the rounded rows, scale included."""
    error: Tensor
    """`[n_atoms]`: norms of what rounding took."""

    @classmethod
    def of(cls, D: Tensor) -> Self:
        """Round a dictionary `[n_atoms, d_model]`."""
        rows, scale = _bytes_of(D)
        rounded = rows * scale
        norms = rounded.norm(dim=1), (D - rounded).norm(dim=1)
        return cls(rows, scale.squeeze(1), *norms)

    def products(self, z: Tensor) -> Near:
        """Products of `z [n, d_model]` in float32 with all rows.

        z takes two bytes a number: where one row alone rounds no worse to one than the dictionary does, one.
        """
        parts, scale = _bytes_of(z)
        rest = z - parts * scale
        size = z.norm(dim=1, keepdim=True)
        if len(z) > 1 or float(rest.norm()) > 1.5 * float(self.error.mean() * size):
            more, finer = _bytes_of(rest)
            rest = rest - more * finer
            parts, scale = torch.cat([parts, more]), torch.cat([scale, finer])
        total = (torch._int_mm(parts, self.rows.T) * scale).view(-1, len(z), len(self.rows)).sum(0)
        rounding = 8 * torch.finfo(z.dtype).eps * size
        slack = size * self.error + (rest.norm(dim=1, keepdim=True) + rounding) * self.norm
        return Near(total * self.scale, slack)


def usable(D: Tensor) -> bool:
    """Whether products with a dictionary gain from bytes: float32, and a CPU that adds fast and exactly."""
    return D.device.type == "cpu" and D.dtype == torch.float32 and _fast() and _exact()


def settle(near: Near, where: Tensor, z: Tensor, D: Tensor) -> Tensor:
    """The products with those of `where [n, n_atoms]` made exact; the others as they are."""
    counts = where.sum(1).tolist()
    if sum(counts) > FEW * where.numel():
        return z @ D.T
    atoms = torch.split(where.nonzero()[:, 1], counts)
    exact = [D.index_select(0, some) @ row for some, row in zip(atoms, z, strict=True)]
    return near.value.masked_scatter(where, torch.cat(exact))


def _bytes_of(z: Tensor) -> tuple[Tensor, Tensor]:
    """Rows as bytes, and by how much they are smaller, `[n, 1]`."""
    scale = z.abs().amax(1, keepdim=True).clamp_min(torch.finfo(z.dtype).tiny * LIMIT) / LIMIT
    return (z / scale).round_().to(torch.int8), scale


def _fast() -> bool:
    """Whether oneDNN multiplies bytes with the instructions made for it; torch's own loop is far slower."""
    mkldnn: Any = torch.backends.mkldnn
    vnni = getattr(torch.cpu, "_is_vnni_supported", bool)()
    return bool(vnni and mkldnn.is_available() and getattr(mkldnn, "enabled", True))


@cache
def _exact() -> bool:
    """Whether sums of products of bytes come out exactly: some older processors cut them off on the way."""
    if not hasattr(torch, "_int_mm"):
        return False
    row = torch.full((1, 256), LIMIT, dtype=torch.int8)
    rows = torch.stack([row[0], -row[0], row[0] * (-1) ** torch.arange(256)]).to(torch.int8).repeat(16, 1)
    for one in (row, -row, rows[2:3]):
        for some in (one, one.repeat(17, 1)):
            exact = some.double() @ rows.T.double()
            try:
                if not torch.equal(torch._int_mm(some, rows.T).double(), exact):
                    return False
            except RuntimeError:  # this build of torch has no such product for a CPU
                return False
    return True
