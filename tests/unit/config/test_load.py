import math
import re
from pathlib import Path
from typing import Any, Literal

import pytest

from megatron_fipo.config.base import ConfigError, config_class, require
from megatron_fipo.config.load import dump_config, load_config


@config_class
class Clip:
    low: float = 0.2
    """Lower bound."""

    high: float = 0.28
    """Upper bound."""

    def __post_init__(self) -> None:
        require(
            self.low <= self.high,
            field="low",
            value=self.low,
            rule=f"must not exceed high = {self.high}",
            way_out="swap them",
        )


@config_class
class Fast:
    type: Literal["fast"] = "fast"
    """Which variant."""

    clip: Clip = Clip()
    """Clipping."""

    speed: int = 1
    """How fast, in steps per second."""


@config_class
class Slow:
    type: Literal["slow"] = "slow"
    """Which variant."""

    clip: Clip = Clip(high=0.5)
    """Clipping."""

    patience_s: float = 10.0
    """How long to wait, in seconds."""


type Method = Fast | Slow


@config_class
class Optimizer:
    lr: float = 1e-3
    """Learning rate, per step."""

    betas: tuple[float, float] = (0.9, 0.95)
    """Momentum coefficients."""

    fused: bool = False
    """Whether one kernel does the whole step."""

    def __post_init__(self) -> None:
        # The field is written with its section's name here, and without it elsewhere: both must work.
        require(
            self.lr > 0,
            field="optimizer.lr",
            value=self.lr,
            rule="must be positive",
            way_out="use 1e-6 or more",
        )


@config_class
class Dataset:
    path: Path
    """Where the prompts lie."""

    weight: float = 1.0
    """Share."""


@config_class
class Root:
    steps: int
    """Number of steps to train for."""

    name: str = "run"
    """What the run is called."""

    method: Method = Slow(patience_s=7.0)
    """How to train."""

    optimizer: Optimizer = Optimizer()
    """The optimizer."""

    output: Path | None = None
    """Folder for results."""

    note: str | None = None
    """Free text."""

    layers: tuple[int, ...] = (1, 2)
    """Layers to look at."""

    stop_words: tuple[str, ...] | None = None
    """Words that end a response."""

    datasets: tuple[Dataset, ...] = ()
    """What to train on."""

    named: dict[str, Dataset] | None = None
    """Datasets by name."""

    retries: int | Literal["forever"] = 3
    """How often to try again."""

    engine_args: dict[str, Any] | None = None
    """Passed on as they are."""

    def __post_init__(self) -> None:
        require(
            self.steps % 2 == 0 or self.layers == (),
            field="steps",
            value=self.steps,
            rule="must be even while layers are looked at",
            way_out="use an even number or no layers",
        )


@pytest.fixture
def load(tmp_path):
    """Write a YAML text and load it as `Root`."""

    def load_text(text: str, *overrides: str) -> Root:
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return load_config(Root, path, overrides)

    return load_text


def refusal(load, text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(text, *overrides)
    return str(caught.value)


def test_yaml_fills_sections_and_leaves_defaults(load):
    config = load("steps: 4\nmethod: {type: fast, clip: {low: 0.1}}\noutput: results/a\nlayers: [3]\n")
    assert config == Root(
        steps=4, method=Fast(clip=Clip(low=0.1)), output=Path("results/a"), layers=(3,), optimizer=Optimizer()
    )


@pytest.mark.parametrize(
    ("written", "value"),
    [("1e-6", 1e-6), ("1E+2", 100.0), ("3", 3.0), ("1_000.5", 1000.5), (".5", 0.5), (".inf", math.inf)],
)
def test_numbers_are_read_as_numbers(load, written, value):
    assert load(f"steps: 2\noptimizer: {{lr: {written}}}").optimizer.lr == value
    assert load("steps: 2", "--optimizer.lr", written).optimizer.lr == value
    assert load(f"steps: 2\nengine_args: {{a: {written}}}").engine_args == {"a": value}


def test_scalars_follow_yaml_1_2(load):
    config = load("steps: 2\nengine_args: {time: 02:00:00, day: 2026-01-31, on: on, zeros: 010, hex: 0x10, none: ~}")
    assert config.engine_args == {
        "time": "02:00:00",
        "day": "2026-01-31",
        "on": "on",
        "zeros": "010",
        "hex": 16,
        "none": None,
    }


def test_anchors_and_merges_are_kept(load):
    config = load("steps: 2\nnamed:\n  a: &a {path: x, weight: 2}\n  b: {<<: *a, path: y}\n")
    assert config.named == {
        "a": Dataset(path=Path("x"), weight=2.0),
        "b": Dataset(path=Path("y"), weight=2.0),
    }


def test_overrides_change_single_fields_and_the_last_wins(load):
    config = load(
        "steps: 2\noptimizer: {lr: 0.5}",
        *("--optimizer.fused", "true", "--steps=6", "--steps", "8", "--layers", "5", "6"),
        *("--output", "out/b", "--optimizer.betas", "0.8", "0.9", "--stop_words", "7"),
    )
    assert config == Root(
        steps=8,
        optimizer=Optimizer(lr=0.5, fused=True, betas=(0.8, 0.9)),
        layers=(5, 6),
        output=Path("out/b"),
        stop_words=("7",),
    )


@pytest.mark.parametrize(
    ("words", "field", "value"),
    [
        (["--note", "null"], "note", None),
        (["--note", "None"], "note", None),
        (["--note", "'null'"], "note", "null"),
        (["--note", "12"], "note", "12"),
        (["--note", "a # b: [c"], "note", "a # b: [c"),
        (["--note", "#### (.*)"], "note", "#### (.*)"),
        (["--note="], "note", ""),
        (["--note=--x"], "note", "--x"),
        (["--optimizer.fused", "True"], "optimizer.fused", True),
        (["--layers", "[7, 8]"], "layers", (7, 8)),
        (["--layers"], "layers", ()),
        (["--stop-words", "</s>", "12"], "stop_words", ("</s>", "12")),
        (["--stop_words", "null"], "stop_words", None),
        (["--retries", "5"], "retries", 5),
        (["--retries", "forever"], "retries", "forever"),
        (["--engine_args", "{a: 1e-3, b: {c: x}}"], "engine_args", {"a": 0.001, "b": {"c": "x"}}),
        (["--engine_args.mem-fraction", "0.8"], "engine_args", {"mem-fraction": 0.8}),
        (["--optimizer", "{lr: 2}"], "optimizer.lr", 2.0),
        (["--optimizer.betas.1", "0.5"], "optimizer.betas", (0.9, 0.5)),
    ],
)
def test_command_line_values(load, words, field, value):
    config: Any = load("steps: 2\nnote: written\noptimizer: {betas: [0.9, 0.8]}", *words)
    for name in field.split("."):
        config = getattr(config, name)
    assert config == value
    assert type(config) is type(value)


def test_a_required_field_may_come_from_the_command_line(load):
    assert load("name: x", "--steps", "4") == Root(steps=4, name="x")


def test_a_check_over_two_fields_sees_the_final_values(load):
    assert load("steps: 3", "--layers", "[]") == Root(steps=3, layers=())
    assert load("steps: 2", "--method.clip.low", "0.6", "--method.clip.high", "0.7").method.clip == Clip(
        low=0.6, high=0.7
    )


def test_an_override_keeps_the_variant_of_the_file(load):
    config = load("steps: 2\nmethod: {type: fast, speed: 5}", "--method.clip.low", "0.05")
    assert config.method == Fast(speed=5, clip=Clip(low=0.05))


def test_an_override_of_a_section_left_out_starts_from_its_default(load):
    config = load("steps: 2", "--method.clip.low", "0.05")
    assert config.method == Slow(patience_s=7.0, clip=Clip(low=0.05, high=0.5))


def test_an_override_can_choose_another_variant(load):
    config = load("steps: 2", "--method.speed", "9", "--method.type", "fast")
    assert config.method == Fast(speed=9)
    text = refusal(load, "steps: 2\nmethod: {type: slow, patience_s: 1}", "--method.type", "fast")
    assert text.startswith("method.patience_s = 1: there is no such field in method; use one of type, clip")


def test_items_of_a_list_can_be_overridden(load):
    config = load("steps: 2\ndatasets: [{path: a}, {path: b}]", "--datasets.1.weight", "3")
    assert config.datasets == (Dataset(path=Path("a")), Dataset(path=Path("b"), weight=3.0))


def test_named_sections_can_be_overridden(load):
    config = load("steps: 2\nnamed: {x: {path: a}}", "--named.x.weight", "3", "--named.y.path", "b")
    assert config.named == {"x": Dataset(path=Path("a"), weight=3.0), "y": Dataset(path=Path("b"))}


@pytest.mark.parametrize(
    ("text", "overrides", "expected"),
    [
        ("stepz: 2", [], "stepz = 2: there is no such field in the configuration; did you mean steps?"),
        (
            "steps: 2\nlr: 1",
            [],
            "lr = 1: there is no such field in the configuration; did you mean optimizer.lr?",
        ),
        (
            "steps: 2\noptimizer: {zzz: 1}",
            [],
            "optimizer.zzz = 1: there is no such field in optimizer; use one of lr, betas, fused",
        ),
        (
            "steps: 2",
            ["--method.clip.hgh", "1"],
            "method.clip.hgh = 1: there is no such field in method.clip; did you mean high?",
        ),
        ("name: a", [], "steps = (not given): it is required; write it in the file or give --steps a value"),
        (
            "steps: 2\ndatasets: [{path: a}, {weight: 1}]",
            [],
            "datasets.1.path = (not given): it is required; write it in the file or give --datasets.1.path",
        ),
        (
            "steps: 2\nmethod: {speed: 3}",
            [],
            "method.type = (not given): it must say which variant this section is; use one of fast, slow",
        ),
        (
            "steps: 2\nmethod: {type: fats}",
            [],
            "method.type = fats: it must say which variant this section is; did you mean fast?",
        ),
        ("steps: 2\nmethod: {type: [fast]}", [], "method.type = ['fast']: it must say which variant"),
        (
            "steps: 2\noptimizer:",
            [],
            "optimizer = None: it must be a section; write its fields below it, or {} for its defaults",
        ),
        ("steps: true", [], "steps = True: it must be a number; write a whole number"),
        (
            "steps: 2\nretries: forevr",
            [],
            "retries = forevr: it must be a valid integer, unable to parse string as an integer "
            "or it must be 'forever'; did you mean forever?",
        ),
        ("steps: 2", ["--steps", "2", "3"], "steps = 2 3: it takes one value, not 2; write a whole number"),
        ("steps: 2", ["--steps"], "steps = '': it takes one value, not 0; write a whole number"),
        (
            "steps: 2",
            ["steps", "3"],
            "command line = steps: it belongs to no field; write --section.field before it",
        ),
        ("steps: 2", ["--steps.x", "3"], "steps.x = 3: steps has no part x; give --steps a whole value"),
        (
            "steps: 2",
            ["--datasets.0.weight", "3"],
            "datasets.0.weight = 3: datasets has no part 0; give --datasets",
        ),
    ],
)
def test_refusals_name_field_value_rule_and_way_out(load, text, overrides, expected):
    assert refusal(load, text, *overrides).startswith(expected)


@pytest.mark.parametrize(
    ("section", "field", "written"),
    [
        ("optimizer", "lr", "fast"),
        ("optimizer", "fused", "2"),
        ("optimizer", "betas", "[1, 2, 3]"),
        ("method.clip", "low", "[1]"),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_alike_from_both_sides(load, section, field, written):
    body = f"{{{field}: {written}}}"
    for key in reversed(section.split(".")):
        body = f"{{type: slow, {key}: {body}}}" if key == "clip" else f"{key}: {body}"
    from_yaml = refusal(load, f"steps: 2\n{body}")
    from_words = refusal(load, "steps: 2", f"--{section}.{field}", written)
    assert from_yaml.startswith(f"{section}.{field}")
    assert from_yaml == from_words


def test_a_fraction_is_no_whole_number(load):
    text = refusal(load, "steps: 2.5")
    assert text == (
        "steps = 2.5: it must be a valid integer, got a number with a fractional part; write a whole number"
    )


def test_the_item_of_a_list_is_named(load):
    assert refusal(load, "steps: 2\nlayers: [1, x]").startswith("layers.1 = [1, 'x']: it must be a valid integer")


@pytest.mark.parametrize(
    ("text", "overrides"),
    [("steps: 2\noptimizer: {lr: -1.0}", []), ("steps: 2", ["--optimizer.lr", "-1.0"])],
)
def test_a_sections_own_check_comes_through(load, text, overrides):
    assert refusal(load, text, *overrides) == "optimizer.lr = -1.0: must be positive; use 1e-6 or more"


@pytest.mark.parametrize(
    ("text", "overrides"),
    [
        ("steps: 2\nmethod: {type: fast, clip: {low: 0.9}}", []),
        ("steps: 2\nmethod: {type: fast}", ["--method.clip.low", "0.9"]),
    ],
)
def test_a_nested_check_is_named_from_the_root(load, text, overrides):
    expected = "method.clip.low = 0.9: must not exceed high = 0.28; swap them"
    assert refusal(load, text, *overrides) == expected


def test_a_check_in_an_item_of_a_list_is_named_from_the_root(tmp_path):
    @config_class
    class Several:
        clips: tuple[Clip, ...] = ()

    path = tmp_path / "several.yaml"
    path.write_text("clips: [{}, {low: 0.9}]")
    with pytest.raises(ConfigError, match=r"^clips\.1\.low = 0\.9: must not exceed"):
        load_config(Several, path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("steps: 2\nname: a\nsteps: 4\n", r"run\.yaml:3 = steps: this key is already on line 1; keep one"),
        ("optimizer:\n  lr: 1\n  lr: 2\n", r"run\.yaml:3 = lr: this key is already on line 2"),
        ("steps: [2\n", r"run\.yaml:2: it is not valid YAML"),
        ("steps: 2\n\tname: a\n", r"run\.yaml:2: it is not valid YAML"),
        ("steps: !!python/object:os.system {}\n", r"run\.yaml:1: it is not valid YAML"),
        ("steps: 2\n---\nsteps: 4\n", r"run\.yaml:2: it is not valid YAML"),
        ("steps: \x01\n", "it is not valid YAML"),
        ("- steps\n", "it must be a mapping of sections"),
        ("", "the file is empty"),
        ("# nothing but a comment\n", "the file is empty"),
    ],
)
def test_bad_files_are_refused_with_their_place(load, text, expected):
    assert re.search(expected, refusal(load, text))


def test_files_that_cannot_be_read_are_refused(tmp_path):
    latin = tmp_path / "latin.yaml"
    latin.write_bytes("name: é".encode("latin-1"))
    for path, expected in [
        (tmp_path / "absent.yaml", "there is no such file"),
        (tmp_path, "it cannot be read"),
        (latin, "byte 6 is not UTF-8"),
    ]:
        with pytest.raises(ConfigError) as caught:
            load_config(Root, path)
        assert str(path) in str(caught.value)
        assert expected in str(caught.value)


ROUND_TRIPS = [
    Root(steps=2),
    Root(steps=2, method=Fast(clip=Clip(low=1e-7, high=math.inf), speed=3), output=Path("a b/c"), layers=()),
    Root(
        steps=2,
        optimizer=Optimizer(lr=1e-6, betas=(0.0, 1e20), fused=True),
        stop_words=("yes", "1e-6", "", "~"),
    ),
    Root(steps=2, datasets=(Dataset(path=Path("a")), Dataset(path=Path("1"), weight=3)), retries="forever"),
    Root(steps=2, named={"x": Dataset(path=Path("null"))}, note="two\nlines: # and more\n"),
    Root(steps=2, engine_args={"a": [1, {"b": None}], "010": "010", "t": "02:00:00", "e": 1e-6, "s": "1e-6"}),
    Root(steps=2, note="π ≤ 4 <<", name="<<"),
]


@pytest.mark.parametrize("config", ROUND_TRIPS)
def test_what_is_dumped_loads_as_an_equal_configuration(load, config):
    assert load(dump_config(config)) == config


def test_the_dump_spells_out_every_field_in_order(load):
    text = dump_config(Root(steps=2))
    keys = re.findall(r"^(\w+):", text, flags=re.MULTILINE)
    assert keys == list(Root.__annotations__)
    assert "method:\n  type: slow\n  clip:\n    low: 0.2\n    high: 0.5\n  patience_s: 7.0\n" in text


def test_help_shows_field_docstrings_and_the_files_values(load, capsys):
    with pytest.raises(SystemExit) as caught:
        load("steps: 42\nmethod: {type: fast, speed: 5}", "--name", "given", "--help")
    assert caught.value.code == 0
    shown = " ".join(re.sub(r"[│╭╮╰╯─]", " ", capsys.readouterr().out).split())
    assert "--steps INT Number of steps to train for. (default: 42)" in shown
    assert "--method.speed INT How fast, in steps per second. (default: 5)" in shown
    assert "--name STR What the run is called. (default: given)" in shown
    assert "--method.patience_s" not in shown


def test_a_value_that_does_not_fit_its_yaml_tag_is_refused(load):
    with pytest.raises(ConfigError, match="does not fit its tag"):
        load("steps: !!int abc")


@config_class
class Wide:
    """What `Narrow` has, and more."""

    clip: Clip = Clip()
    """Clipping."""

    method: Method = Fast()
    """How."""

    optimizer: Optimizer = Optimizer()
    """Optimizer."""


@config_class
class NarrowClip:
    high: float = 0.28
    """Upper bound."""


@config_class
class Narrow:
    """What another command needs."""

    clip: NarrowClip = NarrowClip()
    """Clipping."""

    method: Method = Fast()
    """How."""

    size: int = 1
    """What `Wide` has not."""


def test_fields_of_the_wider_section_alone_are_left_out(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("clip: {low: 0.1, high: 0.4}\noptimizer: {lr: 1.0}\nmethod: {type: slow, patience_s: 3}\nsize: 2\n")
    config = load_config(Narrow, path, wider=Wide)
    assert config == Narrow(clip=NarrowClip(high=0.4), method=Slow(patience_s=3.0), size=2)
    with pytest.raises(ConfigError, match="optimizer = .*: there is no such field in the configuration"):
        load_config(Narrow, path)


@pytest.mark.parametrize(
    ("text", "overrides", "field"),
    [
        ("clip: {hihg: 1}", [], "clip.hihg"),
        ("sise: 1", [], "sise"),
        # On the command line such a field would be meant.
        ("size: 1", ["--optimizer.lr", "1"], "optimizer"),
    ],
)
def test_what_neither_section_has_is_still_refused(tmp_path, text, overrides, field):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(Narrow, path, overrides, wider=Wide)
    assert caught.value.field == field
