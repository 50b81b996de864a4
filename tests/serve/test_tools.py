"""Tools and calls: read alike however the text is cut, nothing said twice or taken back."""

import json

import pytest
from hypothesis import example, given, strategies as st

from outrider.errors import RequestError
from outrider.serve.call_formats import (
    ForcedArgumentsParser,
    ForcedCallsParser,
    HermesParser,
    LlamaParser,
    MistralParser,
)
from outrider.serve.call_parser import read
from outrider.serve.calls import Call, CallArguments, CallStart, Reply, Text, gather
from outrider.serve.tools import Tool, ToolUse, call_format, instructions, knows_tools

NAMES = frozenset({"weather", "f"})
PARSERS = {
    "hermes": lambda: HermesParser(NAMES),
    "llama": lambda: LlamaParser(NAMES),
    "mistral": lambda: MistralParser(NAMES),
    "list": ForcedCallsParser,
    "arguments": lambda: ForcedArgumentsParser("f"),
}
WEATHER = '{"city": "Paris", "days": [1, 2.5e3, true, null]}'
CALL = f'{{"name": "weather", "arguments": {WEATHER}}}'
TRICKY = '{"code": "</tool_call> [TOOL_CALLS] \\"}\\\\", "é": {"a": "{"}}'
TRICKY_CALL = f'{{"arguments": {TRICKY}, "name": "f"}}'

WHOLE = [
    ("hermes", "just text", "just text", []),
    ("hermes", " blanks stay \n", " blanks stay \n", []),
    ("hermes", "a <tool_cal> b <tool_call", "a <tool_cal> b <tool_call", []),
    ("hermes", "<<tool_call>" + CALL + "</tool_call>", "<", [("weather", WEATHER)]),
    ("hermes", f"<tool_call>\n{CALL}\n</tool_call>", "", [("weather", WEATHER)]),
    (
        "hermes",
        f"Look.\n<tool_call>{CALL}</tool_call>\n<tool_call>{TRICKY_CALL}</tool_call>\n",
        "Look.",
        [("weather", WEATHER), ("f", TRICKY)],
    ),
    (
        "hermes",
        f"<tool_call>{CALL}<tool_call>{CALL}</tool_call> Done.",
        " Done.",
        [("weather", WEATHER)] * 2,
    ),
    ("hermes", f"<tool_call>{CALL}", "", [("weather", WEATHER)]),
    ("hermes", '<tool_call>{"name": "f"}</tool_call>', "", [("f", "{}")]),
    ("hermes", '<tool_call>{"name": "f", "arguments": null}</tool_call>', "", [("f", "{}")]),
    (
        "hermes",
        '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>',
        "",
        [("f", '{"a": 1}')],
    ),
    ("hermes", "<tool_call>no JSON</tool_call>x", "<tool_call>no JSON</tool_call>x", []),
    ("hermes", '<tool_call>{"name": 3}</tool_call>', '<tool_call>{"name": 3}</tool_call>', []),
    ("hermes", '<tool_call>{"name": "f", ', '<tool_call>{"name": "f", ', []),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": [1', "", [("f", '{"a": [1')]),
    (
        "hermes",
        '<tool_call>{"name": "f", "arguments": {"a": \'x\'}}</tool_call> and',
        " and",
        [("f", '{"a": ')],
    ),
    ("llama", '{"name": "f", "parameters": {"a": 1}}', "", [("f", '{"a": 1}')]),
    (
        "llama",
        f'<|python_tag|>{{"name": "f", "parameters": {{}}}}; {CALL}',
        "",
        [("f", "{}"), ("weather", WEATHER)],
    ),
    ("llama", '{"name": "Bob", "age": 3}', '{"name": "Bob", "age": 3}', []),
    ("llama", '{"name": "f", "age": 3} x', '{"name": "f", "age": 3} x', []),
    ("llama", '{"type": "function", "name": "f", "parameters": {}}', "", [("f", "{}")]),
    ("llama", "<|python_tag|>print(1)", "<|python_tag|>print(1)", []),
    ("llama", "<|python", "<|python", []),
    ("llama", " text {", " text {", []),
    ("mistral", f"[TOOL_CALLS][{CALL}, {CALL}]", "", [("weather", WEATHER)] * 2),
    ("mistral", f"Hm. [TOOL_CALLS] [{CALL}]", "Hm.", [("weather", WEATHER)]),
    (
        "mistral",
        f'[TOOL_CALLS]weather[ARGS]{WEATHER}[TOOL_CALLS]f{{"a": "[TOOL_CALLS]"}}',
        "",
        [("weather", WEATHER), ("f", '{"a": "[TOOL_CALLS]"}')],
    ),
    ("mistral", f"[TOOL_CALLS]{CALL}", "", [("weather", WEATHER)]),
    ("mistral", "[TOOL_CALLS]not a call\nat all", "[TOOL_CALLS]not a call\nat all", []),
    ("mistral", "[TOOL_CALLS][1]", "[TOOL_CALLS][1]", []),
    ("mistral", "[TOOL_CALLS]f", "[TOOL_CALLS]f", []),
    ("mistral", "[TOOL", "[TOOL", []),
    ("list", f"[{CALL}, {TRICKY_CALL}]\n", "", [("weather", WEATHER), ("f", TRICKY)]),
    ("list", '[{"name": "f", "arguments": {"a', "", [("f", '{"a')]),
    ("list", '[{"name": "f', "", []),
    ("list", " [ ", "", []),
    ("list", f'[{CALL}, {{"name": "f', "", [("weather", WEATHER)]),
    ("arguments", f" {WEATHER}\n", "", [("f", WEATHER)]),
    ("arguments", '{"a": ', "", [("f", '{"a": ')]),
]
FRAGMENTS = [
    *("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>"),
    *(CALL, TRICKY_CALL, WEATHER, "weather", "f", '{"name": "f"', '"arguments": ', "parameters"),
    *("{", "}", "[", "]", ",", ":", ";", '"', "\\", " ", "\n", "<", "é", "1", "null", "text", "'"),
]
TEXTS = st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join)


@pytest.mark.parametrize(("kind", "text", "content", "calls"), WHOLE)
def test_whole_texts(kind, text, content, calls):
    assert read(PARSERS[kind](), text) == Reply(content, tuple(Call(*call) for call in calls))


@pytest.mark.parametrize(("kind", "text", "content", "calls"), WHOLE)
def test_texts_character_by_character(kind, text, content, calls):
    reply = gather(in_chunks(PARSERS[kind](), list(text)))
    assert reply == Reply(content, tuple(Call(*call) for call in calls))


@given(kind=st.sampled_from(list(PARSERS)), text=TEXTS, data=st.data())
def test_every_cutting_reads_alike(kind, text, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    chunks = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert gather(in_chunks(PARSERS[kind](), chunks)) == read(PARSERS[kind](), text)


@given(kind=st.sampled_from(list(PARSERS)), text=TEXTS)
@example(kind="mistral", text="[TOOL_CALLS][")
def test_calls_are_announced_once_and_in_order(kind, text):
    begun = []
    for piece in in_chunks(PARSERS[kind](), list(text)):
        if isinstance(piece, CallStart):
            assert piece.index == len(begun)
            begun.append(piece.name)
        elif isinstance(piece, CallArguments):
            assert piece.index == len(begun) - 1
            assert piece.text
        else:
            assert piece.text


@given(text=TEXTS.filter(lambda t: "<tool_call>" not in t))
def test_text_without_a_marker_is_content(text):
    assert read(HermesParser(), text) == Reply(text, ())


def test_content_is_not_held_longer_than_needed():
    parser = HermesParser()
    assert parser.feed("so <tool") == [Text("so")]
    assert parser.feed("box") == [Text(" <toolbox")]


def test_arguments_come_as_they_are_written():
    parser = HermesParser()
    assert parser.feed('<tool_call>{"name": "f", "arguments": {"a"') == [
        CallStart(0, "f"),
        CallArguments(0, '{"a"'),
    ]
    assert parser.feed(": 1") == [CallArguments(0, ": 1")]
    assert parser.feed("}}</tool_call>") == [CallArguments(0, "}")]
    assert parser.finish() == []


def test_half_a_surrogate_pair_is_no_name():
    text = '<tool_call>{"name": "\\ud800"}</tool_call>'
    assert read(HermesParser(), text) == Reply(text, ())


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ messages }}", "hermes"),
        ("... <tool_call> ... tools ...", "hermes"),
        ("... [TOOL_CALLS] ...", "mistral"),
        ("... <|python_tag|> ...", "llama3_json"),
    ],
)
def test_format_is_read_off_the_template(template, expected):
    assert call_format(template) == expected


def test_formats_that_are_not_read_are_refused():
    with pytest.raises(RequestError, match="<function=") as refused:
        call_format("<tool_call><function=f>")
    assert "required" in str(refused.value)


def test_instructions_list_every_tool():
    text = instructions([Tool("f", "Does it."), Tool("g")])
    assert '"name": "f"' in text
    assert '"name": "g"' in text
    assert "<tool_call>" in text
    assert knows_tools("{% if tools %}")
    assert not knows_tools("{{ messages }}")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"tools": (Tool("f"), Tool("f"))}, "name of its own"),
        ({"choice": "auto"}, "no tools"),
        ({"tools": (Tool("f"),), "choice": "function", "name": "g"}, "no such tool"),
    ],
)
def test_impossible_uses_are_refused(options, named):
    with pytest.raises(RequestError, match=named):
        ToolUse(**options)


def test_schema_of_a_named_function_is_its_own():
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    use = ToolUse(tools=(Tool("f", parameters=schema),), choice="function", name="f")
    assert use.schema() == schema
    assert use.is_forced


def test_schema_of_required_calls_is_a_list_of_them():
    first = {"type": "object", "properties": {"a": {"$ref": "#/$defs/A"}}, "$defs": {"A": {}}}
    use = ToolUse(
        tools=(Tool("f", parameters=first), Tool("g")), choice="required", is_parallel=False
    )
    schema = use.schema()
    assert schema["$defs"] == {"A": {}}
    assert (schema["minItems"], schema["maxItems"]) == (1, 1)
    names = [item["properties"]["name"]["const"] for item in schema["items"]["anyOf"]]
    assert names == ["f", "g"]
    assert "$defs" not in json.dumps(schema["items"]).replace("#/$defs/A", "")


def test_definitions_that_clash_are_refused():
    tools = [
        Tool(name, parameters={"type": "object", "$defs": {"A": {"const": name}}}) for name in "fg"
    ]
    with pytest.raises(RequestError, match="differently"):
        ToolUse(tools=tuple(tools), choice="required").schema()


def in_chunks(parser, chunks):
    return [piece for chunk in chunks for piece in parser.feed(chunk)] + parser.finish()
