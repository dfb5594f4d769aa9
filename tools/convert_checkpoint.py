"""Converts between checkpoints and Hugging Face folders: `megatron-fipo convert` for those who look for a script.

python tools/convert_checkpoint.py to-hf RUN|CHECKPOINT OUT
torchrun --nproc-per-node 8 tools/convert_checkpoint.py to-megatron HF OUT
"""

import sys

from megatron_fipo.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
