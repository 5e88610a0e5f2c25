"""diffusers schedulers compiled to coefficient tables; diffusers stays the reference."""

from .compile import CompileError, compile_scheduler
from .presets import make_scheduler, sampler_table
from .table import MAX_ORDER, SamplerTable

__all__ = ["MAX_ORDER", "CompileError", "SamplerTable", "compile_scheduler", "make_scheduler", "sampler_table"]
