"""Architectures that servers on a machine without CUDA load without a look at all others.

SGLANG_EXTERNAL_MODEL_PACKAGE names this package. SGLang then imports its two hundred model files only for an
architecture that is not here.
"""
