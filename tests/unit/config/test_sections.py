"""Every section: its fields are read, the shipped files load, and every check says field, value, rule and way out."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest

from megatron_fipo.config.algorithm import FipoConfig
from megatron_fipo.config.base import ConfigError
from megatron_fipo.config.baselines import DapoConfig, GrpoConfig
from megatron_fipo.config.data import DataConfig, JsonlPrompts, ReasoningGymPrompts
from megatron_fipo.config.evaluate import EvaluateConfig, EvaluationData
from megatron_fipo.config.evaluation import EvaluationConfig
from megatron_fipo.config.load import dump_config, load_config
from megatron_fipo.config.metrics import MetricsConfig
from megatron_fipo.config.model import ModelConfig
from megatron_fipo.config.optimizer import OptimizerConfig
from megatron_fipo.config.parallelism import ParallelismConfig
from megatron_fipo.config.reward import (
    ExactMatchTerm,
    MathTerm,
    NumericTerm,
    OverlongTerm,
    PythonTerm,
    ReasoningGymTerm,
    RewardConfig,
)
from megatron_fipo.config.rollout import RolloutConfig
from megatron_fipo.config.run import RunConfig
from megatron_fipo.config.safeguards import SafeguardsConfig
from megatron_fipo.config.sglang import SglangConfig
from megatron_fipo.config.weight_sync import WeightSyncConfig
from tests.unit.config.field_reads import read_fields

ROOT = Path(__file__).parents[3]
PACKAGE = ROOT / "megatron_fipo"
EXAMPLES = sorted((ROOT / "examples").glob("**/*.yaml"))


def sections_below(cls: type, found: list[type] | None = None) -> list[type]:
    found = [] if found is None else found
    found.append(cls)
    for annotation in get_type_hints(cls).values():
        for member in types_in(annotation):
            if dataclasses.is_dataclass(member) and member not in found:
                sections_below(member, found)
    return found


def types_in(annotation: Any) -> Iterator[Any]:
    """The type and all that it is made of."""
    yield annotation
    for part in get_args(annotation):
        yield from types_in(part)


def unread(sections: list[type], reads: set[tuple[str, str]]) -> set[str]:
    """Fields of the sections that nothing reads, where there is anything to choose."""
    read_names: dict[str, set[str]] = {}
    for owner, field in reads:
        read_names.setdefault(field, set()).add(owner)
    missing = set()
    for section in sections:
        hints = get_type_hints(section)
        lineage = {base.__name__ for base in section.__mro__}
        for field in dataclasses.fields(section):
            one_choice = get_origin(hints[field.name]) is Literal and len(get_args(hints[field.name])) == 1
            if not one_choice and not read_names.get(field.name, set()) & lineage:
                missing.add(f"{section.__name__}.{field.name}")
    return missing


def test_every_field_is_read_outside_the_configuration() -> None:
    sections = sections_below(EvaluateConfig, sections_below(RunConfig))
    assert {ReasoningGymPrompts, GrpoConfig, WeightSyncConfig} <= set(sections)
    bases = [base for section in sections for base in section.__mro__[1:] if dataclasses.is_dataclass(base)]
    reads = read_fields(sorted(PACKAGE.rglob("*.py")), PACKAGE / "config", [*sections, *bases])
    assert unread(sections, reads) == set()


@dataclasses.dataclass
class Inner:
    path: str
    size: int
    kind: Literal["only"]
    depth: int


@dataclasses.dataclass
class Outer:
    inner: Inner
    path: str
    speed: float
    tone: int
    hue: int


READER = """
class Holder:
    config: Outer
    path: Path

    def __init__(self, outer: Outer | None) -> None:
        self.outer, self.other = outer, 1

    def read(self, size) -> None:
        mine = self.outer.inner
        print(mine.size, self.path, size, Other().depth)
        self.outer.speed = 3
        for name in ("tone",):
            print(getattr(self.config, name))
"""


def test_an_unread_field_is_noticed(tmp_path: Path) -> None:
    source = tmp_path / "reader.py"
    source.write_text("class Outer:\n    inner: Inner\n    path: str\n" + READER)
    reads = read_fields([source], tmp_path / "config", [Outer, Inner])
    assert unread([Outer, Inner], reads) == {"Outer.path", "Outer.speed", "Outer.hue", "Inner.path", "Inner.depth"}


@pytest.mark.parametrize("path", EXAMPLES, ids=[str(path.relative_to(ROOT)) for path in EXAMPLES])
def test_shipped_files_load_and_come_back_from_their_dump(path: Path, tmp_path: Path) -> None:
    config = load_config(RunConfig, path)
    dumped = tmp_path / "config.yaml"
    dumped.write_text(dump_config(config))
    assert load_config(RunConfig, dumped) == config


def run_config(**changes: Any) -> RunConfig:
    values = {
        "output_dir": Path("out"),
        "num_steps": 2,
        "model": ModelConfig(path=Path("model")),
        "data": DataConfig(train=JsonlPrompts(path=Path("train.jsonl")), max_prompt_tokens=100),
        "algorithm": FipoConfig(updates_per_rollout=4),
        "rollout": RolloutConfig(num_prompts_per_step=8, group_size=4, max_response_tokens=156),
        "parallelism": ParallelismConfig(max_tokens_per_micro_batch=256),
    }
    return RunConfig(**{**values, **changes})


def evaluate_config(**changes: Any) -> EvaluateConfig:
    values = {
        "output_dir": Path("out"),
        "model": ModelConfig(path=Path("model")),
        "data": EvaluationData(evaluation=JsonlPrompts(path=Path("held_out.jsonl")), max_prompt_tokens=100),
        "rollout": RolloutConfig(max_response_tokens=256),
    }
    return EvaluateConfig(**{**values, **changes})


def jsonl(**values: Any) -> JsonlPrompts:
    return JsonlPrompts(path=Path("a.jsonl"), **values)


def gym(**values: Any) -> ReasoningGymPrompts:
    return ReasoningGymPrompts(task="chain_sum", **values)


def data(**values: Any) -> DataConfig:
    return DataConfig(train=jsonl(), **values)


def model(**values: Any) -> ModelConfig:
    return ModelConfig(path=Path("m"), **values)


ACCEPTED: list[tuple[Callable[..., Any], dict[str, Any]]] = [
    (run_config, {}),
    (run_config, {"model": model(context_length=256)}),
    (run_config, {"mode": "rollout_only"}),
    (run_config, {"safeguards": SafeguardsConfig(max_log_ratio=math.inf, on_exploding_ratio="stop", dump_step=9)}),
    (run_config, {"mode": "train_only", "recorded_rollouts": Path("r"), "data": None}),
    # Its groups come from the recording.
    (
        run_config,
        {"mode": "train_only", "recorded_rollouts": Path("r"), "algorithm": FipoConfig(updates_per_rollout=3)},
    ),
    (
        run_config,
        {"mode": "train_only", "recorded_rollouts": Path("r"), "rollout": RolloutConfig(group_size=1), "data": None},
    ),
    (ParallelismConfig, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    (ParallelismConfig, {"pipeline_model_parallel_size": 4, "virtual_pipeline_model_parallel_size": 2}),
    (ParallelismConfig, {"pipeline_model_parallel_size": 2, "batch_p2p_comm": True}),
    (
        ParallelismConfig,
        {"pipeline_model_parallel_size": 4, "virtual_pipeline_model_parallel_size": 2, "batch_p2p_comm": True},
    ),
    (RolloutConfig, {"top_p": 1e-9}),
    (SafeguardsConfig, {"max_log_ratio": math.inf, "max_reward_drop": math.inf, "min_length_fraction": 0.0}),
    (OptimizerConfig, {"warmup_steps": 0, "weight_decay": 0.0, "adam_beta1": 0.0, "max_grad_norm": math.inf}),
    (OptimizerConfig, {"schedule": "cosine", "decay_steps": 11}),
    (OptimizerConfig, {"min_learning_rate": 1e-6}),
    (data, {"prompt_format": "raw"}),
    (gym, {"size": 2**20, "seed": 4095, "question_template": "Q: {question}\nA:"}),
    (ReasoningGymTerm, {"answer_pattern": "#(\\d)", "score_threshold": 1.0}),
    (NumericTerm, {"relative_tolerance": 0.0, "weight": -1.0}),
    (OverlongTerm, {"buffer_tokens": 1}),
    (RewardConfig, {"timeout_s": 0.1, "max_workers": 1, "worker_memory_gib": 0.5}),
]


@pytest.mark.parametrize(("build", "values"), ACCEPTED)
def test_values_at_their_limits_are_accepted(build: Callable[..., Any], values: dict[str, Any]) -> None:
    build(**values)


PATTERNS = [(ExactMatchTerm, "answer_pattern", "answer"), (gym, "question_pattern", "question")]
REFUSED: list[tuple[Callable[..., Any], dict[str, Any], str]] = [
    (run_config, {"num_steps": 0}, "num_steps = 0: must be at least 1; give the number of steps"),
    (
        run_config,
        {"mode": "train_only"},
        'recorded_rollouts = None: must be given with mode = "train_only" and only then (mode is "train_only"); '
        "name the folder that a rollout_only run wrote, or set mode",
    ),
    (
        run_config,
        {
            "rollout": RolloutConfig(engine="sglang", colocated=True),
            "weight_sync": WeightSyncConfig(pause="retract"),
        },
        'weight_sync.pause = retract: must be "abort" with rollout.colocated: servers give back the cache that running '
        'requests need; leave it at "auto"',
    ),
    (
        run_config,
        {
            "rollout": RolloutConfig(engine="sglang", colocated=True),
            "weight_sync": WeightSyncConfig(transport="distributed"),
        },
        'weight_sync.transport = distributed: must not be "distributed" with rollout.colocated: NCCL takes no two '
        'ranks on one GPU; leave it at "auto"',
    ),
    (
        run_config,
        {"recorded_rollouts": Path("r")},
        'recorded_rollouts = r: must be given with mode = "train_only" and only then (mode is "train"); '
        "name the folder that a rollout_only run wrote, or set mode",
    ),
    (
        run_config,
        {"algorithm": FipoConfig(updates_per_rollout=3)},
        "rollout.num_prompts_per_step = 8: must be a multiple of algorithm.updates_per_rollout = 3; change either, "
        "so that every mini-batch has the same number of groups",
    ),
    (
        run_config,
        {"rollout": RolloutConfig(num_prompts_per_step=8, group_size=1, max_response_tokens=156)},
        "rollout.group_size = 1: must be at least 2: advantages are relative to the group; 8 or 16 are good values",
    ),
    (
        run_config,
        {"data": None},
        'data = None: must be given with mode = "train"; name the training prompts under data.train',
    ),
    (
        run_config,
        {"data": None, "mode": "rollout_only"},
        'data = None: must be given with mode = "rollout_only"; name the training prompts under data.train',
    ),
    (
        run_config,
        {"parallelism": ParallelismConfig(max_tokens_per_micro_batch=255)},
        "parallelism.max_tokens_per_micro_batch = 255: must hold the longest sequence: data.max_prompt_tokens = 100 + "
        "rollout.max_response_tokens = 156, padded to 256; raise it to at least 256, or shorten prompts or responses",
    ),
    (
        run_config,
        # Packs are padded to lcm(2 · 3, 1 · 3) = 6 tokens.
        {"parallelism": ParallelismConfig(max_tokens_per_micro_batch=256, context_parallel_size=3)},
        "parallelism.max_tokens_per_micro_batch = 256: must hold the longest sequence: data.max_prompt_tokens = 100 + "
        "rollout.max_response_tokens = 156, padded to 258; raise it to at least 258, or shorten prompts or responses",
    ),
    (
        run_config,
        {"model": model(context_length=255)},
        "model.context_length = 255: must hold the longest sequence of 256 tokens; raise it to at least 256, or "
        "shorten prompts or responses",
    ),
    *(
        (ParallelismConfig, {field: 0}, f"{field} = 0: must be at least 1; set it to 1 or more")
        for field in (
            "tensor_model_parallel_size",
            "pipeline_model_parallel_size",
            "context_parallel_size",
            "expert_model_parallel_size",
            "expert_tensor_parallel_size",
            "max_tokens_per_micro_batch",
        )
    ),
    (
        ParallelismConfig,
        {"activation_recompute": "half"},
        'activation_recompute = half: must be "none", "selective" or "full"; choose one of the three',
    ),
    (
        ParallelismConfig,
        {"sequence_parallel": True},
        "sequence_parallel = True: needs tensor_model_parallel_size > 1; set sequence_parallel to false, or raise "
        "tensor_model_parallel_size",
    ),
    (
        ParallelismConfig,
        {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 1},
        "virtual_pipeline_model_parallel_size = 1: must be at least 2, or null; set it to null for the plain schedule",
    ),
    (
        ParallelismConfig,
        {"virtual_pipeline_model_parallel_size": 2},
        "virtual_pipeline_model_parallel_size = 2: needs pipeline_model_parallel_size >= 2 (it is 1); raise "
        "pipeline_model_parallel_size or set this to null",
    ),
    (
        ParallelismConfig,
        {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2, "batch_p2p_comm": True},
        "batch_p2p_comm = True: gives silently wrong gradients with pipeline_model_parallel_size = 2 and virtual "
        "stages: both directions join the same two ranks in one batch (megatron-core); set batch_p2p_comm to false",
    ),
    *(
        (RolloutConfig, {field: 0}, f"{field} = 0: must be at least 1; set it to 1 or more")
        for field in (
            "num_prompts_per_step",
            "group_size",
            "max_response_tokens",
            "max_generation_rounds",
            "max_batch_sequences",
        )
    ),
    *(
        (
            RolloutConfig,
            {"temperature": value},
            f"temperature = {value}: must be finite and greater than 0 (log-probabilities of a greedy policy do not "
            "exist); 1.0 is the usual value",
        )
        for value in (0.0, -1.0, math.inf, math.nan)
    ),
    *(
        (RolloutConfig, {"top_p": value}, f"top_p = {value}: must lie in (0, 1]; 1.0 is the usual value")
        for value in (0.0, 1.1, math.nan)
    ),
    (RolloutConfig, {"policy_lag": -1}, "policy_lag = -1: must not be negative; 0 is synchronous"),
    (
        RolloutConfig,
        {"over_sampling": 0.5},
        "over_sampling = 0.5: must lie in [1, 16]; 1 draws as many prompts as are missing",
    ),
    (
        RolloutConfig,
        {"carry_over_max_lag": -1},
        "carry_over_max_lag = -1: must not be negative; 0 discards surplus groups",
    ),
    *(
        (
            RolloutConfig,
            {field: value},
            f"{field} = {value}: must be {without} with the embedded engine, which shares the trainer's processes; set "
            f'it to {without}, or rollout.engine to "sglang"',
        )
        for field, value, without in (
            ("policy_lag", 1, "0"),
            ("partial_rollouts", True, "false"),
            ("replay_routing", True, "false"),
            ("colocated", True, "false"),
        )
    ),
    (
        RolloutConfig,
        {"engine": "sglang", "colocated": True, "policy_lag": 1},
        "policy_lag = 1: must be 0 where servers share the trainer's GPUs and so generate in turn with it; set it to "
        "0, set partial_rollouts, or give the servers GPUs of their own",
    ),
    (
        RolloutConfig,
        {"engine": "sglang", "partial_rollouts": True},
        "partial_rollouts = True: needs policy_lag of at least 1: the first tokens are of older weights than the last; "
        "raise policy_lag",
    ),
    (
        RolloutConfig,
        {"engine": "sglang", "replay_routing": True, "sglang": SglangConfig(use_router=True)},
        "sglang.use_router = True: must be false with replay_routing: the router does not pass on that experts are "
        "asked for; drop either",
    ),
    *(
        (SglangConfig, {field: 0}, f"{field} = 0: must be at least 1; set it to 1 or more")
        for field in ("servers_per_node", "tensor_parallel_size", "nodes_per_server", "max_attempts")
    ),
    *(
        (SglangConfig, {field: -1}, f"{field} = -1: must not be negative; set it to 0 or more")
        for field in ("num_agents", "max_restarts")
    ),
    *(
        (SglangConfig, {field: value}, f"{field} = {value}: must be finite and greater than 0; give seconds")
        for field in ("start_timeout_s", "request_timeout_s")
        for value in (0.0, math.inf, math.nan)
    ),
    *(
        (
            SglangConfig,
            {"urls": (url,)},
            f"urls = {url}: must be an address that begins with http:// or https://; write it as http://HOST:PORT",
        )
        for url in ("10.0.0.5:30000", "http://", "tcp://10.0.0.5:30000")
    ),
    (
        SglangConfig,
        {"urls": ("http://10.0.0.5:30000",), "num_agents": 2},
        "num_agents = 2: must be 0 with urls: servers that run already have no agents; drop either",
    ),
    (
        SglangConfig,
        {"nodes_per_server": 2, "num_agents": 2, "servers_per_node": 2, "tensor_parallel_size": 16},
        "servers_per_node = 2: must be 1 where one server takes 2 nodes; set it to 1",
    ),
    *(
        (
            SglangConfig,
            {"nodes_per_server": 2, "num_agents": agents, "tensor_parallel_size": 16},
            f"nodes_per_server = 2: must divide num_agents = {agents}; set num_agents to a multiple of it",
        )
        for agents in (0, 3)
    ),
    (
        SglangConfig,
        {"nodes_per_server": 2, "num_agents": 2, "tensor_parallel_size": 3},
        "tensor_parallel_size = 3: must be a multiple of nodes_per_server = 2; spread the ranks evenly",
    ),
    *(
        (
            WeightSyncConfig,
            {"timeout_s": value},
            f"timeout_s = {value}: must lie in (0, 1200]: ranks wait that long in a collective, whose own limit is 30 "
            "minutes; give seconds",
        )
        for value in (0.0, 1201.0, math.nan)
    ),
    (
        WeightSyncConfig,
        {"canary_tolerance": math.nan},
        "canary_tolerance = nan: must be finite and greater than 0, or null; set it to null",
    ),
    (WeightSyncConfig, {"checksum_every": -1}, "checksum_every = -1: must not be negative; 0 compares none"),
    *(
        (
            OptimizerConfig,
            {field: value},
            f"{field} = {value}: must be positive and finite; choose a small positive number, such as 1e-6",
        )
        for field in ("learning_rate", "adam_eps")
        for value in (0.0, math.inf, math.nan)
    ),
    *(
        (OptimizerConfig, {field: value}, f"{field} = {value}: must be finite and not negative; choose 0 or more")
        for field, value in (("min_learning_rate", -1e-9), ("weight_decay", math.inf), ("warmup_steps", -1))
    ),
    (
        OptimizerConfig,
        {"max_grad_norm": 0.0},
        "max_grad_norm = 0.0: must be greater than 0; 1.0 is a good value, .inf leaves clipping out",
    ),
    *(
        (OptimizerConfig, {field: value}, f"{field} = {value}: must lie in [0, 1); 0.9 and 0.98 are good values")
        for field, value in (("adam_beta1", 1.0), ("adam_beta2", -0.1))
    ),
    (
        OptimizerConfig,
        {"min_learning_rate": 2e-6},
        "min_learning_rate = 2e-06: must not exceed learning_rate = 1e-06; lower it",
    ),
    *(
        (
            OptimizerConfig,
            {"schedule": schedule, "decay_steps": steps},
            f'decay_steps = {steps}: must exceed warmup_steps = 10 when schedule = "{schedule}"; set it to the run\'s '
            "number of optimizer steps (num_steps × algorithm.updates_per_rollout)",
        )
        for schedule, steps in (("linear", None), ("cosine", 10))
    ),
    (
        jsonl,
        {"answer_field": "prompt"},
        "answer_field = prompt: must differ from prompt_field; name the key that holds the reference answer",
    ),
    *(
        (gym, {"size": size}, f"size = {size}: must lie in [1, 1048576]; give the number of problems")
        for size in (0, 2**20 + 1)
    ),
    *(
        (gym, {"seed": seed}, f"seed = {seed}: must lie in [0, 4095]; use a small number, another one for each set")
        for seed in (-1, 4096)
    ),
    *(
        (
            gym,
            {"parameters": {name: 3}},
            f"parameters.{name} = 3: {name} is not one of the task's own parameters; write it as {name} beside "
            "parameters",
        )
        for name in ("size", "seed")
    ),
    (
        gym,
        {"question_template": "Q"},
        "question_template = Q: must contain {question}; put {question} where the problem goes",
    ),
    (data, {"max_prompt_tokens": 0}, "max_prompt_tokens = 0: must be at least 1; 2048 is a good value"),
    (
        data,
        {"system_prompt": "Be brief.", "prompt_format": "raw"},
        'system_prompt = Be brief.: needs prompt_format = "chat"; set prompt_format to "chat", or put the text into '
        "the prompts",
    ),
    *(
        (
            model,
            {field: value},
            f"{field} = {value}: must be positive and finite, or null to keep the model's own; set it to null",
        )
        for field, value in (("context_length", 0), ("rope_base", -1.0), ("rope_base", math.inf))
    ),
    (model, {"log_prob_chunk_tokens": 0}, "log_prob_chunk_tokens = 0: must be at least 1; 1024 is a good value"),
    *(
        (MathTerm, {"weight": value}, f"weight = {value}: must be finite; 1 is the usual weight")
        for value in (math.nan, math.inf, -math.inf)
    ),
    *(
        (
            PythonTerm,
            {"function": value},
            f"function = {value}: must name a module or a file and a function in it; write package.module:function or "
            "path/to/file.py:function",
        )
        for value in ("reward", "reward.py:", ":reward", "reward.py:my reward")
    ),
    (OverlongTerm, {"buffer_tokens": 0}, "buffer_tokens = 0: must be at least 1; DAPO has 4096 of 20480"),
    *(
        (
            NumericTerm,
            {field: value},
            f"{field} = {value}: must be finite and not negative; 0 asks for the number itself",
        )
        for field in ("relative_tolerance", "absolute_tolerance")
        for value in (-1.0, math.nan, math.inf)
    ),
    (
        RewardConfig,
        {"terms": {}},
        "terms = {}: must name at least one term; write `terms: {correct: {type: math}}`",
    ),
    (
        RewardConfig,
        {"terms": {"My term": MathTerm()}},
        'terms = My term: a term\'s name must be made of small letters, digits and underscores; "correct" is a good '
        "name for the verdict",
    ),
    (
        RewardConfig,
        {"terms": {"long": OverlongTerm(), "correct": MathTerm()}},
        "terms.long.type = overlong: the first term is the verdict on the answer, which a length is not; put the term "
        "that judges the answer first",
    ),
    (
        RewardConfig,
        {"terms": {"correct": MathTerm(weight=0.0), "same": ExactMatchTerm(weight=0.0)}},
        "terms = {'correct': 0.0, 'same': 0.0}: all weights are 0, so every reward would be; give the term that judges "
        "the answer the weight 1",
    ),
    (RewardConfig, {"timeout_s": 0.0}, "timeout_s = 0.0: must be finite and at least 0.1; 5.0 is a good value"),
    (RewardConfig, {"max_workers": 0}, "max_workers = 0: must be finite and at least 1; 8 is a good value"),
    (
        RewardConfig,
        {"worker_memory_gib": math.nan},
        "worker_memory_gib = nan: must be finite and at least 0.5; 4.0 is a good value",
    ),
    (
        run_config,
        {"reward": RewardConfig(terms={"correct": MathTerm(), "long": OverlongTerm(buffer_tokens=156)})},
        "reward.terms.long.buffer_tokens = 156: must be below rollout.max_response_tokens = 156; a fifth of it is "
        "DAPO's choice",
    ),
    *(
        (
            ReasoningGymTerm,
            {"score_threshold": value},
            f"score_threshold = {value}: must lie in (0, 1]; 0.99 is a good value",
        )
        for value in (0.0, 1.1)
    ),
    *(
        (
            build,
            {field: "#\\d"},
            f"{field} = #\\d: must have a group that holds the {held}; write the part with the {held} in parentheses, "
            'such as "#(\\d+)"',
        )
        for build, field, held in PATTERNS
    ),
    *(
        (
            build,
            {field: "#(\\d"},
            f"{field} = #(\\d: must be a regular expression (missing ), unterminated subpattern at position 1); write "
            f'the part with the {held} in parentheses, such as "#(\\d+)"',
        )
        for build, field, held in PATTERNS
    ),
    (
        EvaluationConfig,
        {"samples_per_problem": 0},
        "samples_per_problem = 0: must be at least 1; 1 is enough for hundreds of problems, 32 for a few dozen",
    ),
    (
        EvaluationConfig,
        {"samples_per_problem": 4, "pass_at": (2, 5)},
        "pass_at = 5: must lie in [1, samples_per_problem = 4]; take more samples, or a smaller k",
    ),
    (
        EvaluationConfig,
        {"consensus_at": (0,)},
        "consensus_at = 0: must lie in [1, samples_per_problem = 1]; take more samples, or a smaller k",
    ),
    (
        EvaluationConfig,
        {"temperature": 0.0},
        "temperature = 0.0: must be finite and greater than 0; leave it out for the training's, and set greedy for the "
        "most likely response",
    ),
    (
        EvaluationConfig,
        {"top_p": 1.5},
        "top_p = 1.5: must lie in (0, 1]; leave it out for the training's",
    ),
    (EvaluationConfig, {"confidence": 1.0}, "confidence = 1.0: must lie in (0, 1); 0.95 is the usual value"),
    (
        evaluate_config,
        {"rollout": RolloutConfig(engine="sglang", sglang=SglangConfig(urls=("http://h:1",)), max_response_tokens=256)},
        "rollout.sglang.urls = ('http://h:1',): must be empty: nobody knows whether servers that run already have the "
        "weights of model.path; leave it away; servers are then started from model.path",
    ),
    (
        evaluate_config,
        {"chunk_sequences": 0},
        "chunk_sequences = 0: must be at least 1; 1024 is a good value",
    ),
    (
        evaluate_config,
        {"model": ModelConfig(path=Path("m"), context_length=355)},
        "model.context_length = 355: must hold the longest sequence of 356 tokens; raise it to at least 356, or "
        "shorten prompts or responses",
    ),
    (
        EvaluationConfig,
        {"num_prompts": 0},
        "num_prompts = 0: must be at least 1; leave data.evaluation out to skip evaluation",
    ),
    (
        EvaluationConfig,
        {"every_steps": -1},
        "every_steps = -1: must not be negative; 0 evaluates before and after the run",
    ),
    (MetricsConfig, {"samples_per_step": -1}, "samples_per_step = -1: must not be negative; 0 writes none"),
    (
        SafeguardsConfig,
        {"max_log_ratio": math.nan},
        "max_log_ratio = nan: must be positive; use 15, or .inf for no limit",
    ),
    (
        SafeguardsConfig,
        {"null_future_kl_budget": -0.1},
        "null_future_kl_budget = -0.1: must not be negative; use 0.01, or .inf for no limit",
    ),
    (SafeguardsConfig, {"max_consecutive_skips": -1}, "max_consecutive_skips = -1: must not be negative; 3 is usual"),
    (SafeguardsConfig, {"max_reward_drop": 0.0}, "max_reward_drop = 0.0: must be positive; use .inf for no limit"),
    (
        SafeguardsConfig,
        {"min_length_fraction": 1.0},
        "min_length_fraction = 1.0: must lie in [0, 1); 0 sets no limit",
    ),
    (
        SafeguardsConfig,
        {"max_truncated_fraction": 0.0},
        "max_truncated_fraction = 0.0: must lie in (0, 1]; 1 sets no limit",
    ),
    (SafeguardsConfig, {"dump_step": 0}, "dump_step = 0: must be at least 1; steps begin at 1"),
    (
        SafeguardsConfig,
        {"dump_update": 2},
        "dump_update = 2: must be at least 1, and is of dump_step, which must be given with it; updates are counted "
        "from 1; set dump_step, too",
    ),
    (
        run_config,
        {"safeguards": SafeguardsConfig(dump_step=1, dump_update=9)},
        "safeguards.dump_update = 9: a step has algorithm.updates_per_rollout = 4 updates; name one of them, from 1",
    ),
    (
        run_config,
        {"safeguards": SafeguardsConfig(max_log_ratio=20.0, on_exploding_ratio="stop")},
        "safeguards.max_log_ratio = 20.0: must be below algorithm.log_ratio_clamp = 20, the largest that is seen, "
        'where on_exploding_ratio is not "warn"; lower it, or use .inf for no limit',
    ),
    (WeightSyncConfig, {"bucket_mib": 0}, "bucket_mib = 0: must be at least 1; 512 is a good value"),
    (
        FipoConfig,
        {"updates_per_rollout": 1},
        "updates_per_rollout = 1: FIPO needs at least 2: on a rollout's first mini-batch the policy has not moved, so "
        "every influence weight is exactly 1 and FIPO is DAPO; use 2 or more (8 in the paper), or algorithm type dapo",
    ),
]


@pytest.mark.parametrize(("build", "values", "text"), REFUSED)
def test_refusals_name_field_value_rule_and_way_out(
    build: Callable[..., Any], values: dict[str, Any], text: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        build(**values)
    assert str(caught.value) == text


def test_dapo_and_grpo_may_take_one_update() -> None:
    for algorithm in (DapoConfig, GrpoConfig):
        assert run_config(algorithm=algorithm(updates_per_rollout=1)).algorithm.updates_per_rollout == 1


LAYOUT = {"tensor_model_parallel_size": 2, "context_parallel_size": 2, "pipeline_model_parallel_size": 2}


@pytest.mark.parametrize(("world_size", "replicas"), [(8, 1), (16, 2), (24, 3)])
def test_data_parallelism_is_what_remains_of_the_world(world_size: int, replicas: int) -> None:
    assert ParallelismConfig(**LAYOUT).data_parallel_size(world_size) == replicas


@pytest.mark.parametrize("check", [ParallelismConfig.check_world_size, ParallelismConfig.data_parallel_size])
def test_a_layout_that_does_not_divide_the_world_is_refused_with_the_equation(check: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        check(ParallelismConfig(**LAYOUT), 12)
    assert str(caught.value) == (
        "parallelism = tensor 2 × context 2 × pipeline 2 = 8: must divide the world: world size 12 = tensor 2 × "
        "context 2 × pipeline 2 × data, and 12 / 8 is not a whole number; start a multiple of 8 ranks, or change a size"
    )


def test_an_expert_layout_that_does_not_divide_the_world_is_refused_with_the_equation() -> None:
    sizes = {"expert_model_parallel_size": 4, "expert_tensor_parallel_size": 2, "pipeline_model_parallel_size": 2}
    with pytest.raises(ConfigError) as caught:
        ParallelismConfig(**sizes).check_world_size(8)
    assert str(caught.value) == (
        "parallelism.expert_model_parallel_size = 4: must divide the world: world size 8 = expert tensor 2 × expert 4 "
        "× pipeline 2 × expert data, and 8 / 16 is not a whole number; start a multiple of 16 ranks, or change a size"
    )


@pytest.mark.parametrize(
    ("tp", "cp", "multiple"), [(1, 1, 1), (2, 1, 2), (1, 2, 4), (2, 2, 4), (3, 2, 12), (8, 2, 16), (1, 8, 16)]
)
def test_packs_divide_into_zigzag_chunks_and_sequence_parallel_parts(tp: int, cp: int, multiple: int) -> None:
    config = ParallelismConfig(tensor_model_parallel_size=tp, context_parallel_size=cp)
    assert config.pack_multiple == multiple


MINIMAL = """\
output_dir: out
num_steps: 2
model: {path: model}
data: {train: {type: jsonl, path: train.jsonl}, max_prompt_tokens: 100}
algorithm: {type: fipo, updates_per_rollout: 4}
rollout: {num_prompts_per_step: 8, group_size: 4, max_response_tokens: 156}
parallelism: {max_tokens_per_micro_batch: 256}
"""


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    return path


def test_a_minimal_file_is_the_configuration_it_says(config_file: Path) -> None:
    assert load_config(RunConfig, config_file) == run_config()


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (
            ["--parallelism.tensor_parallel_size", "2"],
            "parallelism.tensor_parallel_size = 2: there is no such field in parallelism; did you mean "
            "tensor_model_parallel_size?",
        ),
        (
            ["--temperature", "0.7"],
            "temperature = 0.7: there is no such field in the configuration; did you mean rollout.temperature?",
        ),
        (
            ["--optimizer.learning_rate", "0"],
            "optimizer.learning_rate = 0.0: must be positive and finite; choose a small positive number, such as 1e-6",
        ),
        (
            ["--checkpoint.keep_last", "0"],
            "checkpoint.keep_last = 0: must be at least 1; set it to 1 or more",
        ),
        (
            ["--checkpoint.keep_best", "1"],
            "checkpoint.best_metric = '': must be given with keep_best above 0 and only then (keep_best is 1); name a "
            "metric of metrics.jsonl, or set keep_best to 0",
        ),
        (
            ["--rollout.policy_lag", "2"],
            "rollout.policy_lag = 2: must be 0 with the embedded engine, which shares the trainer's processes; set it "
            'to 0, or rollout.engine to "sglang"',
        ),
        (
            ["--data.train.answer_field", "prompt"],
            "data.train.answer_field = prompt: must differ from prompt_field; name the key that holds the reference "
            "answer",
        ),
        (
            ["--algorithm.updates_per_rollout", "1"],
            "algorithm.updates_per_rollout = 1: FIPO needs at least 2: on a rollout's first mini-batch the policy has "
            "not moved, so every influence weight is exactly 1 and FIPO is DAPO; use 2 or more (8 in the paper), or "
            "algorithm type dapo",
        ),
        (
            ["--parallelism.max_tokens_per_micro_batch", "128"],
            "parallelism.max_tokens_per_micro_batch = 128: must hold the longest sequence: data.max_prompt_tokens = "
            "100 + rollout.max_response_tokens = 156, padded to 256; raise it to at least 256, or shorten prompts or "
            "responses",
        ),
    ],
)
def test_refusals_name_fields_from_the_root(config_file: Path, overrides: list[str], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(RunConfig, config_file, overrides)
    assert str(caught.value) == text


def test_a_key_given_twice_is_refused(config_file: Path) -> None:
    config_file.write_text(MINIMAL + "num_steps: 3\n")
    with pytest.raises(ConfigError) as caught:
        load_config(RunConfig, config_file)
    assert str(caught.value) == f"{config_file}:8 = num_steps: this key is already on line 2; keep one of the two"


@pytest.mark.parametrize(
    ("rollout", "pause", "expected"),
    [
        ({}, "auto", "retract"),
        ({"policy_lag": 1, "partial_rollouts": True}, "auto", "abort"),
        ({"colocated": True}, "auto", "abort"),
        ({"policy_lag": 1, "partial_rollouts": True}, "in_place", "in_place"),
    ],
)
def test_running_requests_are_ended_only_where_they_can_go_on_or_must(
    rollout: dict[str, Any], pause: Any, expected: str
) -> None:
    config = run_config(
        rollout=RolloutConfig(engine="sglang", max_response_tokens=156, num_prompts_per_step=8, **rollout),
        weight_sync=WeightSyncConfig(pause=pause),
    )
    assert config.pause_mode == expected


@pytest.mark.parametrize("again", ["http://10.1.0.7:30000", "http://10.1.0.7:30000/"])
def test_a_server_is_named_once(again: str) -> None:
    with pytest.raises(ConfigError, match="urls = .*: must name each server once; leave the second one away"):
        SglangConfig(urls=("http://10.1.0.7:30000", again))
