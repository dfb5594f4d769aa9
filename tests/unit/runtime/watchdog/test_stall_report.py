import threading
from dataclasses import replace
from typing import Any

from megatron_fipo.runtime.watchdog.stall_report import RankState, python_stacks, report, summary, suspects


def rank(number: int, phase: str = "update", collective: int = 7, is_over: bool = False, **changes: Any) -> RankState:
    """A rank that waits in a collective."""
    values: dict[str, Any] = {
        "rank": number,
        "host": f"node{number // 2}",
        "process": 100 + number,
        "heard_s": 0.3,
        "idle_s": 42.0,
        "where": {"step": 3, "phase": phase, "work": (1, 2), "micro_batch": (4, 8), "queues": {}},
        "collectives": [
            {
                "group": "5 TP",
                "what": "nccl:all_reduce",
                "number": collective,
                "sizes": [[9]],
                "is_over": is_over,
                "is_p2p": False,
            }
        ],
        "stacks": f"stacks of rank {number}",
    }
    return RankState(**values | changes)


def test_the_rank_that_did_not_come_to_a_collective_is_named() -> None:
    assert suspects([rank(0), rank(1, collective=6, is_over=True), rank(2)]) == [
        "rank 1 (node0, process 101) did not come to nccl:all_reduce number 7 of group 5 TP, awaited by rank 0 and "
        "rank 2"
    ]


def test_a_rank_that_waits_itself_is_not_the_one() -> None:
    """Rank 0 waits for rank 1 in one group, which waits for rank 2 in another."""
    other = {"group": "6 CP", "what": "nccl:all_gather", "number": 3, "sizes": [[9]], "is_over": False, "is_p2p": False}
    before = other | {"number": 2, "is_over": True}
    behind = rank(1, collective=6, is_over=True)
    ranks = [rank(0), replace(behind, collectives=[*behind.collectives, other]), rank(2, collectives=[before])]
    assert suspects(ranks) == [
        "rank 2 (node1, process 102) did not come to nccl:all_gather number 3 of group 6 CP, awaited by rank 1"
    ]


def test_a_rank_that_waits_for_another_stage_is_not_the_one() -> None:
    """No recorder lists what it waits for, its stack does."""
    other = {"group": "6 DP", "what": "gloo:all_reduce", "number": 3, "sizes": [[9]], "is_over": False, "is_p2p": False}
    ahead = rank(2, collectives=[other])
    late = [other | {"number": 2, "is_over": True}]
    behind = rank(1, collectives=[*rank(1, collective=6, is_over=True).collectives, *late], waits=True)
    assert suspects([rank(0), behind, ahead, rank(3, collectives=late)]) == [
        "rank 3 (node1, process 103) did not come to gloo:all_reduce number 3 of group 6 DP, awaited by rank 2"
    ]


def test_ranks_behind_nobody_waits_for_are_not_named() -> None:
    """They are between collectives, and so are the others."""
    assert suspects([rank(0, is_over=True), rank(1, collective=6, is_over=True)]) == []
    assert "nothing tells the ranks apart" in report("it hangs", [rank(0), rank(1)])


def test_a_silent_rank_and_one_that_has_left_come_first() -> None:
    """The others' phases only follow from that."""
    silent = rank(1, "old_log_probs", heard_s=42.0, stacks="", collectives=[])
    left = rank(2, has_left=True, stacks="", collectives=[])
    assert suspects([rank(0), silent, left]) == [
        "rank 2 (node1, process 102) has ended before the others",
        "rank 1 (node0, process 101) has not been heard of for 42 s: it is stopped, or its node is out of reach",
    ]


def test_ranks_in_different_phases_are_told() -> None:
    found = suspects([rank(0, "weight_sync"), rank(1), rank(2, "weight_sync")])
    assert found == [
        "the ranks are in different phases: rank 0 and rank 2: step 3, weight_sync, 1 of 2 done, micro-batch 4 of 8; "
        "rank 1: step 3, update, 1 of 2 done, micro-batch 4 of 8"
    ]


def test_the_report_holds_everything_and_the_summary_a_line() -> None:
    where = {"step": 3, "phase": "rollout", "work": (0, 64), "micro_batch": (0, 0), "queues": {"requests in flight": 9}}
    ranks = [rank(0, where=where), *(rank(number) for number in range(1, 30))]
    text = report("it hangs", ranks)
    for number in range(30):
        assert f"\nstacks of rank {number}\n" in text
    assert "  requests in flight: 9\n" in text
    assert (
        "  rank 4 (node2, process 104): step 3, update, 1 of 2 done, micro-batch 4 of 8; no progress for 42 s\n" in text
    )
    assert text.count("nccl:all_reduce number 7, inputs [[9]], WAITS IN IT") == 30
    line = summary("it hangs", ranks)
    assert line.startswith(
        "it hangs; the ranks are in different phases: rank 0: step 3, rollout, 0 of 64 done; rank 1, "
    )
    assert "rank 8 and 21 more: step 3, update" in line
    assert "\n" not in line


def test_stacks_begin_with_the_main_thread() -> None:
    stacks = python_stacks()
    assert stacks.startswith("thread MainThread:\n")
    assert "test_stacks_begin_with_the_main_thread" in stacks
    assert python_stacks({threading.get_ident()}).count("thread MainThread:") == 0
