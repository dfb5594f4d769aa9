import ast
import inspect
import re
import sys

import pytest

from megatron_fipo.config.reward import ReasoningGymTerm
from megatron_fipo.rewards.answer_guard import EVALUATING_TASKS, may_be_scored
from megatron_fipo.rewards.literals import as_literal
from tests.unit.rewards.grading import grade, make_grader

reasoning_gym = pytest.importorskip("reasoning_gym", reason="an extra of the package")

PATTERN = r"(?s)<answer>(.*?)</answer>"


def problem(task, index=0, **parameters):
    entry = reasoning_gym.create_dataset(task, size=index + 1, seed=0, **parameters)[index]
    return {"task": task, "parameters": parameters, "entry": entry}


def result(metadata, response, finish_reason="stop", require_stop=True, **term):
    grader = make_grader({"correct": ReasoningGymTerm(**term)}, require_stop=require_stop)
    return grade(grader, response, metadata["entry"]["answer"], metadata=metadata, finish_reason=finish_reason)


@pytest.fixture(scope="module")
def score():
    return lambda *arguments, **term: result(*arguments, **term)["score"]


def test_the_tasks_own_scorer_decides(score):
    prompt = problem("chain_sum")
    assert score(prompt, prompt["entry"]["answer"]) == 1.0
    assert score(prompt, f" {prompt['entry']['answer']}.00\n") == 1.0
    assert score(prompt, str(int(prompt["entry"]["answer"]) + 1)) == 0.0


def test_no_credit_for_parts_unless_the_threshold_allows(score):
    prompt = problem("chain_sum")
    response = f"{prompt['entry']['answer']} or so"
    assert score(prompt, response) == 0.0
    assert score(prompt, response, score_threshold=0.1) == 1.0


def test_the_answer_is_searched_by_the_pattern(score):
    prompt = problem("chain_sum")
    assert (
        score(prompt, f"<answer>0</answer> <answer>{prompt['entry']['answer']}</answer>", answer_pattern=PATTERN) == 1.0
    )
    assert score(prompt, prompt["entry"]["answer"], answer_pattern=PATTERN) == 0.0


def test_a_right_answer_may_be_empty(score):
    prompt = next(p for p in (problem("ab", index) for index in range(200)) if p["entry"]["answer"] == "")
    assert score(prompt, "<answer></answer>", answer_pattern=PATTERN) == 1.0
    assert score(prompt, "none", answer_pattern=PATTERN) == 0.0


def test_an_unfinished_response(score):
    prompt = problem("chain_sum")
    assert score(prompt, prompt["entry"]["answer"], "length") == 0.0
    assert score(prompt, prompt["entry"]["answer"], "length", require_stop=False) == 1.0


def test_several_right_answers(score):
    prompt = problem("graph_color", num_colors=3)
    assert prompt["entry"]["answer"] is None
    colours = prompt["entry"]["metadata"]["possible_answer"]
    renamed = {1: 2, 2: 3, 3: 1}
    for mapping in (colours, {node: renamed[colour] for node, colour in colours.items()}):
        text = "{" + ", ".join(f'"{node}": {colour}' for node, colour in mapping.items()) + "}"
        assert score(prompt, text) == 1.0
    assert score(prompt, "{}") == 0.0


def test_the_scorer_knows_the_tasks_parameters(score):
    answer = "6*4 + 1 - 1"
    assert score(problem("puzzle24"), answer) == 1.0
    assert score(problem("puzzle24", max_value=5), answer) == 0.0


@pytest.mark.parametrize("response", ["x", "(((", "", "two times three"])
def test_an_answer_that_the_scorer_fails_on_is_wrong(score, response):
    prompt = problem("prime_factorization")
    assert score(prompt, prompt["entry"]["answer"]) == 1.0
    assert score(prompt, response) == 0.0


def test_a_scorer_that_fails_on_its_own_reference_is_an_error_of_the_row():
    broken = problem("prime_factorization") | {"entry": {"answer": "two times three", "metadata": {}}}
    failure = result(broken, "x")
    assert failure["failure"] == "reference"
    assert failure["problem"].startswith("the scorer of prime_factorization fails on its own reference answer (Value")


def test_a_prompt_that_no_task_made_is_an_error_of_the_row():
    grader = make_grader({"correct": ReasoningGymTerm()})
    problem = "there is no reasoning-gym problem behind the prompt"
    assert grade(grader, "x", "x") == {"failure": "reference", "term": "correct", "problem": problem}


class Incomparable(reasoning_gym.dataset.ProceduralDataset):
    """A task whose scorer knows no score."""

    def __init__(self, config):
        super().__init__(config, seed=config.seed, size=config.size)

    def __getitem__(self, idx):
        return {"question": "?", "answer": "!", "metadata": {}}

    def score_answer(self, answer, entry):
        return float("nan")


def test_a_score_that_is_no_number_is_an_error(score, monkeypatch):
    config_class = reasoning_gym.arithmetic.ChainSumConfig
    monkeypatch.setitem(reasoning_gym.factory.DATASETS, "incomparable", (Incomparable, config_class))
    failure = result(problem("incomparable"), "x")
    assert (failure["failure"], failure["problem"]) == ("reference", "the scorer of incomparable says nan")


def test_a_very_long_answer_is_wrong(score):
    prompt = problem("chain_sum")
    assert score(prompt, f"{prompt['entry']['answer']}.{'0' * 9_000}") == 1.0
    assert score(prompt, f"{prompt['entry']['answer']}.{'0' * 10_000}") == 0.0


def test_answers_are_the_same_without_outer_space():
    grader = make_grader({"correct": ReasoningGymTerm()})
    assert grader.same_answer("42 ", "42") and not grader.same_answer("42", "42.0")


@pytest.mark.parametrize("task", ["graph_color", "knights_knaves", "rotate_matrix", "sudoku"])
def test_a_task_finds_its_entry_as_it_made_it(score, task):
    """Numbers as keys, tuples and NumPy's text arrive in the grading process as what they were."""
    prompt = problem(task)
    assert ast.literal_eval(repr(as_literal(prompt))) == prompt
    reference = prompt["entry"]["answer"]
    if reference is not None:
        assert score(prompt, reference) == 1.0


def test_every_task_that_evaluates_answers_is_known():
    from reasoning_gym.factory import DATASETS

    found = set()
    for name, (dataset_class, _) in DATASETS.items():
        scorer = inspect.getsource(dataset_class.score_answer)
        own_parser = "def parse_expr" in inspect.getsource(inspect.getmodule(dataset_class))
        if re.search(r"\b(eval|exec|sympify)\((?!entry\b)", scorer) or "parse_expr(" in scorer and not own_parser:
            found.add(name)
    assert found == EVALUATING_TASKS


@pytest.mark.parametrize("task", sorted(EVALUATING_TASKS))
def test_right_answers_pass_the_guard(task):
    dataset = reasoning_gym.create_dataset(task, size=30, seed=1)
    for index in range(30):
        answer = dataset[index]["answer"]
        assert may_be_scored(task, answer) or "Integral(" in answer


HOSTILE = [
    "print(1)",
    "print (1)",
    "print\n(1)",
    "(print)(1)",
    "(print) (1)",
    "ｐｒｉｎｔ(1)",
    "[print][0](1)",
    "sin.__class__(1)",
    "(1).__class__",
    "1 .real(2)",
    "S('print(1)')",
    "x if print(1) else x",
    "(lambda: print(1))()",
    "f'{print(1)}'",
    "log(print(1))",
    "exec(x)",
    "open(x)",
]


@pytest.mark.parametrize("task", sorted(EVALUATING_TASKS))
@pytest.mark.parametrize("answer", HOSTILE)
def test_the_guard_refuses_calls(task, answer):
    assert not may_be_scored(task, answer)


@pytest.mark.parametrize("answer", ["x.args", "x . args", "x;y", "x[0]", "x:=1", "'x'", "х", "x # y", "x\\"])
def test_the_guard_refuses_what_no_expression_has(answer):
    assert not may_be_scored("simple_integration", answer)


@pytest.fixture
def calls_from_evaluated_text():
    """Names of the C functions that code without a file has called."""
    calls = []

    def record(frame, event, argument):
        if event == "c_call" and frame.f_code.co_filename == "<string>":
            calls.append(argument.__name__)

    sys.setprofile(record)
    yield calls
    sys.setprofile(None)


def test_calls_from_evaluated_text_are_seen(calls_from_evaluated_text):
    eval("abs(-1)")
    assert "abs" in calls_from_evaluated_text


@pytest.mark.parametrize("task", sorted(EVALUATING_TASKS))
def test_no_answer_is_run(score, task, calls_from_evaluated_text):
    prompt = problem(task)
    assert [score(prompt, answer) for answer in HOSTILE] == [0.0] * len(HOSTILE)
    assert not {"print", "exec", "open"} & set(calls_from_evaluated_text)


@pytest.mark.parametrize(
    ("task", "answer"),
    [
        ("simple_integration", "(x + 1)**2/2 - sqrt(x)*log(x, 2) + exp(-x) + C"),
        ("intermediate_integration", "asin(x) + theta_1*cosh(2.5*x) + 1e-3"),
        ("polynomial_multiplication", "2784*z**7 + 84592*z**6 - 2*x*y"),
        ("countdown", "69*14/3 + 18 - 76 + 3"),
        ("string_insertion", "['A', 'B']"),
        ("binary_matrix", "[[0, 1], [1, 0]]"),
        ("chain_sum", "print(1)"),
    ],
)
def test_ordinary_answers_pass_the_guard(task, answer):
    assert may_be_scored(task, answer)


def test_the_question_itself_is_no_antiderivative(score):
    prompt = problem("simple_integration")
    question = prompt["entry"]["metadata"]
    assert score(prompt, f"Integral({question['integrand']}, {question['variable']})") == 0.0
    assert score(prompt, prompt["entry"]["answer"]) == 1.0
