"""Outrider: speculative decoding that keeps the target model's output.

The names are loaded when they are first asked for, so that what needs no model, such as
`outrider.client`, does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from outrider.engine.async_llm import AsyncLLM
    from outrider.engine.llm import LLM
    from outrider.engine.outputs import RequestOutput
    from outrider.request import SamplingParams, SpeculationParams

__all__ = ["LLM", "AsyncLLM", "RequestOutput", "SamplingParams", "SpeculationParams"]
__version__ = "0.1.0"

_MODULES = {
    "AsyncLLM": "outrider.engine.async_llm",
    "LLM": "outrider.engine.llm",
    "RequestOutput": "outrider.engine.outputs",
    "SamplingParams": "outrider.request",
    "SpeculationParams": "outrider.request",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module 'outrider' has no attribute {name!r}")
    found = getattr(import_module(_MODULES[name]), name)
    globals()[name] = found  # the next time nobody asks here
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
