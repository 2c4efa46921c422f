"""Records the course of a run, what each step drew and saw, in bounded memory."""

import math
from collections.abc import Sequence
from typing import Any

import torch

MOST_ROWS = 4096
MOST_CELLS = 2**21  # rows x arms: 9 bytes each, so 19 MB at most

_PER_ARM = {"probabilities": torch.float32, "norms": torch.float32, "active": torch.bool}
_PER_STEP = ("loss", "sharpness", "lowest_active_block", "cost", "grad_norm")


class Trace:
    """Rows of numbers, one per step; where there are too many, every second, fourth, ... step is kept.

    What is counted is exact however much has been thinned out: `activity`, `steps` and `cost_total` take in every
    step. A step's row is kept if its number, from 1, leaves the rest 1 when divided by `stride`, whenever the
    recording began.

    Args:
        names (`Sequence[str]`): The arms.
        depths (`Sequence[int | None]`): Their depths, see `Arm`.
        limit (`int`, *optional*): Most rows that are kept, at least 2; 4096 where there are few arms.

    Attributes:
        stride (`int`): One step in `stride` has a row; a power of two.
        steps (`int`): Steps recorded.
        last (`int`): Number of the last one; 0 before the first.
        activity (`torch.Tensor`): In how many steps each arm was active, int64, shape `(L,)`.
        cost_total (`float`): Sum of the predicted costs, in plain LoRA steps; NaN where there is no cost model.
    """

    def __init__(self, names: Sequence[str], depths: Sequence[int | None], limit: int | None = None) -> None:
        self.names = list(names)
        self.depths = list(depths)
        self.limit = limit or min(MOST_ROWS, max(2, MOST_CELLS // len(self.names)))
        self.stride = 1
        self.steps = self.last = 0
        self.activity = torch.zeros(len(self.names), dtype=torch.int64)
        self.cost_total = 0.0
        self._rows = 0
        self._steps = torch.zeros(0, dtype=torch.int64)
        self._scalars = torch.zeros(0, len(_PER_STEP), dtype=torch.float32)
        self._arms = {key: torch.zeros(0, len(self.names), dtype=dtype) for key, dtype in _PER_ARM.items()}

    def __len__(self) -> int:
        return self._rows

    def record(self, step: int, slsam: Any) -> None:
        """Take in the step just made. Every number was read by the step itself: no device is waited for.

        Args:
            step (`int`): Its number, from 1.
            slsam (`SLSAM`): Read: its `drawn`, `active`, `norms`, `loss` and `metrics`.
        """
        # The totals count every step.
        self.steps += 1
        self.last = step
        self.activity += slsam.active
        cost = slsam.metrics.get("cost", math.nan)
        self.cost_total += cost
        # Only every `stride`-th step gets a row, and the stride grows when the rows are full.
        if (step - 1) % self.stride:
            return
        if self._rows == self.limit:
            self._thin()
            if (step - 1) % self.stride:
                return
        if self._rows == len(self._steps):
            self._grow()
        # The step's numbers go into its row.
        row = self._rows
        self._steps[row] = step
        self._arms["probabilities"][row] = slsam.drawn
        self._arms["norms"][row] = slsam.norms
        self._arms["active"][row] = slsam.active
        metrics = slsam.metrics
        scalars = (
            slsam.loss,
            metrics.get("sharpness", math.nan),
            metrics["lowest_active_block"],
            cost,
            metrics["grad_norm_ascent"],
        )
        self._scalars[row] = torch.tensor(scalars)
        self._rows += 1

    def _tables(self) -> list[torch.Tensor]:
        return [self._steps, self._scalars, *self._arms.values()]

    def _replace(self, tables: list[torch.Tensor]) -> None:
        self._steps, self._scalars = tables[:2]
        self._arms = dict(zip(_PER_ARM, tables[2:], strict=True))

    def _grow(self) -> None:
        room = min(self.limit, max(64, 2 * self._rows)) - self._rows
        self._replace([torch.cat([t, t.new_zeros(room, *t.shape[1:])]) for t in self._tables()])

    def _thin(self) -> None:
        """Double the stride until there is room; at least half of the rows go, so this is rare."""
        while self._rows == self.limit:
            self.stride *= 2
            kept = ((self._steps[: self._rows] - 1) % self.stride == 0).nonzero().squeeze(1)
            for table in self._tables():
                table[: len(kept)] = table[kept]
            self._rows = len(kept)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return copies of the rows kept, oldest first, and of the counts.

        `step` int64 and `loss`, `sharpness`, `lowest_active_block`, `cost`, `grad_norm` float32 of shape
        `(rows,)`, NaN where a step has no such number; `probabilities` and `norms` float32 and `active` bool of shape
        `(rows, L)`; `activity` int64 of shape `(L,)`; `cost_total` float64 of shape `(1,)`.
        """
        rows = slice(0, self._rows)
        return {
            "step": self._steps[rows].clone(),
            **{name: self._scalars[rows, i].clone() for i, name in enumerate(_PER_STEP)},
            **{name: table[rows].clone() for name, table in self._arms.items()},
            "activity": self.activity.clone(),
            "cost_total": torch.tensor([self.cost_total], dtype=torch.float64),
        }

    def plain(self) -> dict[str, Any]:
        """Return everything else, as values that JSON can hold."""
        return {
            "names": self.names,
            "depths": self.depths,
            "limit": self.limit,
            "stride": self.stride,
            "steps": self.steps,
            "last": self.last,
        }

    @classmethod
    def restored(cls, tensors: dict[str, torch.Tensor], plain: dict[str, Any]) -> "Trace":
        """Rebuild a recorder that goes on where `tensors()` and `plain()` were taken.

        Raises:
            KeyError, ValueError: something is missing, or of another shape or dtype.
        """
        trace = cls(plain["names"], plain["depths"], plain["limit"])
        trace.stride, trace.steps, trace.last = (int(plain[key]) for key in ("stride", "steps", "last"))
        rows = len(tensors["step"])
        empty = trace.tensors()
        for key, like in empty.items():
            shape = like.shape if key in ("activity", "cost_total") else (rows, *like.shape[1:])
            if tensors[key].shape != shape or tensors[key].dtype != like.dtype:
                raise ValueError(f"{key} is {tuple(tensors[key].shape)} {tensors[key].dtype}, not {tuple(shape)}")
        trace._rows = rows
        trace._replace(
            [
                tensors["step"].clone(),
                torch.stack([tensors[name] for name in _PER_STEP], dim=1),
                *(tensors[name].clone() for name in _PER_ARM),
            ]
        )
        trace.activity = tensors["activity"].clone()
        trace.cost_total = float(tensors["cost_total"])
        return trace
