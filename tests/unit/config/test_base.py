import dataclasses
import math
import pickle
import subprocess
import sys

import pytest

from megatron_fipo.config.base import ABSENT, ConfigError, config_class, require


@config_class
class Section:
    size: int
    rate: float = 1.0

    def __post_init__(self) -> None:
        require(self.rate > 0, field="rate", value=self.rate, rule="must be positive", way_out="use 1e-6 or more")


def test_a_section_is_frozen_keyword_only_and_has_slots():
    section = Section(size=1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        section.size = 2  # type: ignore[misc]
    with pytest.raises(TypeError, match="positional"):
        Section(1)  # type: ignore[misc]
    assert not hasattr(section, "__dict__")


def test_sections_compare_and_hash_by_value():
    assert Section(size=1) == Section(size=1)
    assert len({Section(size=1), Section(size=1), Section(size=2)}) == 2


def test_checks_run_in_python_and_in_replace():
    with pytest.raises(ConfigError) as caught:
        dataclasses.replace(Section(size=1), rate=-2.0)
    assert str(caught.value) == "rate = -2.0: must be positive; use 1e-6 or more"


def test_a_positive_condition_also_refuses_nan():
    with pytest.raises(ConfigError, match="rate = nan: must be positive"):
        Section(size=1, rate=math.nan)


def test_require_lets_a_good_value_pass():
    require(True, field="rate", value=1.0, rule="must be positive", way_out="use 1e-6 or more")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("word", "a.b = word: rule; way out"),
        ("", "a.b = '': rule; way out"),
        (None, "a.b = None: rule; way out"),
        (ABSENT, "a.b = (not given): rule; way out"),
        ((1, 2), "a.b = (1, 2): rule; way out"),
    ],
)
def test_the_text_names_field_value_rule_and_way_out(value, text):
    assert str(ConfigError("a.b", value, "rule", "way out")) == text


@pytest.mark.parametrize(
    ("field", "path", "seen"),
    [
        ("rate", (), "rate"),
        ("rate", ("optimizer",), "optimizer.rate"),
        ("optimizer.rate", ("optimizer",), "optimizer.rate"),
        ("influence.clip", ("algorithm", "influence"), "algorithm.influence.clip"),
        ("algorithm.influence.clip", ("algorithm", "influence"), "algorithm.influence.clip"),
        ("clip", ("algorithm", "influence"), "algorithm.influence.clip"),
        ("parallelism", ("parallelism",), "parallelism"),
    ],
)
def test_within_puts_the_path_in_front_once(field, path, seen):
    error = ConfigError(field, 1, "rule", "way out").within(path)
    assert (error.field, error.value, error.rule, error.way_out) == (seen, 1, "rule", "way out")


def test_an_error_survives_the_way_between_processes():
    error = pickle.loads(pickle.dumps(ConfigError("a.b", ABSENT, "rule", "way out")))
    assert str(error) == "a.b = (not given): rule; way out"
    assert error.value is ABSENT


def test_the_schema_needs_the_standard_library_alone():
    code = (
        "import sys, megatron_fipo.config.base\n"
        "third_party = {'pydantic', 'tyro', 'yaml', 'numpy', 'torch'} & set(sys.modules)\n"
        "print(sorted(third_party))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
