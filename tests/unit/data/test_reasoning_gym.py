import random

import pytest

from megatron_fipo.config.base import ConfigError
from megatron_fipo.config.data import PROBLEMS_PER_SEED, DataConfig, JsonlPrompts, ReasoningGymPrompts
from megatron_fipo.data.generate_problems import generate
from megatron_fipo.data.problem import UnusableRow
from megatron_fipo.data.reasoning_gym import ReasoningGymRows, _read_problem
from megatron_fipo.data.source import open_sources
from tests.tiny_models import byte_tokenizer

reasoning_gym = pytest.importorskip("reasoning_gym", reason="an extra of the package")

# isomorphic_strings draws from a set of letters: its problems depend on the interpreter's hash seed. bf prints.
MIXTURE = ReasoningGymPrompts(
    task="composite",
    size=12,
    seed=3,
    parameters={
        "datasets": [
            {"name": "isomorphic_strings", "config": {"max_string_length": 6}},
            {"name": "chain_sum", "weight": 1.5, "config": {"max_terms": 3, "size": 12}},
            {"name": "bf"},
        ]
    },
    question_template="Q: {question}\n{A}:",
)


def load(source):
    config = DataConfig(train=source, prompt_format="raw")
    (opened,) = open_sources(source, config, byte_tokenizer(), "data.train")
    return list(opened.prompts({}))


@pytest.fixture(scope="module")
def two_loads():
    """The mixture, loaded twice as by processes with other hash seeds."""
    with pytest.MonkeyPatch.context() as patch:
        # What a task prints then comes out at once, before the program's reply.
        patch.setenv("PYTHONUNBUFFERED", "1")
        patch.setenv("PYTHONHASHSEED", "1")
        first = load(MIXTURE)
        patch.setenv("PYTHONHASHSEED", "2")
        return first, load(MIXTURE)


def test_problems_are_the_same_in_every_process(two_loads):
    first, second = ([(prompt.id, prompt.text, prompt.answer) for prompt in loaded] for loaded in two_loads)
    assert first == second
    assert {prompt.metadata["task"] for prompt in two_loads[0]} == {"isomorphic_strings", "chain_sum", "bf"}


def test_prompt_answer_and_entry(two_loads):
    for index, prompt in enumerate(two_loads[0]):
        entry = prompt.metadata["entry"]
        assert prompt.id == f"composite-3:{index}"
        assert prompt.text == f"Q: {entry['question']}\n{{A}}:"
        assert prompt.token_ids.tolist() == byte_tokenizer()(prompt.text).input_ids
        assert prompt.answer == entry["answer"]
        expected = {"isomorphic_strings": {"max_string_length": 6}, "chain_sum": {"max_terms": 3}, "bf": {}}
        assert prompt.metadata["parameters"] == expected[prompt.metadata["task"]]


def test_the_seed_leaves_room_for_the_set_before(two_loads):
    # A mixture numbers its parts' seeds from its own seed on.
    dataset = reasoning_gym.create_dataset("chain_sum", size=12, seed=3 * PROBLEMS_PER_SEED + 2, max_terms=3)
    entries = [prompt.metadata["entry"] for prompt in two_loads[0]]
    questions = [entry["question"] if "expression" in entry["metadata"] else None for entry in entries]
    assert sum(question is not None for question in questions) > 1
    assert all(question in (None, dataset[index]["question"]) for index, question in enumerate(questions))


def test_problems_do_not_depend_on_the_global_generator():
    random.seed(1)
    first = generate("list_functions", 60, 0, {})
    random.seed(2)
    assert generate("list_functions", 60, 0, {}) == first


def test_an_unknown_task_is_an_error_with_close_names():
    with pytest.raises(ConfigError) as caught:
        ReasoningGymRows(ReasoningGymPrompts(task="chainsum"), "data.evaluation")
    message = str(caught.value)
    assert message.startswith("data.evaluation.task = chainsum: reasoning-gym has no such task; did you mean chain_sum")


def test_generated_problems_are_the_librarys_own():
    reply = generate("chain_sum", size=5, seed=PROBLEMS_PER_SEED, parameters={"max_terms": 3})
    dataset = reasoning_gym.create_dataset("chain_sum", size=5, seed=PROBLEMS_PER_SEED, max_terms=3)
    assert [problem["entry"] for problem in reply["problems"]] == [dataset[index] for index in range(5)]
    assert reply["problems"][0]["task"] == "chain_sum"
    assert reply["problems"][0]["parameters"] == {"max_terms": 3}


def test_sets_of_other_seeds_hold_other_problems():
    questions = [
        {problem["entry"]["question"] for problem in generate("chain_sum", 50, seed, {"min_terms": 5})["problems"]}
        for seed in (0, PROBLEMS_PER_SEED)
    ]
    assert not questions[0] & questions[1]


@pytest.mark.parametrize(
    ("task", "parameters", "problem"),
    [
        ("chain_sum", {"min_term": 2}, "min_term"),
        ("chain_sum", {"min_terms": 5, "max_terms": 2}, "max_terms must be >= min_terms"),
        ("chain_sum", {"min_terms": "many"}, "TypeError"),
        ("composite", {}, "at least one dataset"),
        ("composite", {"datasets": [{"name": "no_such_task"}]}, "no_such_task"),
    ],
)
def test_bad_parameters_are_told(task, parameters, problem):
    reply = generate(task, 2, 0, parameters)
    assert reply["field"] == "parameters" and problem in reply["rule"]
    expected = "its parameters are allow_negation, max_digits" if task == "chain_sum" else "parameters are datasets"
    assert expected in reply["way_out"]


def test_parameters_that_are_no_plain_values():
    source = ReasoningGymPrompts(task="chain_sum", parameters={"min_terms": {1, 2}})
    with pytest.raises(ConfigError, match=r"^data\.train\.parameters = .* must be made of text, numbers"):
        ReasoningGymRows(source, "data.train")


def test_a_problem_that_cannot_be_made_is_a_bad_row():
    # Most generators cannot fail on good parameters; this one runs out of attempts.
    parameters = {"min_numbers": 2, "max_numbers": 2, "min_value": 1, "max_value": 2, "min_target": 999}
    reply = generate("countdown", 2, 0, parameters)
    assert [list(problem) for problem in reply["problems"]] == [["error"], ["error"]]
    row = _read_problem(reply["problems"][1], ReasoningGymPrompts(task="countdown"))
    assert isinstance(row, UnusableRow) and row.reason == "broken"
    assert "the generator failed (ValueError" in row.detail


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"size": 0}, "size = 0: must lie in [1, 1048576]"),
        ({"size": 2**20 + 1}, "size = 1048577: must lie in"),
        ({"seed": -1}, "seed = -1: must lie in [0, 4095]"),
        ({"seed": 4096}, "seed = 4096: must lie in"),
        ({"parameters": {"seed": 5}}, "parameters.seed = 5: seed is not one of the task's own"),
        ({"parameters": {"size": 5}}, "parameters.size = 5: size is not one of the task's own"),
        ({"question_template": "{problem}"}, "question_template = {problem}: must contain {question}"),
    ],
)
def test_values_out_of_range(values, message):
    with pytest.raises(ConfigError) as caught:
        ReasoningGymPrompts(task="chain_sum", **values)
    assert str(caught.value).startswith(message)


def test_one_key_cannot_be_prompt_and_answer(tmp_path):
    with pytest.raises(ConfigError, match="^answer_field = text: must differ from prompt_field"):
        JsonlPrompts(path=tmp_path / "x.jsonl", prompt_field="text", answer_field="text")
