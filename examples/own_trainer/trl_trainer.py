"""FIPO in TRL: a GRPOTrainer whose loss is `fipo_loss`, on the task of train.py. Written for TRL 1.16.

pip install trl==1.16.0
python examples/own_trainer/trl_trainer.py
"""

import torch
from datasets import Dataset
from train import GROUP_SIZE, RESPONSE_TOKENS, tiny_model
from transformers import set_seed
from trl import GRPOConfig, GRPOTrainer

from megatron_fipo.algorithms.losses import fipo_loss
from megatron_fipo.config.algorithm import FipoConfig


class FipoTrainer(GRPOTrainer):
    """GRPOTrainer with its loss overridden; sampling, rewards, advantages and optimizer stay TRL's.

    Accumulated micro-batches are averaged, each by its own tokens, as TRL's `loss_type="bnpo"` does.
    """

    fipo = FipoConfig.preset("paper-v2")

    def _compute_loss(self, model, inputs):
        if "old_per_token_logps" not in inputs:
            raise ValueError(
                f"steps_per_generation = {self.args.steps_per_generation}: one update a rollout leaves every influence "
                "weight at 1, so FIPO would be DAPO; use a multiple of gradient_accumulation_steps, or num_iterations"
            )
        prompt_ids, completion_ids = inputs["prompt_ids"], inputs["completion_ids"]
        log_probs, *_ = self._get_per_token_logps_and_entropies(
            model,
            torch.cat([prompt_ids, completion_ids], dim=1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
            completion_ids.size(1),
        )
        mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
        result = fipo_loss(log_probs, inputs["old_per_token_logps"], inputs["advantages"], mask.bool(), self.fipo)
        if not model.training:
            return result.loss
        for name, value in result.metrics.items():
            self._metrics["train"][name].append(value)
        return result.loss / self.current_gradient_accumulation_steps


def repeats(completions: list[str], digit: list[str], **_: object) -> list[float]:
    """Reward of train.py: how often the response repeats the prompt's digit."""
    return [text.count(wanted) / RESPONSE_TOKENS for text, wanted in zip(completions, digit, strict=True)]


def main(output_dir: str = "runs/own_trainer_trl", rollouts: int = 40) -> list[dict[str, float]]:
    """Train the tiny model; returns what TRL logged."""
    set_seed(1)
    model, tokenizer = tiny_model()
    settings = GRPOConfig(
        output_dir=output_dir,
        per_device_train_batch_size=32,
        steps_per_generation=4,
        gradient_accumulation_steps=1,
        max_steps=4 * rollouts,
        num_generations=GROUP_SIZE,
        max_completion_length=RESPONSE_TOKENS,
        learning_rate=3e-3,
        lr_scheduler_type="constant",
        logging_steps=4,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    )
    rows = Dataset.from_list([{"prompt": f"{digit}=", "digit": digit} for digit in "0123456789" * 64])
    trainer = FipoTrainer(
        model=model, reward_funcs=repeats, args=settings, train_dataset=rows, processing_class=tokenizer
    )
    trainer.train()
    return trainer.state.log_history


if __name__ == "__main__":
    main()
