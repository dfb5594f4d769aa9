"""Grading processes: order, deadlines, deaths, and the end."""

import asyncio
import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_fipo.config.base import ConfigError
from megatron_fipo.config.reward import ExactMatchTerm, OverlongTerm, PythonTerm, RewardConfig
from megatron_fipo.rewards.base import Response, RewardError
from megatron_fipo.rewards.pool import JOBS_PER_WORKER, RewardPool, Score, ScoreFailure, ScoreJob
from megatron_fipo.runtime.errors import RunError

BEHAVIOURS = f"{Path(__file__).with_name('behaviours.py')}:reward"
TIMEOUT_S = 1.0


@pytest.fixture(scope="module")
def pool() -> Iterator[RewardPool]:
    terms = {
        # The first line is the answer; a line of "aaaa…" takes for ever.
        "correct": ExactMatchTerm(answer_pattern=r"(?m)\A(.+)|^(?:a+)+b"),
        "mine": PythonTerm(function=BEHAVIOURS, weight=2.0),
        "overlong": OverlongTerm(buffer_tokens=10),
    }
    config = RewardConfig(terms=terms, timeout_s=TIMEOUT_S, max_workers=3, worker_memory_gib=1.0)
    with RewardPool(config, max_response_tokens=30) as opened:
        yield opened


def job(text: str, reference: str | None = "x", number: int = 0, **fields: Any) -> ScoreJob:
    return ScoreJob(f"train:7#{number}", Response(text=text, reference=reference, **fields))


def score(pool: RewardPool, jobs: Sequence[ScoreJob]) -> list[Score | ScoreFailure]:
    return pool.submit(jobs).result(timeout=60)


def failure(pool: RewardPool, text: str) -> ScoreFailure:
    before, (bad, good) = pool.num_replaced, score(pool, [job(text), job("give 1")])
    assert isinstance(good, Score) and good.terms["mine"] == 2.0, "its neighbour is graded all the same"
    assert isinstance(bad, ScoreFailure) and bad.sample_id == "train:7#0"
    assert pool.num_replaced - before <= 2
    return bad


def children() -> list[psutil.Process]:
    """Grading processes of this one, which may have other children."""
    found = []
    for process in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if "megatron_fipo.rewards.worker" in process.cmdline():
                found.append(process)
    return found


def test_terms_are_weighted_and_the_first_is_the_score(pool: RewardPool) -> None:
    jobs = [job("give 0.25", "give 0.25", num_tokens=25), job("give 0.25", "other", num_tokens=20)]
    assert score(pool, jobs) == [
        Score(
            score=1.0,
            reward=1.0,
            terms={"correct": 1.0, "mine": 0.5, "overlong": -0.5},
            answer="give 0.25",
            timed_out=False,
        ),
        Score(
            score=0.0,
            reward=0.5,
            terms={"correct": 0.0, "mine": 0.5, "overlong": 0.0},
            answer="give 0.25",
            timed_out=False,
        ),
    ]


def test_an_unfinished_response_gets_the_penalty_alone(pool: RewardPool) -> None:
    (outcome,) = score(pool, [job("give 1", "give 1", finish_reason="length", num_tokens=30)])
    assert isinstance(outcome, Score)
    assert outcome.terms == {"correct": 0.0, "mine": 0.0, "overlong": -1.0}
    assert outcome.answer is None


def test_outcomes_keep_the_order_of_the_jobs(pool: RewardPool) -> None:
    numbers = [random.Random(4).random() for _ in range(3 * JOBS_PER_WORKER)]
    outcomes = asyncio.run(pool.score([job(f"give {number!r}") for number in numbers]))
    assert [outcome.terms["mine"] for outcome in outcomes if isinstance(outcome, Score)] == [2 * n for n in numbers]
    assert len(children()) == 3, "more processes come as jobs wait, up to the limit"


def test_no_jobs_have_no_outcomes(pool: RewardPool) -> None:
    assert score(pool, []) == []
    assert asyncio.run(pool.score([])) == []
    assert asyncio.run(pool.same_answer([])) == []


def test_text_of_every_kind_arrives(pool: RewardPool) -> None:
    texts = ["give 1\x00", "give 1 ", "give 1\u2028"]
    strange = ["\ud800", "\U0010ffff", "é" * 100_000]
    outcomes = score(pool, [job(text, text) for text in texts])
    assert [isinstance(outcome, ScoreFailure) for outcome in outcomes] == [True, False, False]
    assert asyncio.run(pool.same_answer([(text, f" {text}\n") for text in strange])) == [True] * 3


def test_metadata_arrives_as_python_has_it(pool: RewardPool) -> None:
    (outcome,) = score(pool, [job("add", metadata={1: (2, 3)})])
    assert isinstance(outcome, Score) and outcome.terms["mine"] == 10.0


def test_metadata_that_is_not_plain_is_told_with_the_sample(pool: RewardPool) -> None:
    with pytest.raises(RewardError, match="^reward of train:7#0: PosixPath in a prompt's metadata cannot be sent"):
        pool.submit([job("give 1", metadata={"file": Path("x")})])
    (outcome,) = score(pool, [job("give 1", metadata={"empty": float("nan")})])
    assert isinstance(outcome, Score)


def test_a_caller_that_stops_waiting_disturbs_nothing(pool: RewardPool, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)

    async def give_up() -> None:
        async with asyncio.TaskGroup() as tasks:
            waiting = tasks.create_task(pool.score([job(f"read {pipe}")]))
            with await asyncio.to_thread(pipe.open, "w") as writer:
                waiting.cancel()
                writer.write("1")

    asyncio.run(give_up())
    (outcome,) = score(pool, [job("give 1")])
    assert isinstance(outcome, Score)


def test_what_a_function_prints_disturbs_nothing(pool: RewardPool) -> None:
    (outcome,) = score(pool, [job("print something")])
    assert isinstance(outcome, Score) and outcome.terms["mine"] == 0.0


def test_what_a_function_forks_answers_nothing_and_holds_nobody_up() -> None:
    known = {process.pid for process in psutil.process_iter()}
    with small_pool() as pool:
        jobs = [job("fork"), job("fork and wait"), *(job(f"give {number}") for number in range(8))]
        outcomes = score(pool, jobs)
        assert [outcome.reward for outcome in outcomes if isinstance(outcome, Score)] == [0.5, 0.5, *range(8)]
        (worker,) = [process for process in children() if process.pid not in known]
        (forked,) = [process for process in worker.children() if process.status() != psutil.STATUS_ZOMBIE]
        closing = threading.Thread(target=pool.close, daemon=True)
        closing.start()
        closing.join(10)
        assert not closing.is_alive()
        assert not forked.is_running() or forked.status() == psutil.STATUS_ZOMBIE


def test_a_process_imports_no_large_library(pool: RewardPool) -> None:
    (outcome,) = score(pool, [job("imported torch numpy sympy pydantic megatron")])
    assert isinstance(outcome, Score) and outcome.terms["mine"] == 0.0


@pytest.mark.parametrize(
    ("text", "kind", "problem"),
    [
        ("raise on purpose", "raised", "ValueError: on purpose"),
        ("exit with words", "raised", "SystemExit: with words"),
        ("nothing", "raised", "TypeError: float() argument must be a string or a real number, not 'NoneType'"),
        ("give nan", "not_finite", "nan is not a finite number"),
        ("give -inf", "not_finite", "-inf is not a finite number"),
        ("give 1e308", "not_finite", "inf is not a finite number"),
        ("die", "ended", "2 grading processes died of it"),
        ("fill", "ended", "2 grading processes died of it"),
    ],
)
def test_a_function_that_fails_is_told_with_the_sample(pool: RewardPool, text: str, kind: str, problem: str) -> None:
    found = failure(pool, text)
    assert (found.kind, found.problem) == (kind, problem)
    assert found.term == ("the sum" if text == "give 1e308" else "mine")


def test_a_function_that_hangs_is_ended_at_its_deadline(pool: RewardPool) -> None:
    before = pool.num_replaced
    found = failure(pool, "hang")
    assert (found.kind, found.term, found.problem) == ("ended", "mine", "over 1 s")
    assert pool.num_replaced == before + 1


def test_an_answer_that_takes_too_long_is_wrong(pool: RewardPool) -> None:
    before = pool.num_replaced
    slow, good = score(pool, [job("give 1\n" + "a" * 60, "give 1"), job("give 1", "give 1")])
    assert isinstance(slow, Score) and isinstance(good, Score)
    assert (slow.score, slow.terms["mine"], slow.timed_out) == (0.0, 2.0, True)
    assert (good.score, good.timed_out) == (1.0, False)
    assert pool.num_replaced == before, "the process got over it by itself"


def test_a_prompt_without_reference_is_an_error_of_the_row(pool: RewardPool) -> None:
    (outcome,) = score(pool, [job("give 1", None)])
    problem = "there is no reference answer"
    assert outcome == ScoreFailure(sample_id="train:7#0", kind="reference", term="correct", problem=problem)


def test_a_process_killed_from_outside_costs_nothing(pool: RewardPool, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    before = pool.num_replaced
    waiting = pool.submit([job(f"read {pipe}"), *(job(f"give {number}") for number in range(JOBS_PER_WORKER - 1))])
    # Opens when a process has come to the first job.
    with pipe.open("w"):
        for process in children():
            process.send_signal(signal.SIGKILL)
            process.wait()
    with pipe.open("w") as writer:
        writer.write("5")
    outcomes = waiting.result(timeout=60)
    found = [outcome.terms["mine"] / 2 for outcome in outcomes if isinstance(outcome, Score)]
    assert found == [5.0, *range(JOBS_PER_WORKER - 1)]
    assert pool.num_replaced > before


def test_a_process_that_stands_still_is_replaced() -> None:
    terms = {"correct": ExactMatchTerm(), "mine": PythonTerm(function=BEHAVIOURS)}
    known = children()
    with small_pool(terms=terms, timeout_s=0.1) as pool:
        (process,) = set(children()) - set(known)
        process.suspend()
        (outcome,) = score(pool, [job("give 2", "give 2")])
        assert outcome == Score(
            score=0.0, reward=2.0, terms={"correct": 0.0, "mine": 2.0}, answer=None, timed_out=True
        ), "without a word from the process the first term is taken for the culprit"
        assert not process.is_running()


def small_pool(**config: Any) -> RewardPool:
    terms = config.pop("terms", {"mine": PythonTerm(function=BEHAVIOURS)})
    return RewardPool(RewardConfig(terms=terms, max_workers=1, **config), max_response_tokens=30)


def test_the_end_of_a_pool(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    pool = small_pool()
    (process,) = children()[-1:]
    waiting = pool.submit([job(f"read {tmp_path / 'pipe'}"), job("give 1")])
    with (tmp_path / "pipe").open("w"):
        pool.close()
    assert not process.is_running()
    with pytest.raises(RunError, match="the reward pool was closed"):
        waiting.result(timeout=10)
    pool.close()
    with pytest.raises(RunError, match="the reward pool is closed"):
        pool.submit([job("give 1")])


def test_a_term_that_cannot_be_used_is_told_at_the_start() -> None:
    before = len(children())
    with pytest.raises(ConfigError) as caught:
        small_pool(terms={"mine": PythonTerm(function="no.such.module:reward")})
    assert str(caught.value) == (
        "reward.terms.mine.function = no.such.module:reward: no.such.module cannot be imported (ModuleNotFoundError: "
        "No module named 'no'); correct the path"
    )
    with pytest.raises(ConfigError, match=r"^reward.terms.long.buffer_tokens = 30: must be below rollout.max_response"):
        small_pool(terms={"correct": ExactMatchTerm(), "long": OverlongTerm(buffer_tokens=30)})
    assert len(children()) == before


def test_a_process_that_does_not_start_is_told(tmp_path: Path) -> None:
    (tmp_path / "reward.py").write_text("import os\nos._exit(3)\n")
    with pytest.raises(RunError, match="a grading process ended with 3 before its first job"):
        small_pool(terms={"mine": PythonTerm(function=f"{tmp_path}/reward.py:reward")})


def test_a_function_that_is_gone_later_ends_the_wait(tmp_path: Path) -> None:
    file = tmp_path / "reward.py"
    file.write_text("import os\ndef reward(response): os._exit(3)\n")
    with small_pool(terms={"mine": PythonTerm(function=f"{file}:reward")}) as pool:
        file.unlink()
        with pytest.raises(RunError, match="a grading process could not be started: reward.terms.mine.function = "):
            score(pool, [job("x")])


def test_processes_end_with_a_parent_that_is_killed() -> None:
    program = """
import psutil, signal, sys
from megatron_fipo.config.reward import PythonTerm, RewardConfig
from megatron_fipo.rewards.base import Response
from megatron_fipo.rewards.pool import RewardPool, ScoreJob
pool = RewardPool(RewardConfig(terms={"mine": PythonTerm(function=sys.argv[1])}, timeout_s=60), 30)
pool.submit([ScoreJob("train:7#0", Response(text="hang"))])
print(psutil.Process().children()[0].pid, flush=True)
signal.pause()
"""
    root = Path(__file__).parents[3]
    parent = subprocess.Popen([sys.executable, "-c", program, BEHAVIOURS], stdout=subprocess.PIPE, text=True, cwd=root)
    assert parent.stdout is not None
    worker = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    parent.stdout.close()
    worker.wait(timeout=10)
