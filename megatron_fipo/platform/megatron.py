"""Imported before any `megatron` import: on a machine without CUDA it puts the CPU patches in place first."""

from megatron_fipo.platform import cpu_shims

cpu_shims.install()
