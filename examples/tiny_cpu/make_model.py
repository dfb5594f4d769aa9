"""Makes the quickstart's problems and model, a character model warm-started on a teacher that gets carries wrong.

A problem is a chain of digits, `7+5+8+1=`; its answer is the last digit of the sum. The model writes the running sum
step by step, `7+5=2;2+8=0;0+1=1;#1`. The teacher it first imitates works the same way, but where a sum reaches ten it
writes one digit too many in most cases: greedy decoding therefore fails on nearly every problem with a carry, and only
the reward tells that the rarer, right steps are worth more.

    python examples/tiny_cpu/make_model.py --seed 1 --output DIR

writes DIR/model (a Hugging Face folder), DIR/train.jsonl and DIR/eval.jsonl. No evaluation problem occurs in the warm
start or in train.jsonl: which side a problem is on follows from a hash of its text. DIR is complete or absent, and is
left alone when it was made with the same parameters and the same version of this file.
"""

import argparse
import hashlib
import json
import logging
import os
import random
import shutil
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from transformers.utils.logging import disable_progress_bar

logger = logging.getLogger("make_model")

CHARACTERS = "0123456789+=;#"
PAD, EOS = "<pad>", "<eos>"
# One problem in this many is held out.
HELD_OUT_PART = 8
WARMUP_UPDATES = 40
# Says what a folder was made from.
RECORD_NAME = "recipe.json"


@dataclass(frozen=True)
class Recipe:
    """Everything the output depends on.

    Attributes:
        seed: Seed of the initial weights, the warm start and the problems.
        shortest, longest: Digits of a problem.
        train_problems, eval_problems: Lines of the two files.
        batch: Samples in a supervised update.
        learning_rate: Rate of the warm start until the teacher is learnt.
        learnt_loss: Mean loss of the last 20 updates at which it is; it cannot go below about 0.045.
        decay_updates: Updates from there to the end, over which the rate falls to nothing.
        max_updates: Updates after which a warm start that did not get there is given up.
        carry_error: How often the teacher gets a carry wrong.
    """

    seed: int
    shortest: int = 4
    longest: int = 6
    train_problems: int = 4096
    eval_problems: int = 1024
    batch: int = 32
    learning_rate: float = 2e-3
    learnt_loss: float = 0.1
    decay_updates: int = 100
    max_updates: int = 1200
    carry_error: float = 0.6


def main() -> None:
    """Make the folder unless it is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    disable_progress_bar()
    recipe = Recipe(seed=options.seed)
    if is_made(options.output, recipe):
        logger.info("%s is there already", options.output)
        return
    if options.output.exists() and not (options.output / RECORD_NAME).is_file():
        sys.exit(f"{options.output}: holds something else; choose another folder or remove it")
    torch.set_num_threads(1)
    partial = options.output.with_name(f".{options.output.name}.{os.getpid()}")
    partial.mkdir(parents=True)
    make(recipe, partial)
    (partial / RECORD_NAME).write_text(json.dumps(fingerprint(recipe), indent=2) + "\n")
    shutil.rmtree(options.output, ignore_errors=True)
    os.rename(partial, options.output)
    logger.info("made %s", options.output)


def fingerprint(recipe: Recipe) -> dict[str, object]:
    """The recipe, and a digest of the program that follows it."""
    return asdict(recipe) | {"program": hashlib.sha256(Path(__file__).read_bytes()).hexdigest()}


def is_made(folder: Path, recipe: Recipe) -> bool:
    """Whether the folder was made by this program with this recipe."""
    record = folder / RECORD_NAME
    return record.is_file() and json.loads(record.read_text()) == fingerprint(recipe)


def make(recipe: Recipe, folder: Path) -> None:
    """Write problems, tokenizer and warm-started model."""
    torch.manual_seed(recipe.seed)
    rng = random.Random(recipe.seed)
    write_problems(
        folder / "train.jsonl", recipe, random.Random(recipe.seed + 1), recipe.train_problems, held_out=False
    )
    # The held-out problems are the same for every seed.
    write_problems(folder / "eval.jsonl", recipe, random.Random(0), recipe.eval_problems, held_out=True)
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder / "model")
    model = make_model(tokenizer)
    warm_start(model, tokenizer, recipe, rng)
    model.save_pretrained(folder / "model")


def is_held_out(prompt: str) -> bool:
    """Which side of the split a problem is on."""
    return hashlib.sha256(prompt.encode()).digest()[0] % HELD_OUT_PART == 0


def draw_problem(recipe: Recipe, rng: random.Random, *, held_out: bool) -> list[int]:
    """Digits of a problem on the wanted side of the split."""
    while True:
        digits = [rng.randrange(10) for _ in range(rng.randint(recipe.shortest, recipe.longest))]
        if is_held_out(prompt_of(digits)) == held_out:
            return digits


def prompt_of(digits: list[int]) -> str:
    """The problem as the model reads it."""
    return "+".join(map(str, digits)) + "="


def write_problems(path: Path, recipe: Recipe, rng: random.Random, count: int, *, held_out: bool) -> None:
    """Write distinct problems with their answers."""
    problems: dict[str, str] = {}
    while len(problems) < count:
        digits = draw_problem(recipe, rng, held_out=held_out)
        problems[prompt_of(digits)] = str(sum(digits) % 10)
    with path.open("w") as file:
        for prompt, answer in problems.items():
            file.write(json.dumps({"prompt": prompt, "answer": answer}) + "\n")


def teacher_answer(digits: list[int], rng: random.Random, carry_error: float) -> str:
    """The running sum step by step, with wrong carries; the chain goes on from a wrong value."""
    total, steps = digits[0], []
    for digit in digits[1:]:
        result = (total + digit) % 10
        if total + digit >= 10 and rng.random() < carry_error:
            result = (result + 1) % 10
        steps.append(f"{total}+{digit}={result};")
        total = result
    return "".join(steps) + f"#{total}"


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each character."""
    vocabulary = {token: index for index, token in enumerate([PAD, EOS, *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD, unk_token=PAD)


def make_model(tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    """A Qwen2 model of half a million parameters."""
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            tie_word_embeddings=True,
            initializer_range=0.03,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def warm_start(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, recipe: Recipe, rng: random.Random) -> None:
    """Imitate the teacher until it is learnt, then let the learning rate fall; the loss counts answers alone."""
    started = time.perf_counter()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    recent: deque[float] = deque(maxlen=20)
    last_update = recipe.max_updates
    for update in range(1, recipe.max_updates + 1):
        remaining = (last_update - update + 1) / recipe.decay_updates
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * min(update / WARMUP_UPDATES, 1.0, remaining)
        recent.append(supervised_update(model, optimizer, *teacher_batch(tokenizer, recipe, rng)))
        loss = sum(recent) / len(recent)
        if update % 50 == 0:
            logger.info("warm start: update %d, loss %.3f", update, loss)
        if loss < recipe.learnt_loss and last_update == recipe.max_updates:
            last_update = min(update + recipe.decay_updates, recipe.max_updates)
        if update == last_update:
            break
    logger.info("warm start: %d updates, loss %.3f, %.1f s", update, loss, time.perf_counter() - started)
    if loss > recipe.learnt_loss:
        sys.exit(f"seed = {recipe.seed}: the warm start did not learn its teacher (loss {loss:.3f}); choose another")


def supervised_update(
    model: Qwen2ForCausalLM, optimizer: torch.optim.Optimizer, token_ids: torch.Tensor, labels: torch.Tensor
) -> float:
    """One update on a batch of [batch, T]; returns its loss."""
    logits = model(input_ids=token_ids).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return float(loss.detach())


def teacher_batch(
    tokenizer: PreTrainedTokenizerFast, recipe: Recipe, rng: random.Random
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and labels [batch, T], padded; labels are −100 outside answers."""
    rows = []
    for _ in range(recipe.batch):
        digits = draw_problem(recipe, rng, held_out=False)
        prompt = tokenizer.encode(prompt_of(digits))
        answer = tokenizer.encode(teacher_answer(digits, rng, recipe.carry_error)) + [tokenizer.eos_token_id]
        rows.append((prompt, answer))
    longest = max(len(prompt) + len(answer) for prompt, answer in rows)
    token_ids = torch.full((recipe.batch, longest), tokenizer.pad_token_id)
    labels = torch.full((recipe.batch, longest), -100)
    for row, (prompt, answer) in enumerate(rows):
        token_ids[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
    return token_ids, labels


if __name__ == "__main__":
    main()
