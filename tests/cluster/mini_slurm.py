"""A private Slurm on this machine, of several nodes, for as long as a test session lasts.

The daemons run as this user, with a munge, addresses, ports and a folder of their own, without cgroups and accounting.
Nothing outside that folder is touched, so several may run side by side, also beside a Slurm that the machine serves.
"""

import contextlib
import fcntl
import getpass
import os
import random
import re
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from megatron_fipo.launch.slurm import rendezvous_port

# Daemons lie in sbin, which an ordinary user's PATH may lack.
SEARCH_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/sbin", "/usr/sbin", "/sbin"])
COMMANDS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "sinfo", "scontrol", "scancel", "squeue", "setpriv")
START_TIMEOUT_S = 120.0
PREFIX = f"mini_slurm_{os.getuid()}_"

CONFIGURATION = """\
ClusterName=mini
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# A job that is queued again waits until credentials of its last attempt are void.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool_%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd_%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd_%n.log
# Listen on loopback alone.
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
# No cgroups and no affinity, so that any container will do.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
# Nodes may claim what the machine has not got.
SlurmdParameters=config_overrides
ReturnToService=2
SchedulerParameters=bf_interval=1,batch_sched_delay=0
KillWait=3
# Ended jobs can still be asked about.
MinJobAge=86400
FirstJobId={first_job_id}
MailProg=/bin/true
GresTypes=gpu
NodeName=DEFAULT CPUs=16 CoresPerSocket=16 RealMemory=100000 Gres=gpu:{gpus}
{nodes}
PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@dataclass(frozen=True)
class Job:
    """A job that has ended.

    Attributes:
        state: COMPLETED, FAILED, CANCELLED, …
        exit_code: Exit status of its batch script.
    """

    state: str
    exit_code: int


class SlurmError(RuntimeError):
    """The private Slurm did not do what it was asked."""


def why_unavailable() -> str:
    """What this machine lacks to run a Slurm, or nothing."""
    missing = [name for name in COMMANDS if shutil.which(name, path=SEARCH_PATH) is None]
    return f"{', '.join(missing)} not installed; run tools/install_slurm.sh" if missing else ""


class MiniSlurm:
    """A running Slurm.

    Attributes:
        folder: Its files and logs.
        nodes: Names of its nodes. They are loopback addresses, so that they can be connected to.
    """

    def __init__(self, folder: Path, nodes: list[str]) -> None:
        self.folder = folder
        self.nodes = nodes

    @property
    def environment(self) -> dict[str, str]:
        """Environment of its daemons and of commands that speak to it, clear of a surrounding Slurm job."""
        outer = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "SBATCH", "SRUN"))}
        return outer | {"PATH": SEARCH_PATH, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def command(self, *words: object, cwd: Path | None = None, variables: Mapping[str, str] | None = None) -> str:
        """Run a client command; returns what it printed.

        Raises:
            SlurmError: It failed.
        """
        process = subprocess.run(
            [str(word) for word in words],
            cwd=cwd,
            env=self.environment | dict(variables or {}),
            capture_output=True,
            text=True,
            timeout=START_TIMEOUT_S,
        )
        if process.returncode:
            raise SlurmError(f"{' '.join(map(str, words))} ended with {process.returncode}: {process.stderr}")
        return process.stdout

    def submit(self, *words: object, cwd: Path, variables: Mapping[str, str] | None = None) -> int:
        """Call sbatch from a folder; returns the job's id."""
        printed = self.command("sbatch", "--parsable", *words, cwd=cwd, variables=variables)
        return int(printed.split(";")[0])

    def show_job(self, job_id: int) -> dict[str, str]:
        """What `scontrol show job` says."""
        text = self.command("scontrol", "--oneliner", "show", "job", job_id)
        return {key: value for key, _, value in (word.partition("=") for word in text.split())}

    def wait(self, job_id: int, timeout_s: float = 480.0) -> Job:
        """Wait until a job has ended and all its processes are gone.

        Raises:
            SlurmError: It is still there after `timeout_s`.
        """

        def ended() -> dict[str, str] | None:
            job = self.show_job(job_id)
            return job if job["JobState"] not in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING") else None

        job = wait_for(ended, f"job {job_id} to end", timeout_s)
        return Job(state=job["JobState"], exit_code=int(job["ExitCode"].split(":")[0]))


def wait_for[T](probe: Callable[[], T | None], what: str, timeout_s: float) -> T:
    """Call `probe` until it gives something true.

    Raises:
        SlurmError: It did not in `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    while not (found := probe()):
        if time.monotonic() > deadline:
            raise SlurmError(f"waited {timeout_s:.0f} s for {what}")
        time.sleep(0.1)
    return found


@contextmanager
def mini_slurm(num_nodes: int = 2, gpus_per_node: int = 2) -> Iterator[MiniSlurm]:
    """Start a Slurm whose nodes all are this machine; ends it, and everything that it started, on leaving.

    Raises:
        SlurmError: It did not start. The text holds the ends of the daemons' logs, as any error raised inside does.
    """
    _clear_abandoned()
    # Paths of sockets must be short.
    with tempfile.TemporaryDirectory(prefix=PREFIX, dir="/tmp", ignore_cleanup_errors=True) as name, _owned(Path(name)):
        folder = Path(name)
        nodes = _write_files(folder, num_nodes, gpus_per_node)
        slurm = MiniSlurm(folder, nodes)
        daemons: list[subprocess.Popen[bytes]] = []
        try:
            _start(slurm, daemons)
            yield slurm
        except BaseException as error:
            error.add_note(_logs(folder))
            raise
        finally:
            _stop(slurm, daemons)


@contextmanager
def _owned(folder: Path) -> Iterator[None]:
    """Hold a lock in the folder, by which others see that its owner is alive."""
    with (folder / "owner.new").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (folder / "owner.new").rename(folder / "owner")
        yield


def _clear_abandoned() -> None:
    """End what a killed test session has left behind: its jobs outlive their daemons."""
    for owner in Path("/tmp").glob(f"{PREFIX}*/owner"):
        with contextlib.suppress(OSError), owner.open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _kill_processes_of(owner.parent)
            shutil.rmtree(owner.parent, ignore_errors=True)


def _write_files(folder: Path, num_nodes: int, gpus_per_node: int) -> list[str]:
    controller_port, *node_ports = _free_ports(1 + num_nodes)
    # A block of loopback addresses for this Slurm alone.
    block = f"127.{random.randint(16, 254)}.{random.randint(0, 254)}"
    nodes = [f"{block}.{number}" for number in range(1, num_nodes + 1)]
    for place in ("state", *(f"spool_{node}" for node in nodes)):
        (folder / place).mkdir()
    # A GPU is a device file; the node only looks at its kind, so the null device will do.
    for number in range(gpus_per_node):
        (folder / f"nvidia{number}").symlink_to("/dev/null")
    host = socket.gethostname().split(".")[0]
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(1024))
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/nvidia[0-{gpus_per_node - 1}]\n")
    (folder / "slurm.conf").write_text(
        CONFIGURATION.format(
            folder=folder,
            host=host,
            user=getpass.getuser(),
            controller_port=controller_port,
            gpus=gpus_per_node,
            first_job_id=_first_job_id(),
            nodes="\n".join(
                f"NodeName={node} NodeHostname={host} Port={port}" for node, port in zip(nodes, node_ports, strict=True)
            ),
        )
    )
    return nodes


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, below those that the kernel gives to outgoing connections."""
    found: list[int] = []
    while len(found) < count:
        port = random.randint(20_000, 32_000)
        if port not in found and _is_free(port):
            found.append(port)
    return found


def _first_job_id() -> int:
    """An id after which 20 jobs find their rendezvous port free: another Slurm on this machine may run jobs too."""
    while True:
        first = random.randint(1_000, 1_000_000)
        if all(_is_free(rendezvous_port(first + number, 0)) for number in range(20)):
            return first


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def _start(slurm: MiniSlurm, daemons: list[subprocess.Popen[bytes]]) -> None:
    folder = slurm.folder

    def start(*words: object) -> None:
        with (folder / "daemons.log").open("ab") as log:
            # Daemons end with the process that started them, however that ends.
            command = ["setpriv", "--pdeathsig", "TERM", *map(str, words)]
            daemons.append(
                subprocess.Popen(
                    command,
                    env=slurm.environment,
                    cwd=folder,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            )

    def alive() -> None:
        for daemon in daemons:
            if daemon.poll() is not None:
                raise SlurmError(f"a daemon ended with {daemon.returncode}: {daemon.args!r}")

    def munge_answers() -> bool:
        alive()
        return (folder / "munge.socket").exists()

    def nodes_idle() -> bool:
        alive()
        with contextlib.suppress(SlurmError):
            return slurm.command("sinfo", "-h", "-N", "-o", "%t").split() == ["idle"] * len(slurm.nodes)
        return False

    start(
        *("munged", "--foreground", "--force", f"--key-file={folder}/munge.key", f"--socket={folder}/munge.socket"),
        *(f"--pid-file={folder}/munged.pid", f"--log-file={folder}/munged.log", f"--seed-file={folder}/munge.seed"),
    )
    wait_for(munge_answers, "munge", START_TIMEOUT_S)
    start("slurmctld", "-D", "-c")
    for node in slurm.nodes:
        start("slurmd", "-D", "-N", node)
    wait_for(nodes_idle, "the nodes to be idle", START_TIMEOUT_S)


def _stop(slurm: MiniSlurm, daemons: list[subprocess.Popen[bytes]]) -> None:
    """End the jobs, then the daemons, then whatever still has this Slurm's configuration in its environment."""
    with contextlib.suppress(SlurmError, subprocess.TimeoutExpired):
        if slurm.command("squeue", "-h").strip():
            slurm.command("scancel", "--user", getpass.getuser())
            wait_for(lambda: not slurm.command("squeue", "-h").strip(), "jobs to end", 30.0)
    for daemon in reversed(daemons):
        daemon.terminate()
        try:
            daemon.wait(timeout=10.0)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()
    _kill_processes_of(slurm.folder)


def _kill_processes_of(folder: Path) -> None:
    mark = f"SLURM_CONF={folder}/slurm.conf".encode()
    for environment in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if mark in environment.read_bytes().split(b"\0"):
                os.kill(int(environment.parent.name), signal.SIGKILL)


def _logs(folder: Path, num_lines: int = 25) -> str:
    parts: list[str] = []
    for path in sorted(folder.glob("*.log")):
        lines = re.sub(r"\x1b\[[0-9;]*m", "", path.read_text(errors="replace")).splitlines()
        parts.append("\n".join([f"--- {path.name}", *lines[-num_lines:]]))
    return "\n".join(parts)
