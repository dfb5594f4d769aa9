"""Whether two models give the same logits, and how close they are."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Where both compute in float32: the largest difference of any logit, in units of the largest logit or of 1.
FLOAT32_TOLERANCE = 1e-4
# Where both compute in bfloat16: ‖a − b‖ / ‖b‖ at half of the positions. At a few, rounding may send a token to another
# expert.
BFLOAT16_TOLERANCE = 2e-2
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
        scale: Largest logit.
        relative: ‖a − b‖ / ‖b‖.
        typical: The median of the same, taken at every position.
        mean_kl: Mean of KL(actor ‖ export) over positions, in nats.
        top1: Share of positions at which both have the same most likely token.
    """

    dtype: torch.dtype
    num_positions: int
    largest: float
    scale: float
    relative: float
    typical: float
    mean_kl: float
    top1: float

    @property
    def matches(self) -> bool:
        """Whether the models are the same, up to rounding."""
        if not self.mean_kl <= KL_TOLERANCES[self.dtype]:
            return False
        if self.dtype == torch.float32:
            return self.largest <= FLOAT32_TOLERANCE * max(1.0, self.scale)
        return self.typical <= BFLOAT16_TOLERANCE

    def __str__(self) -> str:
        return (
            f"{str(self.dtype).removeprefix('torch.')}: largest difference {self.largest:.2e} at logits up to "
            f"{self.scale:.1f}, relative norm {self.relative:.2e} (median {self.typical:.2e}), KL {self.mean_kl:.1e}, "
            f"same first token at {self.top1:.1%} of {self.num_positions} positions"
        )


def compare_logits(actor: Sequence[Tensor], export: Sequence[Tensor], dtype: torch.dtype) -> Agreement:
    """Compare logits of the same sequences.

    Args:
        actor: [L, V] of every sequence, of the model that is meant.
        export: The same, of the one that is to be it.
        dtype: Precision that both computed in.
    """
    largest = scale = square = norm = kl = same = 0.0
    positions, by_position = 0, []
    for ours, theirs in zip(actor, export, strict=True):
        for mine, other in zip(ours.split(_ROWS), theirs.split(_ROWS), strict=True):
            a, b = mine.double(), other.double()
            difference = a - b
            # A NaN must not be lost in a maximum.
            largest = max(largest, float(difference.abs().nan_to_num(nan=torch.inf).max()))
            scale = max(scale, float(b.abs().max()))
            square, norm = square + float(difference.square().sum()), norm + float(b.square().sum())
            log_p, log_q = a.log_softmax(-1), b.log_softmax(-1)
            kl += float((log_p.exp() * (log_p - log_q)).sum())
            same += int((a.argmax(-1) == b.argmax(-1)).sum())
            by_position.append(difference.norm(dim=-1) / b.norm(dim=-1))
            positions += len(a)
    return Agreement(
        dtype=dtype,
        num_positions=positions,
        largest=largest,
        scale=scale,
        relative=(square / max(norm, 1e-300)) ** 0.5,
        typical=float(torch.cat(by_position).nan_to_num(nan=torch.inf).median()),
        mean_kl=kl / positions,
        top1=same / positions,
    )
