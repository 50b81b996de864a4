"""Maker: another model goes on with a session only if its words are the same."""

import pytest

from outrider import LLM, AsyncLLM
from outrider.serve.app import create_app
from outrider.serve.base import ServeConfig
from tests.engine.tiny_checkpoint import TEXT, write_checkpoint
from tests.serve.conftest import TEMPLATE, client_of
from tests.serve.test_sessions import TURN, create, kept, post, say


@pytest.fixture
def serving(tmp_path):
    """Servers one after the other over one folder."""

    class Process:
        def __init__(self, name, text=TEXT, template=TEMPLATE, **options):
            folder = tmp_path / name
            options = {"max_position_embeddings": 512, **options}
            self.llm = LLM(str(write_checkpoint(folder, text, **options)), policy="fixed")
            self.llm.tokenizer.backend.chat_template = template
            config = ServeConfig(drain_s=0, state_dir=tmp_path / "state", served_model_name=name)
            self.app = create_app(AsyncLLM(self.llm), config)

        async def __aenter__(self):
            self.lifespan = self.app.router.lifespan_context(self.app)
            await self.lifespan.__aenter__()
            self.client = await client_of(self.app).__aenter__()
            return self.client

        async def __aexit__(self, *error):
            await self.client.aclose()
            await self.lifespan.__aexit__(*error)

    return Process


OTHERS = {
    "words": {"text": TEXT * 2 + "zebras are quizzical, and jinxed\n" * 40},
    "template": {"template": TEMPLATE.replace("assistant: ", "model: ")},
}


@pytest.mark.parametrize("other", OTHERS)
async def test_one_of_other_words_is_refused_by_both_names(serving, other):
    async with serving("first") as client:
        session = (await create(client))["id"]
        answer = await say(client, session, "one")
    place = f"/v1/sessions/{session}"
    calls = [
        (f"{place}/responses", {**TURN, "input": "two"}),
        ("/v1/responses", {**TURN, "input": "two", "previous_response_id": answer["id"]}),
        (f"{place}/append", {"input": "two"}),
        (f"{place}/append", {"token_ids": [5]}),
        (f"{place}/truncate", {"chars": 1}),
    ]
    async with serving("second", **OTHERS[other]) as client:
        for path, body in calls:
            refused = (await post(client, path, body, 409))["error"]
            assert "'first'" in refused["message"], path
            assert "'second'" in refused["message"]
            assert refused["param"] is None
        told = (await client.get(f"/v1/outrider/transcripts/{session}")).json()
        assert told["data"][-1]["text"] == answer["output"][0]["content"][0]["text"]
        await say(client, (await create(client))["id"], "a session of its own")
    async with serving("first") as client:
        await say(client, session, "two")


async def test_one_of_other_weights_goes_on_cold_and_says_why(serving):
    async with serving("first") as client:
        session = (await create(client))["id"]
        await say(client, session, "some words that fill a block or two")
        kept(client).warmer._used.clear()  # as after a kill: no state is written out
    async with serving("second", num_hidden_layers=3) as client:
        report = (await say(client, session, "two"))["outrider"]["session"]
        assert (report["kv_hit_tokens"], report["restored_from"]) == (0, None)
        assert report["cold_reason"].startswith("weights were those of 'first' (")
        assert "are those of 'second' (" in report["cold_reason"]
        again = (await say(client, session, "three"))["outrider"]["session"]
        assert "cold_reason" not in again
