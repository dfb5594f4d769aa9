import pytest

from megatron_fipo.config.base import ConfigError
from megatron_fipo.launch.hostlist import expand_hostlist


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("login", ["login"]),
        ("gpu-b,gpu-a.cluster.org", ["gpu-b", "gpu-a.cluster.org"]),
        ("node[1-3]", ["node1", "node2", "node3"]),
        ("node[7]", ["node7"]),
        ("n[1,3-4,9]", ["n1", "n3", "n4", "n9"]),
        ("n[08-11]", ["n08", "n09", "n10", "n11"]),
        ("n[098-101]", ["n098", "n099", "n100", "n101"]),
        ("n[9-10],login", ["n9", "n10", "login"]),
        ("a[1-2],b[1-2]", ["a1", "a2", "b1", "b2"]),
        ("r[1-2]n[01-02]", ["r1n01", "r1n02", "r2n01", "r2n02"]),
        ("n[1-2]-ib", ["n1-ib", "n2-ib"]),
        ("10.0.0.[1-2]", ["10.0.0.1", "10.0.0.2"]),
        ("[1-2]", ["1", "2"]),
    ],
)
def test_every_host_is_named_in_order(text: str, hosts: list[str]) -> None:
    assert expand_hostlist(text) == hosts


@pytest.mark.parametrize(
    "text", ["", ",", "a,", "a,,b", "a[", "a[1", "a]", "a[]", "a[1,]", "a[1-]", "a[3-1]", "a[x]", "a[1-2-3]", "a[[1]]"]
)
def test_what_is_no_host_list_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"SLURM_STEP_NODELIST = .*: must be a host list such as"):
        expand_hostlist(text)
