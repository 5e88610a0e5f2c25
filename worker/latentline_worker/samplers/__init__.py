"""diffusers schedulers compiled to coefficient tables; diffusers stays the reference."""

from .compile import compile_scheduler
from .presets import make_scheduler, names_for, sampler_table
from .table import MAX_ORDER, SamplerTable
from .trajectory import CompileError, is_flow

__all__ = ["MAX_ORDER", "CompileError", "SamplerTable", "compile_scheduler", "is_flow", "make_scheduler", "names_for", "sampler_table"]
