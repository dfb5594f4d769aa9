"""Grades hostile and ordinary answers, and compares the pool with calling math-verify in this process.

Prints one JSON object: the time of 1,000 hostile answers and the processes it cost; the throughput on ordinary answers
through the pool and inline, on the same list in the same run; and how many of their verdicts differ. Throughput is in
answers per second of processor time, the parent's included, so that a busy machine does not blur it.

    python tools/benchmark_grading.py [--hostile 1000] [--ordinary 2000] [--timeout-s 5] [--workers 1]
"""

import argparse
import json
import random
import time
from collections.abc import Callable, Iterator

import psutil

from megatron_fipo.config.reward import MathTerm, RewardConfig
from megatron_fipo.rewards.base import Response
from megatron_fipo.rewards.pool import RewardPool, Score, ScoreFailure, ScoreJob

REFERENCES = ("34", r"\frac{1}{2}", "x^2+1", "(1,2)", r"3+\sqrt{2}", "2^{100}")


def _nested(opening: str, closing: str) -> Callable[[random.Random], str]:
    def build(draws: random.Random) -> str:
        depth = draws.choice((15, 200, 3_000))
        return opening * depth + "1" + closing * depth

    return build


def _random_text(draws: random.Random) -> str:
    alphabet = "0123456789+-*/^_=(){}[]\\$%&|!,.;:'\"<>~ \n\tabcxyzπ∞√\u200b\u202e"
    return "".join(draws.choice(alphabet) for _ in range(draws.randint(0, 400)))


def _torn_latex(draws: random.Random) -> str:
    commands = ("frac", "sqrt", "left(", "right)", "begin{pmatrix}", "text{", "cdot", "pi", "boxed{", "over", "binom")
    return "".join(f"\\{draws.choice(commands)}{draws.choice('{}[]12x ')}" for _ in range(draws.randint(1, 60)))


_BUILDERS: tuple[Callable[[random.Random], str], ...] = (
    # Numbers beyond all bounds.
    lambda draws: "^".join([str(draws.randint(2, 9))] * draws.randint(3, 9)),
    lambda draws: "**".join([str(draws.randint(2, 9))] * draws.randint(3, 9)),
    lambda draws: "9^{9^{9}}" + "+1" * draws.randint(0, 20),
    lambda draws: f"10^{{{draws.randint(10**6, 10**12)}}}",
    lambda draws: f"{draws.randint(1, 9)}e{draws.randint(10**6, 10**12)}",
    lambda draws: "(" * 5 + "9^{99})" + "^{99})" * 4,
    lambda draws: f"{draws.randint(10**3, 10**9)}!",
    lambda draws: f"(({draws.randint(8, 12)}!)!)!",
    lambda draws: f"\\binom{{{draws.randint(10**5, 10**9)}}}{{{draws.randint(10**4, 10**5)}}}",
    lambda draws: str(draws.randint(1, 9)) * draws.choice((400, 5_000, 1_000_000)),
    # Forms that parsers or simplifiers get lost in.
    _nested("(", ")"),
    _nested("\\frac{1}{1+", "}"),
    _nested("\\sqrt{1+", "}"),
    _nested("\\sin(x+", ")"),
    lambda draws: f"(x+y+z+w)^{{{draws.randint(20, 300)}}}-(x+y+z)^{{{draws.randint(20, 300)}}}",
    lambda draws: "+".join(f"\\sqrt{{{draws.randint(2, 10**9)}}}" for _ in range(40)),
    lambda draws: "\\cdot".join(f"(x+{number})" for number in range(draws.randint(10, 120))),
    lambda draws: "x^x^x^x" + "^x" * draws.randint(0, 50),
    lambda draws: f"\\int_0^{{{draws.randint(1, 99)}}} e^{{x^{{{draws.randint(2, 99)}}}}} dx",
    lambda draws: f"\\sum_{{k=1}}^{{{draws.randint(10**6, 10**12)}}} \\frac{{1}}{{k^3}}",
    lambda draws: f"Integral(x**{draws.randint(2, 99)}*sin(x), x)",
    lambda draws: "1," * draws.choice((50, 1_000, 1_000_000)),
    lambda draws: "\\boxed{" * draws.choice((10, 1_400)),
    lambda draws: "\\begin{matrix}" + "1&" * draws.randint(10, 400) + "\\end{matrix}",
    # Text that is no text, and code.
    lambda draws: "".join(chr(draws.choice((0, 7, 27, 0xD800, 0xDFFF, 0x202E, 0x10FFFF))) for _ in range(20)),
    lambda draws: draws.choice(
        ("__import__('os').abort()", "exec('1/0')", "().__class__.__mro__", "lambda: 0", "{x for x in 1}")
    ),
    lambda draws: draws.choice(("", " ", "}", "{", "$", "\\", "\\boxed", "%", "NaN", "inf", "-", "=", "I don't know")),
    _torn_latex,
    _random_text,
)


def hostile_jobs(count: int, seed: int = 0) -> Iterator[ScoreJob]:
    """Responses with answers that are hostile or malformed, all different in kind or size; none of them is right."""
    draws = random.Random(seed)
    for number in range(count):
        answer = _BUILDERS[number % len(_BUILDERS)](draws)
        text = (f"So \\boxed{{{answer}}}.", f"Answer: {answer}", f"It is ${answer}$")[draws.randrange(3)]
        yield ScoreJob(f"hostile:{number}#0", Response(text=text, reference=draws.choice(REFERENCES)))


def ordinary_jobs(count: int, seed: int = 0) -> list[ScoreJob]:
    """Responses as models give them to competition problems; about half of them are right."""
    draws = random.Random(seed)
    jobs = []
    for number in range(count):
        a, b = draws.randint(1, 999), draws.randint(2, 99)
        reference, answers = draws.choice(
            (
                (f"{a}", (f"{a}", f"{a}.0", f"{a + 1}", f"\\text{{{a}}}")),
                (
                    f"\\frac{{{a}}}{{{b}}}",
                    (f"\\frac{{{a}}}{{{b}}}", f"{a}/{b}", f"\\dfrac{{{2 * a}}}{{{2 * b}}}", f"{b}/{a}"),
                ),
                (f"{a}+\\sqrt{{{b}}}", (f"\\sqrt{{{b}}}+{a}", f"{a}+{b}^{{1/2}}", f"{a}-\\sqrt{{{b}}}")),
                (f"x^2-{a * a}", (f"(x-{a})(x+{a})", f"x^2-{a * a}", f"x^2+{a}")),
                (f"({a},{b})", (f"({a}, {b})", f"({b},{a})")),
                (f"{a}\\pi", (f"{a}\\pi", f"{a}")),
                (f"{a * 1000:,}", (f"{a * 1000}", f"{a * 1000:,}", f"{a}")),
            )
        )
        thoughts = "Let us see. " * draws.randint(1, 200)
        jobs.append(
            ScoreJob(
                f"ordinary:{number}#0",
                Response(text=f"{thoughts}\\boxed{{{draws.choice(answers)}}}", reference=reference),
            )
        )
    return jobs


def grade(pool: RewardPool, jobs: list[ScoreJob]) -> tuple[list[Score | ScoreFailure], float, float]:
    """Outcomes, seconds, and seconds of processor time."""
    start, start_cpu = time.perf_counter(), _processor_s()
    outcomes = pool.submit(jobs).result()
    return outcomes, time.perf_counter() - start, _processor_s() - start_cpu


def grade_inline(jobs: list[ScoreJob]) -> tuple[list[float], float]:
    """Verdicts and seconds of processor time of math-verify as its documentation shows it, in this process."""
    from math_verify import parse, verify

    start = time.process_time()
    verdicts = [float(verify(parse(f"\\boxed{{{job.response.reference}}}"), parse(job.response.text))) for job in jobs]
    return verdicts, time.process_time() - start


def _processor_s() -> float:
    this = psutil.Process()
    times = [process.cpu_times() for process in (this, *this.children())]
    return sum(each.user + each.system for each in times)


def compare_hostile(count: int, config: RewardConfig) -> dict[str, float]:
    """What hostile answers cost, and whether the pool works afterwards."""
    with RewardPool(config, max_response_tokens=20_480) as pool:
        outcomes, seconds, processor_s = grade(pool, list(hostile_jobs(count)))
        replaced = pool.num_replaced
        again, _, _ = grade(pool, ordinary_jobs(100))
    scores = [outcome for outcome in outcomes if isinstance(outcome, Score)]
    return {
        "hostile_answers": count,
        "hostile_s": round(seconds, 1),
        "hostile_processor_s": round(processor_s, 1),
        "hostile_found_right": sum(score.score for score in scores),
        "hostile_given_up": sum(score.timed_out for score in scores),
        "hostile_failures": count - len(scores),
        "processes_replaced": replaced,
        "works_afterwards": all(isinstance(outcome, Score) for outcome in again),
    }


def compare_ordinary(jobs: list[ScoreJob]) -> dict[str, object]:
    """The pool with one process beside math-verify inline; both are warm."""
    with RewardPool(RewardConfig(terms={"correct": MathTerm()}, max_workers=1), max_response_tokens=20_480) as pool:
        grade(pool, ordinary_jobs(100, seed=1))
        pooled, _, pool_s = grade(pool, jobs)
    grade_inline(ordinary_jobs(100, seed=1))
    inline, inline_s = grade_inline(jobs)
    differences = [
        job.sample_id
        for job, outcome, verdict in zip(jobs, pooled, inline, strict=True)
        if not isinstance(outcome, Score) or outcome.score != verdict
    ]
    return {
        "ordinary_answers": len(jobs),
        "ordinary_right": sum(inline),
        "pool_answers_per_processor_s": round(len(jobs) / pool_s, 1),
        "inline_answers_per_processor_s": round(len(jobs) / inline_s, 1),
        "verdicts_that_differ": len(differences),
        "first_differences": differences[:5],
    }


def main() -> None:
    """Run both comparisons and print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hostile", type=int, default=1_000, help="hostile answers")
    parser.add_argument("--ordinary", type=int, default=2_000, help="ordinary answers")
    parser.add_argument("--timeout-s", type=float, default=5.0, help="reward.timeout_s")
    parser.add_argument("--workers", type=int, default=1, help="reward.max_workers, for the hostile answers")
    options = parser.parse_args()
    config = RewardConfig(terms={"correct": MathTerm()}, timeout_s=options.timeout_s, max_workers=options.workers)
    result = compare_hostile(options.hostile, config) | compare_ordinary(ordinary_jobs(options.ordinary))
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
