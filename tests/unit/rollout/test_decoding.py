from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from megatron_fipo.rollout.decoding import decode
from megatron_fipo.rollout.engine import GenerationRequest, SamplingParameters
from tests.tiny_models import VOCAB_SIZE, write_tiny_model

PROMPTS = [[72, 101, 108], [12], [5, 200, 31, 7, 7, 9, 250], [100, 101]]
LIMIT = 16


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    folder = write_tiny_model(tmp_path_factory.mktemp("model"), tied=False)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture
def batch_sizes(model: PreTrainedModel) -> Iterator[list[int]]:
    """Rows of every forward pass."""
    sizes: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda _, args, values: sizes.append(len(values["input_ids"])), with_kwargs=True
    )
    yield sizes
    hook.remove()


def sampling(**values: object) -> SamplingParameters:
    return SamplingParameters(**{"temperature": 1.0, "top_p": 1.0, "max_tokens": LIMIT, "stop_token_ids": ()} | values)


def request(prompt: list[int], parameters: SamplingParameters, seed: int = 0) -> GenerationRequest:
    return GenerationRequest(
        prompt_id=f"p{seed}",
        sample_index=seed,
        prompt_token_ids=np.array(prompt, dtype=np.int32),
        seed=seed,
        sampling=parameters,
    )


@torch.no_grad()
def full_logits(model: PreTrainedModel, prompt: list[int], response: list[int]) -> Tensor:
    """[R, V] float64 logits that predict each response token, from one forward pass without a cache."""
    logits = model(input_ids=torch.tensor([prompt + response])).logits[0].double()
    return logits[len(prompt) - 1 : -1]


def uniforms(seed: int, count: int = LIMIT) -> list[float]:
    """The stream that a request draws from."""
    return torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).tolist()


def test_greedy_takes_the_most_likely_token_of_a_full_forward_pass(model: PreTrainedModel) -> None:
    results = decode(model, [request(prompt, sampling(greedy=True)) for prompt in PROMPTS], policy_version=3)
    for prompt, result in zip(PROMPTS, results, strict=True):
        response: list[int] = []
        for _ in range(LIMIT):
            response.append(int(full_logits(model, prompt, [*response, 0])[-1].argmax()))
        assert result.token_ids.tolist() == response
        assert (result.finish_reason, result.policy_version) == ("length", 3)


def test_the_number_of_ended_requests_is_told_after_every_token(model: PreTrainedModel) -> None:
    told: list[int] = []
    stops = sampling(stop_token_ids=tuple(range(0, VOCAB_SIZE, 4)))
    requests = [request(prompt, stops, seed) for seed, prompt in enumerate(PROMPTS)]
    results = decode(model, requests, policy_version=0, on_finished=told.append)
    stopped = [len(result.token_ids) for result in results if result.finish_reason == "stop"]
    longest = max(len(result.token_ids) for result in results)
    assert stopped
    assert told == [sum(length <= place for length in stopped) for place in range(1, longest + 1)]


def test_greedy_agrees_with_transformers_own_generation(model: PreTrainedModel) -> None:
    config = GenerationConfig(max_new_tokens=LIMIT, do_sample=False, eos_token_id=None, pad_token_id=0)
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        theirs = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)[0, len(prompt) :]
        (mine,) = decode(model, [request(prompt, sampling(greedy=True))], policy_version=0)
        assert mine.token_ids.tolist() == theirs.tolist()


@pytest.mark.parametrize("top_p", [1.0, 0.6])
@pytest.mark.parametrize("greedy", [False, True])
def test_log_probs_are_of_the_whole_distribution_at_temperature(
    model: PreTrainedModel, top_p: float, greedy: bool
) -> None:
    parameters = sampling(temperature=0.7, top_p=top_p, greedy=greedy)
    results = decode(model, [request(prompt, parameters, seed) for seed, prompt in enumerate(PROMPTS)], 0)
    for prompt, result in zip(PROMPTS, results, strict=True):
        response = result.token_ids.tolist()
        expected = (full_logits(model, prompt, response) / 0.7).log_softmax(-1)
        wanted = expected[torch.arange(LIMIT), torch.tensor(response)].numpy()
        assert result.log_probs.dtype == np.float32
        np.testing.assert_allclose(result.log_probs, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("top_p", [1.0, 0.6])
def test_every_token_inverts_the_cumulative_distribution(model: PreTrainedModel, top_p: float) -> None:
    parameters = sampling(temperature=0.7, top_p=top_p)
    results = decode(model, [request(prompt, parameters, seed) for seed, prompt in enumerate(PROMPTS)], 0)
    for seed, (prompt, result) in enumerate(zip(PROMPTS, results, strict=True)):
        response = result.token_ids.tolist()
        probabilities = (full_logits(model, prompt, response) / 0.7).softmax(-1)
        for row, token, uniform in zip(probabilities, response, uniforms(seed), strict=True):
            if top_p < 1:
                # The fewest tokens, likeliest first, whose mass reaches top_p.
                order = row.argsort(descending=True)
                size = int((row[order].cumsum(0) < top_p).sum()) + 1
                row = torch.zeros_like(row).index_copy(0, order[:size], row[order[:size]])
                row = row / row.sum()
            below, upto = float(row[:token].sum()), float(row[: token + 1].sum())
            assert below - 1e-6 <= uniform <= upto + 1e-6
            assert row[token] > 0


def test_tokens_do_not_depend_on_the_companions_in_the_batch(model: PreTrainedModel) -> None:
    parameters = sampling(temperature=0.8)
    everyone = [request(PROMPTS[seed % 4], parameters, seed) for seed in range(8)]
    together = decode(model, everyone, 0)
    alone = [decode(model, [each], 0)[0] for each in everyone]
    others = decode(model, [*everyone[5:8], request([1] * 30, parameters, 99), *everyone[2:4]], 0)
    for index in range(8):
        assert together[index].token_ids.tolist() == alone[index].token_ids.tolist()
        np.testing.assert_allclose(together[index].log_probs, alone[index].log_probs, rtol=0, atol=2e-6)
    for index, place in [(5, 0), (6, 1), (7, 2), (2, 4), (3, 5)]:
        assert others[place].token_ids.tolist() == alone[index].token_ids.tolist()


def test_a_repeated_batch_is_bitwise_equal(model: PreTrainedModel) -> None:
    requests = [request(PROMPTS[seed % 4], sampling(temperature=0.8), seed) for seed in range(8)]
    first, again = decode(model, requests, 0), decode(model, requests, 0)
    for mine, other in zip(first, again, strict=True):
        assert mine.token_ids.tobytes() == other.token_ids.tobytes()
        assert mine.log_probs.tobytes() == other.log_probs.tobytes()


def test_a_response_ends_with_its_stop_token_or_at_the_limit(model: PreTrainedModel) -> None:
    requests = [request(PROMPTS[seed % 4], sampling(), seed) for seed in range(16)]
    endless = [result.token_ids.tolist() for result in decode(model, requests, 0)]
    # Two stop tokens that are first met early and late.
    stops = (endless[0][0], endless[5][11])
    stopping = sampling(stop_token_ids=stops)
    results = decode(model, [request(PROMPTS[seed % 4], stopping, seed) for seed in range(16)], 0)
    ends = [next((place for place, token in enumerate(tokens) if token in stops), None) for tokens in endless]
    assert len(set(ends)) > 2
    for tokens, end, result in zip(endless, ends, results, strict=True):
        assert result.token_ids.tolist() == (tokens if end is None else tokens[: end + 1])
        assert result.finish_reason == ("length" if end is None else "stop")
        assert len(result.log_probs) == len(result.token_ids)


def test_a_stop_token_at_the_limit_is_a_stop(model: PreTrainedModel) -> None:
    (endless,) = decode(model, [request(PROMPTS[0], sampling(max_tokens=3))], 0)
    last = int(endless.token_ids[2])
    assert last not in endless.token_ids[:2]
    (result,) = decode(model, [request(PROMPTS[0], sampling(max_tokens=3, stop_token_ids=(last,)))], 0)
    assert result.token_ids.tolist() == endless.token_ids.tolist()
    assert result.finish_reason == "stop"


def test_finished_rows_leave_the_batch_and_change_nothing(model: PreTrainedModel, batch_sizes: list[int]) -> None:
    # A twelfth of the vocabulary ends a response, so that rows finish at all times.
    parameters = sampling(stop_token_ids=tuple(range(0, VOCAB_SIZE, 12)))
    requests = [request(PROMPTS[seed % 4], parameters, seed) for seed in range(16)]
    together = decode(model, requests, 0)
    assert batch_sizes[0] == len(PROMPTS), "a prompt is read once for all its samples"
    assert len(set(batch_sizes[1:])) >= 4, "the batch shrinks several times"
    lengths = np.array([len(result.token_ids) for result in together])
    for step, rows in enumerate(batch_sizes[1:], start=1):
        # Rows are dropped once a quarter of the batch has finished.
        assert (lengths > step).sum() <= rows <= (lengths > step).sum() / 0.75 + 1
    for each, result in zip(requests, together, strict=True):
        (alone,) = decode(model, [each], 0)
        assert result.token_ids.tolist() == alone.token_ids.tolist()
        assert result.finish_reason == alone.finish_reason


def test_decoding_ends_with_the_last_response(model: PreTrainedModel, batch_sizes: list[int]) -> None:
    everything = tuple(range(VOCAB_SIZE))
    results = decode(model, [request([1], sampling(stop_token_ids=everything), seed) for seed in range(3)], 0)
    assert [len(result.token_ids) for result in results] == [1, 1, 1]
    assert batch_sizes == [1]


def chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


def test_draws_follow_the_models_distribution(model: PreTrainedModel) -> None:
    draws = 6000
    parameters = sampling(temperature=0.4, max_tokens=1)
    results = decode(model, [request(PROMPTS[0], parameters, seed) for seed in range(draws)], 0)
    tokens = np.array([int(result.token_ids[0]) for result in results])
    probabilities = (full_logits(model, PROMPTS[0], [0])[0] / 0.4).softmax(-1).numpy()
    # Tokens in order of likelihood, in 20 cells of about equal mass.
    order = np.argsort(-probabilities)
    cells = np.minimum((np.cumsum(probabilities[order]) * 20).astype(int), 19)
    cell_of = np.empty(VOCAB_SIZE, dtype=int)
    cell_of[order] = cells
    used = np.unique(cells)
    expected = np.bincount(cells, weights=probabilities[order], minlength=20)[used] * draws
    counts = np.bincount(cell_of[tokens], minlength=20)[used]
    assert len(used) >= 15
    # 43.8 is the 99.9 % quantile at 19 degrees of freedom.
    assert chi_square(counts, expected) < 43.8
    # A temperature of 0.5 would be noticed.
    warmer = probabilities ** (0.4 / 0.5)
    shifted = np.bincount(cell_of, weights=warmer / warmer.sum(), minlength=20)[used] * draws
    assert chi_square(counts, shifted) > 43.8
