"""Whether two models give the same logits, and how close they are."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Where both compute in float32: the largest difference of any logit, in units of the largest logit or of 1.
FLOAT32_TOLERANCE = 1e-4
# Where both compute in bfloat16: ‖a − b‖ / ‖b‖ at half of the positions.
BFLOAT16_TOLERANCE = 2e-2
# What bfloat16 itself does to the logits, against float32, may be more than that in a deep model. Two models' roundings
# differ by √2 times as much where they have nothing in common.
_ROUNDINGS = 3.0
# Mean over positions of KL(actor ‖ export), in nats, by precision.
KL_TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 2e-2}
_ROWS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """How close the logits of two models are.

    Attributes:
        dtype: Precision that both computed in.
        num_positions: Positions that were compared.
        largest: Largest difference of any logit.
        largest_typical: Largest difference at a position, the median over positions.
        scale: Largest logit.
        typical: ‖a − b‖ / ‖b‖, the median over positions.
        mean_kl: Mean of KL(actor ‖ export) over positions, in nats.
        top1: Share of positions at which both have the same most likely token.
        may_reroute: Whether each model chose the experts of its tokens for itself, so that some may have others.
        rounding: The same of the export in this precision against itself in float32, where that is known.
    """

    dtype: torch.dtype
    num_positions: int
    largest: float
    largest_typical: float
    scale: float
    typical: float
    mean_kl: float
    top1: float
    may_reroute: bool = False
    rounding: "Agreement | None" = None

    @property
    def is_finite(self) -> bool:
        """Whether its numbers say anything: they do not where logits are NaN or infinite, or are 0 at most positions.

        That is so of `rounding`, too.
        """
        numbers = (self.largest, self.scale, self.typical, self.mean_kl)
        return all(map(math.isfinite, numbers)) and (self.rounding is None or self.rounding.is_finite)

    @property
    def matches(self) -> bool:
        """Whether the models are the same, up to rounding."""
        if not self.is_finite:
            return False
        kl_tolerance = KL_TOLERANCES[torch.bfloat16 if self.may_reroute else self.dtype]
        if self.dtype == torch.float32:
            largest = self.largest_typical if self.may_reroute else self.largest
            return largest <= FLOAT32_TOLERANCE * max(1.0, self.scale) and self.mean_kl <= kl_tolerance
        tolerance = BFLOAT16_TOLERANCE
        if self.rounding is not None:
            tolerance = max(tolerance, _ROUNDINGS * self.rounding.typical)
            kl_tolerance = max(kl_tolerance, _ROUNDINGS**2 * self.rounding.mean_kl)
        return self.typical <= tolerance and self.mean_kl <= kl_tolerance

    def __str__(self) -> str:
        of_rounding = "" if self.rounding is None else f" (rounding alone: {self.rounding.typical:.2e})"
        return (
            f"{str(self.dtype).removeprefix('torch.')}: largest difference {self.largest:.2e} at logits up to "
            f"{self.scale:.1f}, median relative norm {self.typical:.2e}{of_rounding}, KL {self.mean_kl:.1e}, "
            f"same first token at {self.top1:.1%} of {self.num_positions} positions"
        )


def compare_logits(
    actor: Sequence[Tensor],
    export: Sequence[Tensor],
    dtype: torch.dtype,
    exact: Sequence[Tensor] | None = None,
    *,
    may_reroute: bool = False,
) -> Agreement:
    """Compare logits of the same sequences.

    Args:
        actor: [L, V] of every sequence, of the model that is meant.
        export: The same, of the one that is to be it.
        dtype: Precision that both computed in.
        exact: The same of the export in float32, to know what rounding does.
        may_reroute: Whether each model chose the experts of its tokens for itself: then half of the positions count.
    """
    scale = kl = 0.0
    same, norms, largest = 0, [], []
    for ours, theirs in zip(actor, export, strict=True):
        for mine, other in zip(ours.split(_ROWS), theirs.split(_ROWS), strict=True):
            a, b = mine.double(), other.double()
            # A NaN must not be lost in a maximum or a median.
            difference = (a - b).abs().nan_to_num(nan=torch.inf)
            scale = max(scale, float(b.abs().max()))
            largest.append(difference.amax(dim=-1))
            norms.append(difference.norm(dim=-1) / b.norm(dim=-1))
            log_p, log_q = a.log_softmax(-1), b.log_softmax(-1)
            kl += float((log_p.exp() * (log_p - log_q)).sum())
            same += int((a.argmax(-1) == b.argmax(-1)).sum())
    by_position, largest_by_position = torch.cat(norms), torch.cat(largest)
    return Agreement(
        dtype=dtype,
        num_positions=len(by_position),
        largest=float(largest_by_position.max()),
        largest_typical=float(largest_by_position.median()),
        scale=scale,
        typical=float(by_position.nan_to_num(nan=torch.inf).median()),
        mean_kl=kl / len(by_position),
        top1=same / len(by_position),
        may_reroute=may_reroute,
        rounding=None if exact is None else compare_logits(exact, export, dtype),
    )
