"""The last prompt's routes of each model.

Recorded by the runtime under any one tensor of the model, weakly and by identity, so that a model
compiled without an attachment has its record too and none outlives its model. Layers that are
compiled one by one leave one record each.
"""

import itertools
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from fluxcompile.errors import RouterError
from fluxcompile.model_layers import unwrap


@dataclass(frozen=True, eq=False)
class Routes:
    """Which attention each row of a batch took in each layer.

    Attributes:
        fa: bool ``[batch, layers]`` on any device; True is full attention, False sparse.
        layer_names: module path of each layer.

    Raises:
        RouterError: ``fa`` has another dtype or shape.
    """

    fa: torch.Tensor
    layer_names: tuple[str, ...]

    def __post_init__(self) -> None:
        # Metadata only: looking at the values here would wait for the device.
        shape = tuple(self.fa.shape)
        if self.fa.dtype != torch.bool or shape[1:] != (len(self.layer_names),):
            raise RouterError.mismatch(
                "routes", f"bool [batch, {len(self.layer_names)}]", f"{self.fa.dtype} {shape}"
            )

    @property
    def omega_per_row(self) -> torch.Tensor:
        """Share of layers on sparse attention, fp32 ``[batch]``: each row's Ω_MSR."""
        return (~self.fa).float().mean(dim=1)

    @property
    def omega(self) -> float:
        """Ω_MSR: share of layers on sparse attention, averaged over the rows. Waits for `fa`."""
        return self.omega_per_row.mean().item()

    def __str__(self) -> str:
        """One line a row: a letter a layer (F full, S sparse) and the row's Ω."""
        lines = [
            f"row {row}: {''.join('F' if full else 'S' for full in letters)}  Ω={omega:.2f}"
            for row, (letters, omega) in enumerate(
                zip(self.fa.tolist(), self.omega_per_row.tolist(), strict=True)
            )
        ]
        return "\n".join(lines)


_records = WeakIdKeyDictionary()  # Tensor -> (order of recording, attachment, Routes)
_order = itertools.count()


def record_routes(key: torch.Tensor, routes: Routes, generation: int = 0) -> None:
    """Keep ``routes`` as the last ones of the model that ``key``, a parameter or buffer, is of.

    ``generation`` is that of the attachment whose router decided, 0 for none.
    """
    _records[key] = (next(_order), generation, routes)


def routes_of(model: nn.Module) -> Routes | None:
    """Return the routes recorded last under the parameters and buffers of ``model``, or None.

    Records of different layers make one, if the same attachment and batch size left them.
    """
    model = unwrap(model)
    tensors = [*model.parameters(), *model.buffers()]
    records = [_records[tensor] for tensor in tensors if tensor in _records]
    if not records:
        return None
    _, generation, newest = max(records, key=lambda record: record[0])
    columns: dict[str, tuple[int, torch.Tensor]] = {}
    for order, owner, routes in records:
        if owner != generation or len(routes.fa) != len(newest.fa):
            continue
        for column, name in enumerate(routes.layer_names):
            if order >= columns.get(name, (order,))[0]:
                columns[name] = order, routes.fa[:, column]
    if set(columns) == set(newest.layer_names):
        return newest
    fa = [column.to(newest.fa.device) for _, column in columns.values()]
    return Routes(torch.stack(fa, dim=1), tuple(columns))
