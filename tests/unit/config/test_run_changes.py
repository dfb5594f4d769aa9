"""Which differences a resumed run may have."""

from typing import Any

import pytest

from megatron_fipo.config import run_changes
from megatron_fipo.config.annotations import fields_of, sections_in
from megatron_fipo.config.base import ConfigError
from megatron_fipo.config.run import RunConfig
from megatron_fipo.config.run_changes import Change, changes_between, check_changes, require_same_sources, rule_of

BEFORE = {"seed": 1, "optimizer": {"learning_rate": 1e-6, "betas": [1, 2]}, "reward": {"terms": {}}, "old": 3}


def test_every_field_that_differs_is_found() -> None:
    now = {"seed": 1, "optimizer": {"learning_rate": 2e-6, "betas": [1, 2]}, "reward": {"terms": {"a": 1}}, "new": None}
    assert changes_between(BEFORE, now) == [
        Change("optimizer.learning_rate", 1e-6, 2e-6, "ask"),
        Change("reward.terms.a", "(not there)", 1, "ask"),
        Change("new", "(not there)", None, "ask"),
        Change("reward.terms", {}, "(not there)", "ask"),
        Change("old", 3, "(not there)", "ask"),
    ]
    assert str(changes_between(BEFORE, now)[0]) == "optimizer.learning_rate: 1e-06 → 2e-06"
    assert changes_between(BEFORE, BEFORE) == []


@pytest.mark.parametrize(
    ("field", "rule"),
    [
        ("parallelism.context_parallel_size", "free"),
        ("checkpoint.every_steps", "free"),
        ("rollout.temperature", "ask"),
        ("rollout.sglang.urls", "free"),
        ("model.dtype", "keep"),
        ("data.train.path", "free"),
        ("data.train.2.path", "free"),
        ("data.evaluation.path", "free"),
        ("data.evaluation.0.prompt_field", "ask"),
        ("data.train.weight", "keep"),
        ("data.shuffle", "keep"),
        ("data.max_prompt_tokens", "keep"),
        ("parallelism_of_thought", "ask"),
    ],
)
def test_a_field_has_the_rule_of_its_section(field: str, rule: str) -> None:
    assert rule_of(field) == rule


def test_every_rule_is_of_a_field() -> None:
    for name in run_changes._RULES:
        section: Any = RunConfig
        for key in name.split("."):
            fields = fields_of(section)
            assert key in fields, name
            section = next(iter(sections_in(fields[key][0])), None)


def test_every_section_has_a_rule_or_is_asked_for() -> None:
    asked = {"algorithm", "evaluation", "model", "optimizer", "reward", "rollout", "recorded_rollouts"}
    assert {name for name in fields_of(RunConfig) if rule_of(name) == "ask"} == asked


def test_what_is_accepted_is_no_change() -> None:
    assert changes_between({"checkpoint": {"accept_changes": ["a"]}}, {"checkpoint": {"accept_changes": []}}) == []


KNOWN = ["optimizer.learning_rate", "optimizer.schedule", "seed", "algorithm.type", "num_steps", "reward.terms"]


def change(field: str) -> Change:
    return Change(field, "one", "two", rule_of(field))


def test_what_is_refused_names_the_way_out() -> None:
    check_changes([change("num_steps"), change("optimizer.learning_rate")], ["optimizer"], KNOWN)
    check_changes([change("optimizer.learning_rate")], ["optimizer.learning_rate"], KNOWN)
    with pytest.raises(ConfigError, match="seed = two: must stay one.*choose another output_dir"):
        check_changes([change("optimizer.learning_rate"), change("seed")], ["seed", "optimizer"], KNOWN)
    with pytest.raises(ConfigError) as refused:
        check_changes([change("algorithm.type"), change("num_steps"), change("reward.terms")], ["optimizer"], KNOWN)
    text = str(refused.value)
    assert text.startswith("algorithm.type = two: the run in output_dir has one")
    assert '--checkpoint.accept_changes "[algorithm.type, reward.terms]"' in text
    with pytest.raises(ConfigError):
        check_changes([change("optimizer.learning_rate")], ["optimizer.learning"], KNOWN)
    with pytest.raises(ConfigError, match=r"checkpoint.accept_changes = optimiser.lr: must name fields or sections"):
        check_changes([], ["optimiser.lr"], KNOWN)


def test_the_fields_of_a_list_are_told_one_by_one() -> None:
    before, now = ({"data": {"train": [{"path": "a"}, {"path": path, "weight": 1.0}]}} for path in ("b", "c"))
    assert changes_between(before, now) == [Change("data.train.1.path", "b", "c", "free")]


def test_what_makes_other_prompts_is_refused_at_once_although_it_was_accepted() -> None:
    with pytest.raises(ConfigError) as refused:
        check_changes([change("data.shuffle")], ["data.shuffle"], [*KNOWN, "data.shuffle"])
    assert str(refused.value) == (
        "data.shuffle = two: must stay one, as the run in output_dir has it, because a run that goes on keeps its "
        "prompts and their order; restore it, or choose another output_dir for a new run"
    )


def test_sources_keep_their_names() -> None:
    require_same_sources(["a", "b"], ["a", "b"])
    with pytest.raises(ConfigError, match=r"^data.train.1.name = c: must stay b, .*; set data.train.1.name to b; what"):
        require_same_sources(["a", "b"], ["a", "c"])
    with pytest.raises(ConfigError, match=r"^data.train.name = c: must stay a, "):
        require_same_sources(["a"], ["c"])
    with pytest.raises(ConfigError, match=r"^data.train = a: must stay the sources a, b, in this order, because a"):
        require_same_sources(["a", "b"], ["a"])
    with pytest.raises(ConfigError, match=r"^data.train = b, a: must stay the sources a, b, in this order, .*; rest"):
        require_same_sources(["a", "b"], ["b", "a"])
