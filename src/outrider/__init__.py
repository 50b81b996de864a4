"""Outrider: speculative decoding that keeps the target model's output."""

from outrider.engine.async_llm import AsyncLLM
from outrider.engine.llm import LLM
from outrider.engine.outputs import RequestOutput
from outrider.request import SamplingParams, SpeculationParams

__all__ = ["LLM", "AsyncLLM", "RequestOutput", "SamplingParams", "SpeculationParams"]
__version__ = "0.1.0"
