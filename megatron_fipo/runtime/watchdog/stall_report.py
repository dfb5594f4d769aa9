"""The text about a run that hangs: what every rank does, and which of them the others wait for."""

import sys
import threading
import traceback
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

# Where a main thread waits for other ranks. Between pipeline stages, gloo's sends and receives are in no recorder.
_WAITS = ("torch/distributed/distributed_c10d.py", "megatron/core/pipeline_parallel/p2p_communication.py")


@dataclass(frozen=True, slots=True, kw_only=True)
class RankState:
    """What is known of a rank.

    Attributes:
        rank: The rank.
        host: Its node.
        process: Its process there.
        heard_s: Seconds since it was heard of.
        idle_s: Seconds since its progress changed.
        where: What `Whereabouts.told` gave last; empty before.
        collectives: What `last_collectives` gave, where it answered.
        stacks: Python stacks of all its threads, where it answered.
        waits: What `waits_for_ranks` gave, where it answered.
        has_left: Whether it has ended in good order.
    """

    rank: int
    host: str
    process: int
    heard_s: float
    idle_s: float
    where: Mapping[str, Any]
    collectives: Sequence[Mapping[str, Any]] = field(default=())
    stacks: str = ""
    waits: bool = False
    has_left: bool = False

    @property
    def name(self) -> str:
        """The rank, and where it runs."""
        return f"rank {self.rank} ({self.host}, process {self.process})"

    @property
    def answered(self) -> bool:
        """Whether it has told what it does."""
        return bool(self.stacks)


def python_stacks(without: Collection[int | None] = ()) -> str:
    """What the threads of this process do, the main one first.

    Args:
        without: Identities of threads that are left out.
    """
    threads = {thread.ident: thread for thread in threading.enumerate()}
    frames = sys._current_frames()
    main = threading.main_thread().ident
    parts = []
    for identity in sorted(frames.keys() - set(without), key=lambda each: each != main):
        thread = threads.get(identity)
        parts.append(f"thread {thread.name if thread else identity}:\n")
        parts += traceback.format_stack(frames[identity])
    return "".join(parts)


def waits_for_ranks() -> bool:
    """Whether the main thread is inside a call that other ranks have to answer."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return frame is not None and frame.f_code.co_filename.endswith(_WAITS)


def suspects(ranks: Sequence[RankState]) -> list[str]:
    """Sentences that name the ranks which others wait for, the surest first; none where nothing tells them apart.

    What only follows from them is left out: a rank that waits itself hands a wait on, and ranks may be in different
    phases because one of them is late.
    """
    found = [f"{each.name} has ended before the others" for each in ranks if each.has_left]
    found += [
        f"{each.name} has not been heard of for {each.heard_s:.0f} s: it is stopped, or its node is out of reach"
        for each in ranks
        if not each.answered and not each.has_left
    ]
    first, handed_on = _behind_in_collectives(ranks)
    return found + first or handed_on or _behind_in_phases(ranks)


def _behind_in_collectives(ranks: Sequence[RankState]) -> tuple[list[str], list[str]]:
    """Ranks that did not come to a collective in which others are: those that wait nowhere, and those that do."""
    groups: dict[str, dict[int, Mapping[str, Any]]] = {}
    for each in ranks:
        for collective in each.collectives:
            # Stages of a pipeline send unlike numbers of messages.
            if not collective["is_p2p"]:
                groups.setdefault(collective["group"], {})[each.rank] = collective
    names = {each.rank: each.name for each in ranks}
    waiting = {each.rank for each in ranks if each.waits or not all(one["is_over"] for one in each.collectives)}
    first: list[str] = []
    handed_on: list[str] = []
    for group, members in groups.items():
        newest = max(members.values(), key=lambda each: each["number"])
        behind = [rank for rank, each in members.items() if each["number"] < newest["number"]]
        there = [rank for rank, each in members.items() if each["number"] == newest["number"] and not each["is_over"]]
        for some, found in ((set(behind) - waiting, first), (set(behind) & waiting, handed_on)):
            if some and there:
                found.append(
                    f"{_listed([names[rank] for rank in sorted(some)])} did not come to {newest['what']} number "
                    f"{newest['number']} of group {group}, awaited by {_listed([f'rank {rank}' for rank in there])}"
                )
    return first, handed_on


def _behind_in_phases(ranks: Sequence[RankState]) -> list[str]:
    places: dict[tuple[int, str], list[RankState]] = {}
    for each in ranks:
        if each.where and not each.has_left:
            places.setdefault((each.where["step"], each.where["phase"]), []).append(each)
    if len(places) < 2:
        return []
    told = [
        f"{_listed([f'rank {each.rank}' for each in there])}: {_place(there[0].where)}" for there in places.values()
    ]
    return [f"the ranks are in different phases: {'; '.join(told)}"]


def _place(where: Mapping[str, Any]) -> str:
    if not where:
        return "nothing is known yet"
    work, micro_batch = where["work"], where["micro_batch"]
    parts = [f"step {where['step']}, {where['phase']}"]
    if work[1]:
        parts.append(f"{work[0]} of {work[1]} done")
    if micro_batch[1]:
        parts.append(f"micro-batch {micro_batch[0]} of {micro_batch[1]}")
    return ", ".join(parts)


def _listed(names: Sequence[str], most: int = 8) -> str:
    shown = list(names[:most]) + ([f"{len(names) - most} more"] if len(names) > most else [])
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"


def summary(reason: str, ranks: Sequence[RankState]) -> str:
    """What is printed: the reason, and who is waited for."""
    return "; ".join([reason, *(suspects(ranks)[:3] or ["nothing tells the ranks apart"])])


def report(reason: str, ranks: Sequence[RankState]) -> str:
    """What is written: the summary, then every rank by itself."""
    lines = [reason, 'How to read this: docs/operations.md, "The stall report".', "", "Who is waited for:"]
    lines += [f"  {each}" for each in suspects(ranks) or ["nothing tells the ranks apart"]]
    queues: Mapping[str, int] = next((each.where["queues"] for each in ranks if each.where.get("queues")), {})
    if queues:
        lines += ["", "Queues of the rollout controller:", *(f"  {name}: {depth}" for name, depth in queues.items())]
    lines += ["", "Ranks:"]
    for each in ranks:
        lines.append(f"  {each.name}: {_place(each.where)}; no progress for {each.idle_s:.0f} s")
    for each in ranks:
        lines += ["", f"--- {each.name}, heard of {each.heard_s:.1f} s ago"]
        lines += ["Last call in each process group:"] if each.collectives else []
        for collective in each.collectives:
            state = "over" if collective["is_over"] else "WAITS IN IT"
            lines.append(
                f"  group {collective['group']}: {collective['what']} number {collective['number']}, inputs "
                f"{collective['sizes']}, {state}"
            )
        stacks = f"Python stacks, innermost call last:\n{each.stacks}" if each.answered else "It did not answer."
        lines += ["", stacks]
    return "\n".join(lines) + "\n"
