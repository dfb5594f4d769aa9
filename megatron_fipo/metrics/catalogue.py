"""Every metric that a run may log.

To add one, add a `Metric` to the section it belongs to: its name as logged, one line on what it is, its unit, how its
parts become one number (`reduction`) and how the values of a step's updates become the step's (`combination`). Metrics
that are computed once a step on rank 0, such as counters of the rollout, need neither of the two. A name made at run
time is declared as a family: `rollout/<source>/reward_mean`. Then run `python tools/generate_metric_docs.py`, which
writes docs/metrics.md. Names are stable: scripts and dashboards read them.
"""

from megatron_fipo.metrics.declaration import Catalogue, Metric, Section, quantiles


def _limits(name: str) -> tuple[Metric, ...]:
    """Rows of both ends of a fraction's interval."""
    ends = (("low", "Lower"), ("high", "Upper"))
    return tuple(
        Metric(name=f"{name}_{end}", description=f"{word} end of its interval.", unit="fraction") for end, word in ends
    )


_STEP = Section(
    "The step",
    "What a line of metrics.jsonl is about.",
    (
        Metric(name="step", description="Number of the step; 0 is before training."),
        Metric(name="policy_version", description="Version of the weights after the step."),
    ),
)

_ROLLOUT = Section(
    "Rollout",
    "About the batch that the step trains on, where nothing else is said. A score of 0.99 or more counts as right. "
    "Metrics of a `<source>` are about the prompts of one data source, and present where sources have names.",
    (
        Metric(name="rollout/reward_mean", description="Mean reward of the batch's samples, shaping included."),
        Metric(name="rollout/score_mean", description="Mean score of the answers, before weights and shaping."),
        Metric(name="rollout/accuracy", description="Samples with the right answer.", unit="fraction"),
        Metric(name="rollout/truncated_fraction", description="Samples cut off by the token limit.", unit="fraction"),
        Metric(name="rollout/num_sequences", description="Samples in the batch.", unit="samples"),
        Metric(name="rollout/response_length_mean", description="Mean response length.", unit="tokens"),
        Metric(name="rollout/response_length_min", description="Shortest response.", unit="tokens"),
        Metric(name="rollout/response_length_p25", description="25 % quantile of response lengths.", unit="tokens"),
        Metric(name="rollout/response_length_p50", description="Median response length.", unit="tokens"),
        Metric(name="rollout/response_length_p75", description="75 % quantile of response lengths.", unit="tokens"),
        Metric(name="rollout/response_length_p95", description="95 % quantile of response lengths.", unit="tokens"),
        Metric(name="rollout/response_length_max", description="Longest response.", unit="tokens"),
        Metric(name="rollout/prompt_length_mean", description="Mean prompt length.", unit="tokens"),
        Metric(name="rollout/advantage_abs_mean", description="Mean |A| over samples."),
        Metric(name="rollout/<source>/num_sequences", description="Samples of the source.", unit="samples"),
        Metric(name="rollout/<source>/reward_mean", description="Mean reward of the source's samples."),
        Metric(name="rollout/<source>/score_mean", description="Mean score of the source's samples."),
        Metric(name="rollout/<source>/accuracy", description="The source's right answers.", unit="fraction"),
        Metric(name="rollout/<source>/truncated_fraction", description="The source's cut samples.", unit="fraction"),
        Metric(name="rollout/<source>/response_length_mean", description="Their mean length.", unit="tokens"),
        Metric(name="reward/<term>_mean", description="Mean of one term of the reward, weighted, over the batch."),
        Metric(name="rollout/reward_mean_all", description="Mean reward of all samples generated in the step."),
        Metric(name="rollout/generation_rounds", description="Rounds of prompts it took.", unit="rounds"),
        Metric(name="rollout/epoch", description="Passes over the training prompts so far.", unit="epochs"),
        Metric(name="rollout/groups_generated", description="Groups generated in the step.", unit="groups"),
        Metric(
            name="rollout/response_tokens_generated",
            description="Response tokens of the samples generated in the step that have a reward.",
            unit="tokens",
        ),
        Metric(
            name="rollout/groups_without_signal",
            description="Groups set aside because all their rewards are equal.",
            unit="groups",
        ),
        Metric(name="rollout/groups_all_right", description="Those whose answers are all right.", unit="groups"),
        Metric(name="rollout/groups_stale", description="Groups refused for their age.", unit="groups"),
        Metric(name="rollout/groups_incomplete", description="Groups refused for a missing reward.", unit="groups"),
        Metric(
            name="rollout/reward_errors",
            description="Samples without a reward because a term of it failed, with `reward.on_error: skip`.",
            unit="samples",
        ),
        Metric(
            name="rollout/reward_timeouts",
            description="Samples whose answer was given up for its time or memory, which counts as wrong.",
            unit="samples",
        ),
        Metric(
            name="rollout/reward_bad_references",
            description="Samples without a reward because their prompt's reference answer cannot be used.",
            unit="samples",
        ),
        Metric(name="rollout/groups_carried_in", description="Groups left over from earlier steps.", unit="groups"),
        Metric(name="rollout/groups_surplus", description="Groups left over for later steps.", unit="groups"),
        Metric(
            name="rollout/groups_filled_up",
            description="Groups without signal that were taken to complete the batch.",
            unit="groups",
        ),
        Metric(
            name="rollout/staleness_mean",
            description="Versions that the batch's groups are behind the weights that train on them, by each one's "
            "oldest sample; where rollout.policy_lag or carry_over_max_lag allows any.",
            unit="versions",
        ),
        Metric(name="rollout/staleness_max", description="Those of the oldest group.", unit="versions"),
        Metric(name="rollout/staleness_<lag>_fraction", description="Groups so many versions behind.", unit="fraction"),
        Metric(
            name="rollout/token_staleness_mean",
            description="Versions that response tokens are behind, each by the weights that sampled it.",
            unit="versions",
        ),
        Metric(name="rollout/token_staleness_max", description="Those of the oldest token.", unit="versions"),
        Metric(
            name="rollout/token_staleness_<lag>_fraction",
            description="Response tokens so many versions behind.",
            unit="fraction",
        ),
    ),
)

_SERVED = Section(
    "Served rollouts",
    "Of runs with SGLang servers, counted from one full batch to the next.",
    (
        Metric(name="rollout/wait_s", description="Time that the trainer waited for its batch.", unit="s"),
        Metric(
            name="rollout/serving_s",
            description="Time in which any group was on its way, whether the trainer waited or not; without pauses.",
            unit="s",
        ),
        Metric(
            name="rollout/overlap_fraction",
            description="Part of the time of generation in which the trainer did not wait for it.",
            unit="fraction",
        ),
        Metric(
            name="rollout/groups_cut",
            description="Groups given up unfinished when the batch was full, too old for the next one.",
            unit="groups",
        ),
        Metric(
            name="rollout/groups_returned",
            description="Groups that no server had begun when the batch was full; their prompts come first next time.",
            unit="groups",
        ),
        Metric(
            name="rollout/groups_under_way",
            description="Groups that go on being generated for later batches.",
            unit="groups",
        ),
        Metric(
            name="rollout/requests_interrupted",
            description="Times that a request came back unfinished and was sent again.",
            unit="requests",
        ),
        Metric(
            name="rollout/response_tokens_discarded",
            description="Generated tokens of unfinished responses that were given up or begun again.",
            unit="tokens",
        ),
    ),
)

_DATA = Section(
    "Prompts",
    "Counted from the run's first step on, resumed runs included. docs/data.md says what is skipped.",
    (
        Metric(name="data/<source>/drawn", description="Prompts drawn from the source.", unit="prompts"),
        Metric(name="data/<source>/epoch", description="Whole passes over the source.", unit="epochs"),
        Metric(
            name="data/skipped_<reason>",
            description="Rows of the training sources that were skipped for the reason, each once.",
            unit="rows",
        ),
    ),
)

_UPDATES = Section(
    "Updates",
    "About the response tokens of a mini-batch, dropped sequences included, where nothing else is said. r is "
    "π_θ / π_old of a token, A its advantage.",
    (
        Metric(name="train/updates", description="Mini-batches of the step.", unit="updates"),
        Metric(name="train/updates_skipped", description="Those that changed no weight.", unit="updates"),
        Metric(
            name="train/loss",
            description="Σ numerators / D, over the tokens or sequences that are kept.",
            reduction="ratio",
            combination="mean",
        ),
        Metric(
            name="train/loss_by_update",
            description="The loss of every update; null where no token was left.",
            reduction="ratio",
            combination="list",
        ),
        Metric(
            name="train/grad_norm",
            description="Global norm of the gradient before clipping, of updates that had tokens.",
            combination="mean",
        ),
        Metric(name="train/grad_norm_by_update", description="The norm of every update.", combination="list"),
        Metric(name="train/learning_rate", description="Learning rate of the last update.", combination="last"),
        Metric(
            name="train/policy_kl",
            description="Mean of −log r: KL(π_old ‖ π_θ) by the estimator k1, which may be negative.",
            unit="nats",
            reduction="mean",
            combination="mean",
        ),
        Metric(
            name="train/policy_kl_k3",
            description="Mean of r − 1 − log r: the same by the estimator k3, never negative.",
            unit="nats",
            reduction="mean",
            combination="mean",
        ),
        Metric(
            name="train/entropy",
            description="Mean entropy of the policy's next-token distribution, at sampling temperature.",
            unit="nats",
            reduction="mean",
            combination="mean",
        ),
        Metric(
            name="train/length_weighted_advantage",
            description="Mean of A over tokens, so that a response counts by its length.",
            reduction="mean",
            combination="mean",
        ),
        Metric(
            name="train/clip_fraction_low",
            description="Tokens with A < 0 (CISPO: any A) and r, in GSPO that of the response, below the lower bound.",
            unit="fraction",
            reduction="mean",
            combination="mean",
        ),
        Metric(
            name="train/clip_fraction_high",
            description="Tokens with A > 0 (CISPO: any A) and r, in GSPO that of the response, above the upper bound.",
            unit="fraction",
            reduction="mean",
            combination="mean",
        ),
        Metric(
            name="train/log_ratio_abs_max",
            description="Largest |log r|, after its clamp.",
            unit="nats",
            reduction="max",
            combination="max",
        ),
        Metric(name="train/ratio_mean", description="Mean r.", reduction="mean", combination="mean"),
        Metric(name="train/ratio_max", description="Largest r.", reduction="max", combination="max"),
        *quantiles("train/ratio_negative", "r over tokens with A < 0", (750, 995, 999)),
        Metric(
            name="train/ratio_negative_max",
            description="Largest r of a token with A < 0.",
            reduction="max",
            combination="max",
        ),
        Metric(
            name="train/ratio_negative_count_2_3",
            description="Tokens with A < 0 and 2 ≤ r < 3.",
            unit="tokens",
            reduction="sum",
            combination="sum",
        ),
        Metric(
            name="train/ratio_negative_count_3_4",
            description="Tokens with A < 0 and 3 ≤ r < 4.",
            unit="tokens",
            reduction="sum",
            combination="sum",
        ),
        Metric(
            name="train/ratio_negative_count_4_c",
            description="Tokens with A < 0 and 4 ≤ r ≤ c, the dual-clip bound; without one, 4 ≤ r.",
            unit="tokens",
            reduction="sum",
            combination="sum",
        ),
        Metric(
            name="train/ratio_positive_min",
            description="Smallest r of a token with A > 0.",
            reduction="min",
            combination="min",
        ),
        *quantiles("train/ratio_positive", "r over tokens with A > 0", (250, 500, 750, 995, 999)),
        Metric(
            name="train/ratio_positive_max",
            description="Largest r of a token with A > 0.",
            reduction="max",
            combination="max",
        ),
        Metric(
            name="train/ratio_positive_fraction_below_1e3",
            description="Tokens with r < 1e-3, of those with A > 0.",
            unit="fraction",
            reduction="mean",
            combination="mean",
        ),
    ),
)

_FIPO = Section(
    "Future-KL and influence weights",
    "F is a token's Future-KL, f its influence weight after clip and safety, exp(F) the raw weight, with F kept within "
    "±20. An influence weight of exactly 1 changes nothing and is never counted as clipped. Other algorithms "
    "report the dual clip alone, where they have one.",
    (
        Metric(
            name="fipo/null_future_kl_std",
            description="Standard deviation of F on the first update, where the policy is the old one: must be 0.",
            unit="nats",
            reduction="mean",
            combination="first",
        ),
        Metric(name="fipo/future_kl_mean", description="Mean F.", unit="nats", reduction="mean", combination="mean"),
        Metric(
            name="fipo/future_kl_square_mean",
            description="Mean F².",
            unit="nats²",
            reduction="mean",
            combination="mean",
        ),
        Metric(name="fipo/influence_weight_mean", description="Mean f.", reduction="mean", combination="mean"),
        Metric(name="fipo/influence_weight_min", description="Smallest f.", reduction="min", combination="min"),
        *quantiles("fipo/influence_weight", "f", (10, 250, 500, 750, 990, 999)),
        Metric(name="fipo/influence_weight_max", description="Largest f.", reduction="max", combination="max"),
        Metric(name="fipo/influence_raw_mean", description="Mean exp(F).", reduction="mean", combination="mean"),
        Metric(name="fipo/influence_raw_min", description="Smallest exp(F).", reduction="min", combination="min"),
        *quantiles("fipo/influence_raw", "exp(F)", (10, 250, 500, 750, 990, 999)),
        Metric(name="fipo/influence_raw_max", description="Largest exp(F).", reduction="max", combination="max"),
        Metric(
            name="fipo/fraction_changed",
            description="Tokens with f ≠ 1.",
            unit="fraction",
            reduction="mean",
            combination="mean",
        ),
        Metric(
            name="fipo/fraction_at_lower_bound",
            description="Tokens with f at the lower influence bound, f = 1 left out.",
            unit="fraction",
            reduction="mean",
            combination="mean",
        ),
        Metric(
            name="fipo/fraction_at_upper_bound",
            description="Tokens with f at the upper influence bound, f = 1 left out.",
            unit="fraction",
            reduction="mean",
            combination="mean",
        ),
        Metric(
            name="fipo/step_size_ratio",
            description="Σ|A·f| / Σ|A| over kept tokens: by how much the weights stretch the step.",
            reduction="ratio",
            combination="mean",
        ),
        Metric(
            name="fipo/dual_clip_fraction",
            description="Tokens with A < 0 and r, in GSPO that of the response, above the dual-clip bound.",
            unit="fraction",
            reduction="mean",
            combination="mean",
        ),
        Metric(
            name="fipo/dropped_sequences",
            description="Sequences taken out by the sequence drop.",
            unit="samples",
            reduction="sum",
            combination="sum",
        ),
    ),
)

_SAFEGUARDS = Section(
    "Safeguards",
    "numerical_faults.md says what is a fault; one that is only warned of counts, too.",
    (
        Metric(
            name="train/faults_non_finite",
            description="Updates whose loss or gradient was not finite.",
            unit="updates",
        ),
        Metric(
            name="train/faults_exploding_ratio",
            description="Updates with a log-ratio beyond safeguards.max_log_ratio.",
            unit="updates",
        ),
        Metric(
            name="train/faults_null_noise",
            description="Updates of the old policy with std(F) beyond safeguards.null_future_kl_budget.",
            unit="updates",
        ),
        Metric(
            name="train/consecutive_skips",
            description="Faulty updates skipped since the last applied one.",
            unit="updates",
        ),
        Metric(
            name="rollout/reward_drop",
            description="How far the mean reward of the last safeguards.collapse_window_steps lies below the best "
            "such window.",
        ),
        Metric(
            name="rollout/length_fraction",
            description="Mean response length of the window, as a part of the longest window's.",
            unit="fraction",
        ),
        Metric(
            name="rollout/steps_without_signal",
            description="Steps in a row whose groups all had equal rewards.",
            unit="steps",
        ),
    ),
)

_MISMATCH = Section(
    "Mismatch between engine and trainer",
    "d is log π_rollout (the engine's) − log π_old (the trainer's, before the first update) of a response token.",
    (
        Metric(
            name="train/mismatch_mean_abs",
            description="Mean |d|.",
            unit="nats",
            reduction="mean",
            combination="mean",
        ),
        Metric(
            name="train/mismatch_mean_abs_from_<place>",
            description="Mean |d| on the tokens of responses from this place on, up to the next such metric's.",
            unit="nats",
            reduction="mean",
            combination="mean",
        ),
        Metric(
            name="train/mismatch_mean_abs_from_lag_<lag>",
            description="Mean |d| on tokens from weights so many versions before those of π_old, up to the next such "
            "metric's: at 0 it is numerics alone, beyond it staleness too.",
            unit="nats",
            reduction="mean",
            combination="mean",
        ),
        Metric(name="train/mismatch_max", description="Largest |d|.", unit="nats", reduction="max", combination="max"),
        Metric(
            name="train/mismatch_kl",
            description="Mean d: KL(π_rollout ‖ π_old) by the estimator k1, which may be negative.",
            unit="nats",
            reduction="mean",
            combination="mean",
        ),
        Metric(
            name="train/mismatch_kl_k3",
            description="Mean of exp(−d) − 1 + d, d kept within ±20: the same by the estimator k3, never negative.",
            unit="nats",
            reduction="mean",
            combination="mean",
        ),
        Metric(
            name="train/routing_mismatch_fraction",
            description="Of the choices of experts that are replayed (rollout.replay_routing), one for each token and "
            "layer, those that the trainer's router would not have made; on the first update.",
            unit="fraction",
            reduction="ratio",
            combination="first",
        ),
        Metric(
            name="train/rollout_importance_mean",
            description="Mean factor of algorithm.rollout_correction, where there is one.",
            reduction="mean",
            combination="mean",
        ),
        Metric(
            name="train/rollout_corrected_fraction",
            description="Tokens whose factor that correction has truncated, or masked.",
            unit="fraction",
            reduction="mean",
            combination="mean",
        ),
    ),
)

_REFERENCE = Section(
    "Distance from the reference policy",
    "d is log π_θ − log π_ref of a response token, π_ref being the initial policy; reported where "
    "algorithm.reference_kl_coefficient is above 0.",
    (
        Metric(
            name="train/reference_kl",
            description="Mean d: KL(π_θ ‖ π_ref) by the estimator k1, which may be negative.",
            unit="nats",
            reduction="mean",
            combination="mean",
        ),
        Metric(
            name="train/reference_kl_k3",
            description="Mean of exp(−d) − 1 + d, d kept within ±20: the same by the estimator k3, never negative.",
            unit="nats",
            reduction="mean",
            combination="mean",
        ),
    ),
)

_EVALUATION = Section(
    "Evaluation",
    "On held-out problems, after the step; in the lines of the steps that evaluate. A response is right by the verdict "
    "on its answer. Means are over problems, and `_low` and `_high` end their intervals, which hold with the chance "
    "evaluation.confidence; docs/evaluation.md has the formulas. k is evaluation.samples_per_problem, or one of "
    "evaluation.consensus_at and evaluation.pass_at.",
    (
        Metric(name="eval/num_problems", description="Problems tried.", unit="problems"),
        Metric(
            name="eval/num_unscored",
            description="Responses whose scoring failed; they count as wrong.",
            unit="samples",
        ),
        Metric(name="eval/accuracy", description="Right responses at sampling temperature: Avg@k.", unit="fraction"),
        *_limits("eval/accuracy"),
        Metric(name="eval/greedy_accuracy", description="Right responses of greedy decoding.", unit="fraction"),
        *_limits("eval/greedy_accuracy"),
        Metric(name="eval/response_length_mean", description="Mean response length.", unit="tokens"),
        Metric(name="eval/truncated_fraction", description="Responses cut off by the token limit.", unit="fraction"),
        Metric(name="eval/<source>/num_problems", description="Problems of the source.", unit="problems"),
        Metric(name="eval/<source>/avg_at_<k>", description="The source's right responses.", unit="fraction"),
        *_limits("eval/<source>/avg_at_<k>"),
        Metric(
            name="eval/<source>/cons_at_<k>",
            description="Problems whose most frequent answer of k is right, ties broken evenly.",
            unit="fraction",
        ),
        *_limits("eval/<source>/cons_at_<k>"),
        Metric(
            name="eval/<source>/pass_at_<k>",
            description="Problems with a right response among k, by the unbiased estimate.",
            unit="fraction",
        ),
        *_limits("eval/<source>/pass_at_<k>"),
        Metric(name="eval/<source>/greedy_accuracy", description="The source's, greedily.", unit="fraction"),
        *_limits("eval/<source>/greedy_accuracy"),
        Metric(name="eval/<source>/response_length_mean", description="Their mean length.", unit="tokens"),
        Metric(name="eval/<source>/truncated_fraction", description="The source's cut responses.", unit="fraction"),
    ),
)

_WEIGHT_SYNC = Section(
    "Weights to servers",
    "Of the sync after the step's updates, and of what was sent to restarted servers before it. Seconds lie within "
    "`time/weight_sync_s`, or within the rollout for restarted servers.",
    (
        Metric(name="perf/weight_sync_pause_s", description="Until all servers had stopped.", unit="s"),
        Metric(name="perf/weight_sync_transfer_s", description="Until they had the weights.", unit="s"),
        Metric(name="perf/weight_sync_verify_s", description="Until it was known that they have them.", unit="s"),
        Metric(name="perf/weight_sync_gib", description="Weights sent, counted once for all servers.", unit="GiB"),
        Metric(name="perf/weight_sync_servers", description="Servers that took them in."),
        Metric(name="perf/weight_sync_servers_failed", description="Servers that did not, and are restarted."),
        Metric(
            name="rollout/canary_mismatch_mean",
            description="Mean |d| between a fixed response's log-probabilities of the servers and of the actor after "
            "the sync, the worst server's.",
            unit="nats",
        ),
        Metric(name="rollout/canary_mismatch_max", description="Largest |d| of it.", unit="nats"),
    ),
)

_PERFORMANCE = Section(
    "Time, throughput and memory",
    "Times are wall-clock on rank 0. Tokens are counted over all ranks.",
    (
        Metric(name="time/<phase>_s", description="Time of one phase of the step.", unit="s"),
        Metric(
            name="perf/journal_s",
            description="Time of writing the batch of a served engine to disk, within that of the rollout.",
            unit="s",
        ),
        Metric(
            name="perf/rollout_response_tokens_per_s",
            description="Generated response tokens over the time of generation and scoring: that of the phase with the "
            "embedded engine, `rollout/serving_s` with servers.",
            unit="tokens/s",
        ),
        Metric(
            name="perf/old_log_probs_tokens_per_s",
            description="Prompt and response tokens over the time of the old log-probabilities.",
            unit="tokens/s",
        ),
        Metric(
            name="perf/update_tokens_per_s",
            description="Prompt and response tokens over the time of the updates.",
            unit="tokens/s",
        ),
        Metric(
            name="perf/peak_memory_gib",
            description="Highest memory use of any rank so far: CUDA allocations, or the resident set on the CPU.",
            unit="GiB",
            reduction="max",
        ),
        Metric(
            name="perf/host_memory_gib",
            description="Largest resident set of any rank's process now.",
            unit="GiB",
            reduction="max",
        ),
        Metric(
            name="perf/offload_gib",
            description="Memory of rank 0's device that the trainer gave to colocated servers, gradients included.",
            unit="GiB",
        ),
        Metric(
            name="perf/offload_s",
            description="Time of handing the devices over, within that of the rollout, the weight sync and the export.",
            unit="s",
        ),
    ),
)

CATALOGUE = Catalogue(
    (
        _STEP,
        _ROLLOUT,
        _SERVED,
        _DATA,
        _UPDATES,
        _FIPO,
        _SAFEGUARDS,
        _MISMATCH,
        _REFERENCE,
        _EVALUATION,
        _WEIGHT_SYNC,
        _PERFORMANCE,
    )
)
