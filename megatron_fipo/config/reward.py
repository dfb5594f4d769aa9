"""How a response is scored."""

from typing import Literal

from megatron_fipo.config.base import config_class, require, require_pattern


@config_class
class RewardConfig:
    """The reward of one response."""

    type: Literal["exact_match", "reasoning_gym"] = "exact_match"
    """"exact_match" compares the answer with the reference, without outer white space; "reasoning_gym" asks the task's
    own scorer."""

    answer_pattern: str | None = None
    """Regular expression whose first group is the answer, the last match counting; null takes the whole
    response. It is searched in the response's last 10,000 characters. Patterns whose search time explodes
    (nested repeats such as "(a+)+b") are not recognised: keep it simple."""

    require_stop: bool = True
    """A response that did not end by itself (cut off by the token limit, say) scores 0."""

    score_threshold: float = 0.99
    """A reasoning-gym score at or above this is a reward of 1, else 0."""

    def __post_init__(self) -> None:
        """Check ranges, and that the pattern is one."""
        require(
            0 < self.score_threshold <= 1,
            field="score_threshold",
            value=self.score_threshold,
            rule="must lie in (0, 1]",
            way_out="0.99 is a good value",
        )
        if self.answer_pattern is not None:
            require_pattern(self.answer_pattern, field="answer_pattern", group_holds="the answer")
