"""Reads Slurm's short form of host names: `node[1-3,07-09]-ib,login`."""

import itertools
import re

from megatron_fipo.config.base import require

# Text without commas, or brackets with whatever is in them.
_NAME = re.compile(r"(?:[^,\[\]]|\[[^\[\]]*\])+")
_PARTS = re.compile(r"\[([^\[\]]*)\]|([^\[\]]+)")
_RANGE = re.compile(r"(\d+)(?:-(\d+))?")


def expand_hostlist(text: str) -> list[str]:
    """Name every host, in order, as `scontrol show hostnames` does; needs no Slurm command, which containers lack.

    Args:
        text: A Slurm host list, such as SLURM_STEP_NODELIST holds.

    Raises:
        ConfigError: It is no host list.
    """
    names = _NAME.findall(text)
    _require_readable(text, bool(names) and ",".join(names) == text)
    return [host for name in names for host in _expand_name(name, text)]


def _expand_name(name: str, text: str) -> list[str]:
    choices = [[plain] if plain else _expand_ranges(inside, text) for inside, plain in _PARTS.findall(name)]
    # Of several brackets in a name, the last runs fastest.
    return ["".join(parts) for parts in itertools.product(*choices)]


def _expand_ranges(inside: str, text: str) -> list[str]:
    numbers: list[str] = []
    for item in inside.split(","):
        match = _RANGE.fullmatch(item)
        _require_readable(text, match is not None)
        assert match is not None
        first, last = match[1], match[2] or match[1]
        _require_readable(text, int(first) <= int(last))
        # Leading zeros are kept: [08-10] is 08, 09, 10.
        numbers += [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return numbers


def _require_readable(text: str, readable: bool) -> None:
    require(
        readable,
        field="SLURM_STEP_NODELIST",
        value=text,
        rule='must be a host list such as "node[1-3,07],login"',
        way_out="leave the variable as Slurm sets it",
    )
