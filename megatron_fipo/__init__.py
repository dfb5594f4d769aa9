"""RL post-training with FIPO on megatron-core actors and SGLang rollouts."""

__version__ = "0.1.0"
