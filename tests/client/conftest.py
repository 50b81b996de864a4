"""The servers of tests/serve, for clients."""

from tests.serve.conftest import llm as llm, serve as serve
