"""What is done about tokens whose probability the rollout engine and the trainer disagree on."""

import math
from typing import Literal

from megatron_fipo.config.base import config_class, require

CorrectionKind = Literal["none", "truncate", "mask"]
CorrectionLevel = Literal["token", "sequence"]


@config_class
class RolloutCorrectionConfig:
    """A factor on token losses from k = π_old / π_rollout, without gradient; it never enters the Future-KL."""

    kind: CorrectionKind = "none"
    """`truncate`: the factor is min(k, high), truncated importance sampling (TIS). `mask`: it is k within [low, high]
    and 0 outside (IcePop, arXiv:2510.18855; with low = 0 masked importance sampling, MIS). `none`: there is none.
    Masked tokens stay in the denominator of the loss."""

    level: CorrectionLevel = "token"
    """Whose ratio k is: the `token`'s, or that of its response, `sequence`: the geometric mean over its tokens, as in
    GSPO. (The product over thousands of tokens is 0 or infinite.)"""

    low: float = 0.0
    """Smallest k that `mask` lets through. IcePop: 0.5; for a whole response close to 1, such as 0.99."""

    high: float = 2.0
    """Largest factor of `truncate`, or the largest k that `mask` lets through. TIS: 2; IcePop: 5; for a whole response
    close to 1, such as 1.01."""

    def __post_init__(self) -> None:
        """Refuse bounds that equal probabilities would break."""
        require(
            0 <= self.low <= 1,
            field="low",
            value=self.low,
            rule="must lie in [0, 1]: where engine and trainer agree, k is 1",
            way_out="use 0.5, or 0 for no lower bound",
        )
        require(
            1 <= self.high < math.inf,
            field="high",
            value=self.high,
            rule="must be at least 1 and finite: where engine and trainer agree, k is 1",
            way_out="use 2",
        )
        require(
            self.kind != "truncate" or self.low == 0,
            field="low",
            value=self.low,
            rule="must be 0 with kind = truncate, which has an upper bound alone",
            way_out="remove it, or set kind = mask",
        )
