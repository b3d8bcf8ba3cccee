"""Mixed batches for tests, and what each row of one has to give: a loop over rows in float64."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lorakit.kernels import grouped

ADAPTERS = 4
RANKS = (3, 5, 1, 4)
RANK, D_IN, D_OUT = max(RANKS), 20, 40
USES = {
    "one row": [1],
    "identical": [2] * 5,
    "distinct": [2, 0, 3, 1],
    "uniform": [0, 1, 2, 0, 1, 2],
    "sorted": [0, 0, 1, 1, 2, 2],
    "skewed": [3, 3, 1, 3, 3, 0, 3, 3, 3],
    "some base rows": [1, -1, 1, 3, -1, 0],
    "base rows only": [-1, -1, -1],
}


@dataclass
class Batch:
    """Inputs of one layer, and the stacked weights."""

    x: Tensor
    output: Tensor
    a: Tensor
    b: Tensor

    def parts(self) -> tuple[Tensor, ...]:
        return self.x, self.output, self.a, self.b


def mixed_batch(rows, shape=(), *, x_dtype=torch.float32, dtype=torch.float32, seed=0) -> Batch:
    """A random batch, x (rows, *shape, d), whose adapters have ranks of 1 to 5, padded to 5."""
    draw = torch.Generator().manual_seed(seed)

    def random(*size):
        return torch.randn(size, generator=draw, dtype=torch.float64)

    used = (torch.arange(RANK) < torch.tensor(RANKS)[:, None])[..., None]
    a, b = random(ADAPTERS, RANK, D_IN) * used, random(ADAPTERS, RANK, D_OUT) * used
    x, output = random(rows, *shape, D_IN), random(rows, *shape, D_OUT)
    return Batch(x.to(x_dtype), output.to(x_dtype), a.to(dtype), b.to(dtype))


def expected(batch: Batch, index_of_row: list[int]) -> Tensor:
    """Output + B·A·x in float64, row for row, with each adapter's A and B at their own rank."""
    x, output, a, b = (part.detach().double() for part in batch.parts())
    each = len(x) // len(index_of_row)
    found = output.clone()
    for row, adapter in enumerate(index_of_row):
        if adapter >= 0:
            of_row = slice(row * each, (row + 1) * each)
            rank = RANKS[adapter]
            found[of_row] += x[of_row] @ a[adapter, :rank].T @ b[adapter, :rank]
    return found


def grouped_update(x, a, b, grouping):
    """scale·B·(A·x) of the rows that have an adapter, from the stacks of all adapters."""
    h = grouped.down_project(x, grouped.gather(a, grouping), grouping)
    return grouped.up_project(h, grouped.gather(b, grouping), grouping)
