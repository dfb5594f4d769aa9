"""The servers of a run as the machine sees them, and what becomes of the run's draws."""

import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from megatron_fipo.config.rollout import RolloutConfig
from megatron_fipo.rollout.journal import JournalEntry
from tests.process_groups import members

PATIENCE_S = 60.0
_ESTABLISHED = "01"
# Responses of so many tokens are never equal by chance.
_TELLING_LENGTH = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerLife:
    """A server's processes from its start to its end.

    Attributes:
        name: The life's, as in "server0.life1".
        port: Where it answers.
        group: Its process group; the leader is SGLang's launcher, which also answers HTTP.
    """

    name: str
    port: int
    group: int

    def processes(self, title: str = "") -> list[int]:
        """Its processes, or those whose command line has the title in it, such as "scheduler"."""
        found = []
        for process in members(self.group):
            try:
                if title in " ".join(psutil.Process(process).cmdline()):
                    found.append(process)
            except psutil.Error:
                continue
        return found


def server_lives(controller: int) -> dict[str, ServerLife]:
    """Lives of the servers that run now, by server ("server0"), as children of the controller's agent.

    Args:
        controller: The controller process.
    """
    found = {}
    for process in psutil.Process(controller).children(recursive=True):
        try:
            words = process.cmdline()
            place = next((place for place, word in enumerate(words) if word.endswith("servers/guard.py")), None)
            if place is None:
                continue
            name = Path(words[place + 1]).stem
            (first, *_) = process.children()
            port = int(words[words.index("--port") + 1])
            found[name.partition(".")[0]] = ServerLife(name=name, port=port, group=first.pid)
        # It ends, or has only begun.
        except (psutil.Error, ValueError):
            continue
    return found


def unread_requests(port: int) -> int:
    """Connections to a port of this machine with bytes in them that nobody has read."""
    count = 0
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        _, local, _, state, queues, *_ = line.split()
        if state == _ESTABLISHED and int(local.rpartition(":")[2], 16) == port:
            count += int(queues.rpartition(":")[2], 16) > 0
    return count


def wait_until(holds: Callable[[], bool], what: str, patience_s: float = PATIENCE_S) -> None:
    """Look again and again until something holds."""
    deadline = time.monotonic() + patience_s
    while not holds():
        assert time.monotonic() < deadline, f"{what} has not come about in {patience_s:g} s"
        time.sleep(0.001)


def signal_all(life: ServerLife, number: int) -> None:
    """Send a signal to all of a server's processes."""
    os.killpg(life.group, number)


def check_every_draw_ends_once(entries: Sequence[JournalEntry], rollout: RolloutConfig) -> Counter[str]:
    """See that every draw of a run has one end, and every batch its samples once, of weights that they may be of.

    Args:
        entries: The journal, from the first step on.
        rollout: The run's.

    Returns:
        The draws by their ends; those that had none after the last batch are "open".
    """
    settled = [each for entry in entries for each in entry.settled]
    still_open = [each.number for each in entries[-1].open_prompts if each.number is not None]
    numbers = [each.number for each in settled] + still_open
    assert sorted(numbers) == list(range(len(numbers)))
    for step, entry in enumerate(entries, start=1):
        assert (entry.step, len(entry.groups)) == (step, rollout.num_prompts_per_step)
        used = Counter(each.prompt_id for each in entry.settled if each.fate == "used")
        assert used == Counter(group.prompt.id for group in entry.groups)
        for group in entry.groups:
            assert [sample.sample_index for sample in group.samples] == list(range(rollout.group_size))
            for sample in group.samples:
                versions = sample.token_versions
                assert len(versions) == len(sample.rollout_log_probs) == len(sample.response_token_ids) > 0
                assert entry.policy_version - rollout.policy_lag <= versions.min()
                assert versions.max() <= entry.policy_version
    samples = [sample for entry in entries for group in entry.groups for sample in group.samples]
    long = [each for each in samples if len(each.response_token_ids) >= _TELLING_LENGTH]
    assert len({(each.response_token_ids.tobytes(), each.rollout_log_probs.tobytes()) for each in long}) == len(long)
    return Counter(each.fate for each in settled) + Counter({"open": len(still_open)})
