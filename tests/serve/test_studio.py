"""The studio: its files and headers, its modules in node, its methods, and the page in Chromium."""

import json
import random
import re
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

from outrider import AsyncLLM
from outrider.engine.resolve import resolve
from outrider.registry import DRAFTERS, POLICIES, VERIFIERS
from outrider.request import SamplingParams, SpeculationParams
from outrider.serve.app import create_app
from outrider.serve.config import ServeConfig
from outrider.serve.studio import FILES, FOLDER, POLICY, TYPES
from tests.serve import studio_stub
from tests.serve.pages import Served, needs_node, node

PAGE = (FOLDER / "index.html").read_text()
MODULES = {path.name: path.read_text() for path in FOLDER.glob("*.js")}


# Files.


@pytest.mark.parametrize("name", sorted(FILES))
async def test_files_are_served_with_type_and_policy(client, name):
    answer = await client.get(f"/studio/{name}")
    assert answer.status_code == 200
    assert answer.content == FILES[name].read_bytes()
    assert answer.headers["content-type"] == TYPES[Path(name).suffix]
    assert answer.headers["content-security-policy"] == POLICY
    assert answer.headers["x-content-type-options"] == "nosniff"


async def test_the_page_is_served_without_a_key_and_nothing_else_is(serve):
    client = await serve(api_keys={"secret": "somebody"})
    page = await client.get("/")
    assert page.status_code == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert page.text == PAGE
    assert (await client.get("/v1/outrider/methods")).status_code == 401
    headers = {"Authorization": "Bearer secret"}
    assert (await client.get("/v1/outrider/methods", headers=headers)).status_code == 200


@pytest.mark.parametrize("name", ["nothing.js", "..%2Fstudio.py", "studio.py"])
async def test_no_other_file_is_served(client, name):
    answer = await client.get(f"/studio/{name}")
    assert answer.status_code == 404


def test_all_files_of_the_folder_are_known():
    assert {path.name for path in FOLDER.iterdir() if path.is_file()} == set(FILES)


def test_the_policy_lets_nothing_foreign_in():
    sources = {part.split()[0]: part.split()[1:] for part in POLICY.split("; ")}
    assert sources.pop("default-src") == ["'none'"]
    assert {source for allowed in sources.values() for source in allowed} == {"'self'", "'none'"}


def test_nothing_comes_from_elsewhere():
    namespaces = {"http://www.w3.org/2000/svg"}
    for path in FILES.values():
        assert set(re.findall(r"https?://[^\"'\s)>]+", path.read_text())) <= namespaces, path.name


# The page.


class Elements(HTMLParser):
    """All elements of the page, as (tag, attributes, text right inside)."""

    def __init__(self):
        super().__init__()
        self.found = []
        self.feed(PAGE)

    def handle_starttag(self, tag, attrs):
        self.found.append([tag, dict(attrs), ""])

    def handle_data(self, data):
        if self.found:
            self.found[-1][2] += data.strip()

    def attributes(self, name):
        return [attrs[name] for _, attrs, _ in self.found if name in attrs]


ELEMENTS = Elements()
IDS = ELEMENTS.attributes("id")


def test_ids_are_unique():
    assert len(IDS) == len(set(IDS))


def test_elements_that_scripts_ask_for_exist():
    asked = {name for code in MODULES.values() for name in re.findall(r'byId\("([^"]+)"\)', code)}
    assert len(asked) > 40
    assert asked - set(IDS) == set()
    patterns = {p for code in MODULES.values() for p in re.findall(r"byId\(`([^`]+)`\)", code)}
    for pattern in patterns:
        shape = re.compile(re.sub(r"\\\$\\\{[^}]*\\\}", r"[\\w-]+", re.escape(pattern)) + "$")
        assert any(shape.match(one) for one in IDS), pattern


@pytest.mark.parametrize(
    "attribute", ["for", "aria-labelledby", "aria-describedby", "aria-controls", "data-opens"]
)
def test_references_lead_somewhere(attribute):
    for value in ELEMENTS.attributes(attribute):
        assert set(value.split()) <= set(IDS), value


def test_every_control_has_a_name():
    labelled = set(ELEMENTS.attributes("for"))
    wrapped = set(re.findall(r"<label class=\"check[\w ]*\"><input id=\"([\w-]+)\"", PAGE))
    radios = re.findall(r"<label class=\"check\"><input type=\"radio\"[^>]*> \w", PAGE)
    for tag, attrs, text in ELEMENTS.found:
        if tag in ("select", "textarea", "input") and attrs.get("type") != "radio":
            assert attrs["id"] in labelled | wrapped, attrs
        if tag in ("button", "summary"):
            assert text or "aria-label" in attrs, attrs
        if tag == "img":
            assert "alt" in attrs
    assert len(radios) == 2


def test_no_script_or_style_is_inline():
    assert re.findall(r"<script(?![^>]*\bsrc=)", PAGE) == []
    assert re.findall(r"<style|\bstyle=|\son\w+=", PAGE) == []
    for name, code in MODULES.items():
        assert not re.search(r"innerHTML|insertAdjacentHTML|document\.write|\beval\(", code), name


def themes():
    """Light and dark colours by name; the two dark blocks must agree."""
    style = (FOLDER / "studio.css").read_text()
    blocks = re.findall(r":root[^{]*\{([^}]*)\}", style)
    read = [dict(re.findall(r"--([\w-]+): (#\w{6});", block)) for block in blocks]
    light, dark, chosen = (block for block in read if block)
    assert dark == chosen
    assert dark.keys() == light.keys()
    return {"light": light, "dark": dark}


def luminance(colour):
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one, other):
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_contrast_is_enough(theme):
    colours = themes()[theme]
    for ink in ("ink", "muted", "tail", "bad"):
        for ground in ("page", "panel"):
            assert contrast(colours[ink], colours[ground]) >= 4.5, (ink, ground)
    for mark in ("accepted", "corrected", "bonus"):
        assert contrast(colours["ink"], colours[f"{mark}-back"]) >= 4.5, mark
        assert contrast(colours[mark], colours[f"{mark}-back"]) >= 3, mark  # its underline
    assert contrast(colours["on-accent"], colours["accent"]) >= 4.5
    assert contrast(colours["strong-line"], colours["panel"]) >= 3  # borders of fields


def test_marks_differ_without_colour():
    style = (FOLDER / "studio.css").read_text()
    lines = re.findall(r"^\.tok\.\w+ \{.*underline (\w+)", style, flags=re.MULTILINE)
    assert len(lines) == len(set(lines)) == 4


# The modules.


@needs_node
@pytest.mark.parametrize("name", sorted(MODULES))
def test_modules_parse(modules, name):
    subprocess.run(["node", "--check", str(modules / name)], check=True, timeout=60)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_are_exported(name):
    code = MODULES[name]
    for names, source in re.findall(r'import \{([^}]*)\} from "\./([\w.]+)"', code):
        exports = re.findall(
            r"export (?:async )?(?:function\*?|const|class) (\w+)", MODULES[source]
        )
        assert {one.strip() for one in names.split(",")} - set(exports) == set(), source


def delta(number, text, **more):
    kind = "response.output_text.delta"
    return {"type": kind, "sequence_number": number, "delta": text, **more}


def tail(base, version, text):
    return {"type": "outrider:output_text.tail", "base": base, "v": version, "text": text}


# The protocol's example, with tails that come late added: an old base, a version that is not new.
TRANSCRIPT = [
    {"type": "response.created", "sequence_number": 0, "response": {"id": "r1"}},
    delta(4, "The"),
    tail(4, 1, " answer is likely no"),
    delta(5, " answer is yes"),
    tail(4, 2, " stale"),
    tail(5, 2, ", with caveats"),
    tail(5, 2, " a copy"),
    delta(6, ", with caveats."),
    {"type": "response.completed", "sequence_number": 10,
     "response": {"id": "r1", "status": "completed", "outrider": {"exactness": {"mode": "exact"}}}},
    tail(10, 9, " after the end"),
]  # fmt: skip
SHOWN = [
    ("", ""),
    ("The", ""),
    ("The", " answer is likely no"),
    ("The answer is yes", ""),
    ("The answer is yes", ""),
    ("The answer is yes", ", with caveats"),
    ("The answer is yes", ", with caveats"),
    ("The answer is yes, with caveats.", ""),
    ("The answer is yes, with caveats.", ""),
    ("The answer is yes, with caveats.", ""),
]
READ = """
import { Reader } from "MODULES/protocol.js";
const scripts = INPUT;
const shown = scripts.map((script) => {
  const reader = new Reader();
  return script.map((event) => { reader.take(event); return [reader.committed, reader.tail]; });
});
console.log(JSON.stringify(shown));
"""


@needs_node
def test_the_reader_follows_the_worked_transcript(modules):
    (shown,) = node(READ, modules, [TRANSCRIPT])
    assert [tuple(one) for one in shown] == SHOWN


def expected(script):
    """The shortest client that is right."""
    committed, tail, last, v = "", "", -1, -1
    for event in script:
        if "sequence_number" in event:
            last, tail = event["sequence_number"], ""
            committed += event["delta"]
        elif event["base"] == last and event["v"] > v:
            tail, v = event["text"], event["v"]
        yield [committed, tail]


@needs_node
def test_the_reader_agrees_with_the_design_on_random_streams(modules):
    draw = random.Random(7)
    scripts = []
    for _ in range(200):
        script, last, version = [], 0, 0
        for _ in range(30):
            if draw.random() < 0.5:
                last += 1
                script.append(delta(last, draw.choice(["a", "bc ", "é", "🙂"])))
            else:
                version += draw.choice([0, 1])
                script.append(tail(draw.choice([last, last - 1]), version, f"t{version}"))
        scripts.append(script)
    shown = node(READ, modules, scripts)
    assert shown == [list(expected(script)) for script in scripts]
    assert sum(tail != "" for script in shown for _, tail in script) > 500


def chunk(text, **more):
    choice = {"index": 0, "delta": {"content": text} if text else {}, "finish_reason": None}
    return {"choices": [choice], **more}


@needs_node
def test_the_reader_counts_code_points_in_chat(modules):
    def expects(chars, version, text):
        return chunk("", outrider={"tail": {"committed_chars": chars, "v": version, "text": text}})

    script = [chunk("a🙂"), expects(3, 1, " utf-16"), expects(2, 2, " points"), chunk("b"),
              {"choices": [], "usage": {"completion_tokens": 2}}]  # fmt: skip
    (shown,) = node(READ, modules, [script])
    assert shown == [["a🙂", ""], ["a🙂", ""], ["a🙂", " points"], ["a🙂b", ""], ["a🙂b", ""]]


KINDS = """
import { depth, kinds } from "MODULES/protocol.js";
const steps = INPUT;
console.log(JSON.stringify(steps.map((step) => [kinds(step), depth(step)])));
"""


@needs_node
def test_kinds_of_tokens(modules):
    def branched(*path):
        return {"tokens": ["a", "b", "c"], "parents": [-1, 0, -1], "accepted": path}

    def step(tokens, accepted, num_drafted, **tree):
        return {"tokens": list(tokens), "accepted": accepted, "num_drafted": num_drafted, **tree}

    steps = [
        step("a", 0, 0),
        step("ab", 1, 4),
        step("abx", 2, 2),
        step("ab", 2, 2),
        step("abx", 2, 3, tree=branched(0, 1)),
        step("ax", 1, 3, tree=branched(0)),
        step("cx", 1, 3, tree=branched(2)),
        step("x", 0, 3, tree=branched()),
    ]
    assert node(KINDS, modules, steps) == [
        [["plain"], 0],
        [["accepted", "corrected"], 4],
        [["accepted", "accepted", "bonus"], 2],
        [["accepted", "accepted"], 2],
        [["accepted", "accepted", "bonus"], 2],
        [["accepted", "corrected"], 2],
        [["accepted", "bonus"], 2],
        [["corrected"], 2],
    ]


ALONE = """
import { alone } from "MODULES/protocol.js";
console.log(JSON.stringify(INPUT.map((step) => step.tokens.map((_, i) => alone(step, i)))));
"""


@needs_node
def test_tokens_without_text_are_shown_as_what_they_are(modules):
    steps = [
        {"tokens": ["A", ""], "without_text": {"1": "\\xe2"}},
        {"tokens": ["", ""], "without_text": {"0": "\\x82", "1": "</s>"}},
        {"tokens": ["a", ""]},  # a conversation that was kept before servers told it
    ]
    assert node(ALONE, modules, steps) == [["A", "\\xe2"], ["\\x82", "</s>"], ["a", ""]]


RATES = """
import { rates } from "MODULES/charts.js";
const [steps, scripts] = INPUT;
console.log(JSON.stringify(scripts.map((times) => rates(steps, times))));
"""


@needs_node
def test_speeds_of_what_came_at_once_are_not_told(modules):
    steps = [{"tokens": ["a", "b"]}] * 13
    even, at_once = [10 * i for i in range(13)], [i / 100 for i in range(13)]
    found, nothing = node(RATES, modules, [steps, [even, at_once]])
    assert nothing == []
    assert len(found) == 4
    assert sum(found) / len(found) == pytest.approx(200)


FRAMES = """
import { frames } from "MODULES/protocol.js";
const found = [];
for await (const frame of frames(INPUT)) found.push(frame.data);
console.log(JSON.stringify(found));
"""


@needs_node
@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_frames_survive_any_cut(modules, size, line_end):
    wire = (
        'id: 1\nevent: x\ndata: {"a":1}\n\n: comment\n\ndata: two\ndata: lines\n\ndata: [DONE]\n\n'
    )
    wire = wire.replace("\n", line_end)
    pieces = [wire[i : i + size] for i in range(0, len(wire), size)]
    found = node(FRAMES, modules, pieces)
    assert found == ['{"a":1}', "two\nlines", "[DONE]"]


EXAMPLE = """
const wire = INPUT;
globalThis.fetch = async (path, { body }) => {
  if (path !== "/v1/responses" || JSON.parse(body).stream !== true) throw new Error(path);
  const bytes = new TextEncoder().encode(wire);
  return { body: ReadableStream.from([bytes.slice(0, 90), bytes.slice(90)]) };
};
const lines = [];
console.log = (...parts) => lines.push(parts.join(""));
CODE
process.stdout.write(JSON.stringify(lines));
"""


@needs_node
def test_the_example_of_the_page_works(modules):
    """Ten lines or fewer; it shows what the reader shows."""
    (code,) = re.findall(r'<code id="example">(.*?)</code>', PAGE, flags=re.DOTALL)
    code = code.replace("&gt;", ">").replace("&lt;", "<").replace("&amp;", "&")
    assert len(code.strip().splitlines()) <= 10
    frames = [f"event: {event['type']}\ndata: {json.dumps(event)}\n\n" for event in TRANSCRIPT[:-1]]
    lines = node(EXAMPLE.replace("CODE", code), modules, "".join([*frames, "data: [DONE]\n\n"]))
    assert lines[:-1] == [f"{committed}|{tail}" for committed, tail in SHOWN[:-1]]
    assert lines[-1] == SHOWN[-1][0]


# What can be chosen.


async def test_methods_are_those_of_registry_and_engine(client, llm):
    found = (await client.get("/v1/outrider/methods")).json()
    methods = {one["name"]: one for one in found["methods"]}
    rules = {one["name"]: one for one in found["rules"]}
    assert set(methods) >= set(DRAFTERS.names())
    assert set(rules) >= set(VERIFIERS.names())
    assert {n for n, one in methods.items() if one["is_here"]} == set(llm.engine.drafters.names())
    assert all((one["reason"] is None) == one["is_here"] for one in methods.values())
    assert found["defaults"] == {
        "method": "draft_model",
        "rule": "sampled",
        "policy": "fixed",
    }
    assert methods["ngram"]["num_draft_tokens"] == llm.engine.drafters["ngram"].default_draft_tokens
    assert rules["sampled"]["exactness"] == "exact"
    assert rules["sampled"]["is_default"]
    assert "POST /v1/chat/completions" in found["endpoints"]
    assert "visibility" in found["stream_options"]


async def test_policies_are_those_of_the_engine(client, llm):
    found = (await client.get("/v1/outrider/methods")).json()["policies"]
    assert {one["name"] for one in found} == set(llm.engine.controller.policies)
    assert {one["name"] for one in found} >= set(POLICIES.names())
    assert [one["name"] for one in found if one["is_default"]] == ["fixed"]


async def test_options_of_methods_policies_and_rules_are_told(client):
    found = (await client.get("/v1/outrider/methods")).json()
    parts = [*found["methods"], *found["policies"], *found["rules"]]
    options = [option for part in parts for option in part["options"].values()]
    assert options
    for option in options:
        assert set(option) == {"default", "meaning", "low", "high", "choices"}
        assert option["meaning"]
        if isinstance(option["default"], str) and option["choices"]:
            assert option["default"] in option["choices"]


async def test_rules_offered_for_a_method_are_taken_by_the_engine(client, llm):
    found = (await client.get("/v1/outrider/methods")).json()
    engine = llm.engine
    offered = {(one["name"], rule) for one in found["methods"] for rule in one["rules"]}
    for method in (one for one in found["methods"] if one["is_here"]):
        ids = (0,) if "prediction" in method["needs"] else None
        for rule in (one["name"] for one in found["rules"] if one["is_allowed"]):
            asked = SpeculationParams(
                method=method["name"], verifier=rule, prediction_token_ids=ids
            )
            try:
                resolve(asked, SamplingParams(), engine.drafters, "", engine.draft_model)
                is_taken = True
            except ValueError:
                is_taken = False
            assert ((method["name"], rule) in offered) == is_taken, (method["name"], rule)


async def test_rules_that_the_server_refuses_are_marked(serve):
    client = await serve(allow_lossy=False)
    found = (await client.get("/v1/outrider/methods")).json()
    allowed = {one["name"] for one in found["rules"] if one["is_allowed"]}
    lossy = {one["name"] for one in found["rules"] if one["exactness"] in ("lossy", "synthetic")}
    assert lossy
    assert not allowed & lossy
    assert not any(set(one["rules"]) & lossy for one in found["methods"])


# The page in a browser.


@pytest.fixture(scope="module")
def stub(llm) -> Iterator[Served]:
    served = Served(studio_stub.app_over(llm))
    yield served
    served.stop()


@pytest.fixture(scope="module")
def stub_without_sessions(llm) -> Iterator[Served]:
    served = Served(studio_stub.app_over(llm, has_sessions=False))
    yield served
    served.stop()


def say(page, text="What did the keeper write?"):
    before = page.locator(".turn.assistant:not([aria-busy])").count()
    page.fill("#message", text)
    page.press("#message", "Enter")
    page.locator(".turn.assistant:not([aria-busy])").nth(before).wait_for()


@pytest.mark.browser
def test_chat_shows_what_became_of_each_token(visit, stub):
    page = visit(stub.url)
    say(page)
    text = page.locator(".turn.assistant .text")
    assert text.inner_text() == studio_stub.TEXT
    marked = page.locator(".turn.assistant .tok")
    kinds = marked.evaluate_all("all => all.map((one) => one.className.replace('tok ', ''))")
    assert kinds.count("accepted") == sum(step.accepted for step in studio_stub.STEPS)
    assert kinds.count("bonus") == 3
    assert kinds.count("corrected") == 4
    assert kinds.count("plain") == 2
    assert "28 tokens in 9 steps, 3.11 tokens per step" in page.locator(".note").first.inner_text()
    assert "first 86 %" in page.locator("#value-acceptance").inner_text()
    assert page.locator("#chart-k .bar.part").count() == 9
    assert page.locator(".warmth").inner_text() == (
        "◐ warm: KV kept, 32 of 40 tokens; drafts ready in part: draft_model (R1) to 20"
    )
    assert studio_stub.TEXT[:20] in page.locator("#status").text_content()


@pytest.mark.browser
def test_keyboard_walks_the_steps_and_shows_their_trees(visit, stub):
    page = visit(stub.url)
    say(page)
    assert page.locator(".text .step[tabindex='0']").count() == 1
    page.locator(".text .step").first.focus()
    page.keyboard.press("ArrowRight")
    card = page.locator("#step-card")
    assert "Step 2: drafted by draft_model, K = 3" in card.inner_text()
    assert "2 of 5 drafted tokens accepted, then a correction." in card.inner_text()
    assert card.locator(".node.accepted").count() == 2
    assert card.locator(".node.fallen").count() == 3
    assert card.locator(".node.corrected").count() == 1
    assert page.locator(".step:focus").get_attribute("aria-label").startswith("Step 2: 2 of 5")
    page.keyboard.press("End")
    assert "Step 9" in card.inner_text()
    page.keyboard.press("Escape")
    assert not card.is_visible()


@pytest.mark.browser
def test_rewind_takes_back_and_fork_branches(visit, stub):
    page = visit(stub.url)
    say(page, "first")
    say(page, "second")
    page.get_by_role("button", name="Rewind to before this").nth(1).click()
    page.locator("#message").filter(has_text="").wait_for()
    assert page.input_value("#message") == "second"
    assert page.locator(".turn").count() == 2
    page.get_by_role("button", name="Fork from here").click()
    page.locator("#sessions li").nth(1).wait_for()
    assert page.locator("#sessions .title").all_inner_texts() == ["first (fork)", "first"]
    say(page, "on the branch")
    assert page.locator(".turn").count() == 4
    sent = [body["outrider"] for body in stub.app.state.bodies if "input" in body][-4:]
    heads = stub.app.state.heads
    assert sent[-1]["session"] != sent[-2]["session"]
    assert heads[sent[-1]["session"]][:2] == heads[sent[-2]["session"]]  # what they share
    page.locator(".session", has_text=re.compile("^first(?! \\(fork)")).click()
    assert page.locator(".turn").count() == 2


@pytest.mark.browser
def test_speculation_is_switched_between_turns(visit, stub):
    page = visit(stub.url)
    say(page, "one")
    page.select_option("#method", "suffix")
    page.fill("#draft-tokens", "3")
    page.select_option("#rule", "tree")
    page.locator("#width").focus()
    say(page, "two")
    page.select_option("#method", "off")
    say(page, "three")
    one, two, three = (body for body in stub.app.state.bodies[-3:])
    assert "speculation" not in one
    assert two["speculation"] == {"method": "suffix", "num_draft_tokens": 3, "verifier": "tree"}
    assert three["speculation"] == {"method": "off", "verifier": "tree"}
    assert one["stream_options"]["outrider"]["visibility"] == "provisional"


@pytest.mark.browser
def test_the_policy_is_switched_between_turns(visit, stub):
    """It holds from the next turn on, and what was in force is told under the select."""
    page = visit(stub.url)
    places = [page.locator(name).bounding_box() for name in ("#method", "#policy")]
    assert places[0]["y"] == places[1]["y"], "side by side"
    select, note, told = (page.locator(f"#policy{end}") for end in ("", "-note", "-in-force"))
    offered = select.locator("option").all_inner_texts()
    assert offered[0] == "fixed (default)"
    assert {"adaptive", "fixed", "off"} <= set(offered)
    assert told.inner_text() == ""
    for policy in ("", "adaptive", "off"):
        select.select_option(policy)
        assert note.inner_text().startswith(f"{policy or 'fixed'}: draft")
        assert page.get_attribute("#draft-tokens", "placeholder") == (policy or "4")
        say(page, f"with {policy}")
        assert told.inner_text() == f"In force in the last answer: {policy or 'fixed'}."
        answer = page.locator(".turn.assistant .note").last
        assert f"policy {policy or 'fixed'}" in answer.inner_text()
    page.select_option("#method", "off")
    assert select.is_disabled()
    say(page, "plainly")
    assert "nothing could be drafted" in told.inner_text()
    asked = [body.get("speculation") for body in stub.app.state.bodies[-4:]]
    assert asked == [None, {"policy": "adaptive"}, {"policy": "off"}, {"method": "off"}]


@pytest.mark.browser
def test_the_policy_of_a_given_size_is_told_before_it_is_used(visit, stub):
    page = visit(stub.url)
    page.select_option("#policy", "table")
    page.get_by_text("More of method, policy and rule").click()
    page.fill("#policy-table", "1-:2")
    say(page, "by a table")
    page.select_option("#policy", "")
    page.fill("#draft-tokens", "3")
    page.locator("#width").focus()
    assert "The default where a size is given." in page.locator("#policy-note").inner_text()
    assert not page.locator("#policy-options-box").is_visible()
    say(page, "sized")
    asked = [body.get("speculation") for body in stub.app.state.bodies[-2:]]
    options = {"policy": "table", "policy_options": {"table": "1-:2"}}
    assert asked == [options, {"num_draft_tokens": 3}]


@pytest.mark.browser
def test_a_refusal_is_shown_and_the_message_kept(visit, stub):
    page = visit(stub.url)
    page.fill("#message", "fail")
    page.click("#send")
    page.locator(".failed").wait_for()
    assert "method='nonsense'" in page.locator("#toast").inner_text()
    assert page.input_value("#message") == "fail"
    say(page, "again")
    assert page.locator(".failed").count() == 1


@pytest.mark.browser
def test_a_session_that_others_went_on_with_is_branched(visit, stub):
    page = visit(stub.url)
    say(page, "mine")
    heads = stub.app.state.heads
    session = list(heads)[-1]
    heads[session].append("h-theirs")
    say(page, "mine again")
    assert "this is a branch" in page.locator("#toast").inner_text()
    say(page, "and on")
    branch = stub.app.state.bodies[-1]["outrider"]["session"]
    assert branch != session
    assert "h-theirs" not in heads[branch]


@pytest.mark.browser
def test_stop_cancels_on_the_server_and_keeps_the_head(visit, llm):
    slow = Served(studio_stub.app_over(llm, delay_s=0.6))
    try:
        page = visit(slow.url)
        page.fill("#message", "a long story")
        page.click("#send")
        page.locator(".tail", has_text="lighthouse keeper").wait_for()
        page.click("#stop")
        page.locator(".failed").wait_for()
        assert "Stopped" in page.locator("#toast").inner_text()
        assert page.input_value("#message") == "a long story"
        assert slow.app.state.cancelled == ["resp_1"]
    finally:
        slow.stop()


@pytest.mark.browser
def test_conversations_outlive_a_reload(visit, stub):
    page = visit(stub.url)
    say(page, "remember me")
    page.reload()
    page.locator("body[data-ready]").wait_for()
    page.locator(".session", has_text="remember me").click()
    assert page.locator(".text").inner_text() == studio_stub.TEXT
    assert page.locator(".tok.bonus").count() > 0
    page.get_by_role("button", name="Delete remember me").click()
    page.locator("#no-sessions").wait_for()


@pytest.mark.browser
def test_the_race_compares_texts_and_times(visit, stub):
    page = visit(stub.url)
    page.get_by_role("button", name="Race").click()
    page.get_by_role("button", name="Start the race").click()
    verdict = page.locator("#race-verdict", has_text="Identical")
    assert "Identical text: yes" in verdict.inner_text()
    assert "9 steps instead of 28" in verdict.inner_text()
    plain, fast = stub.app.state.bodies[-2:]
    assert (plain["seed"], plain["speculation"]) == (7, {"method": "off"})
    assert fast["seed"] == 7
    assert "speculation" not in fast
    for lane in ("plain", "fast"):
        assert page.locator(f"#lane-{lane} .text").inner_text() == studio_stub.TEXT
        assert page.locator(f"#bar-{lane}").evaluate("bar => bar.value === bar.max")


@pytest.mark.browser
def test_plain_chat_serves_where_sessions_are_absent(visit, stub_without_sessions):
    page = visit(stub_without_sessions.url)
    say(page, "hello")
    say(page, "again")
    messages = stub_without_sessions.app.state.bodies[-1]["messages"]
    assert [one["role"] for one in messages] == ["user", "assistant", "user"]
    assert messages[1]["content"] == studio_stub.TEXT
    assert page.locator(".warmth").inner_text() == "□ kept in this browser"
    page.get_by_role("button", name="Rewind to before this").nth(1).click()
    assert page.locator(".turn").count() == 2


@pytest.mark.browser
def test_the_real_server_serves_the_page(visit, llm):
    """A tiny random model: its text means nothing, but sessions, forks and races do."""
    served = Served(create_app(AsyncLLM(llm), ServeConfig(drain_s=0.0)))
    try:
        page = visit(served.url)
        assert "Sessions are kept by the server" in page.inner_text("#where")
        say(page, "one")
        assert page.locator(".turn.assistant .text").inner_text() != ""
        assert "exact" in page.locator(".turn.assistant .note").inner_text()
        say(page, "two")
        page.get_by_role("button", name="Fork from here").first.click()
        page.locator(".session", has_text="(fork)").wait_for()
        say(page, "three")
        page.get_by_role("button", name="Rewind to before this").first.click()
        page.locator("#toast", has_text="Rewound").wait_for()
        assert page.locator(".turn").count() == 0
        page.get_by_role("button", name="Race").click()
        page.get_by_role("button", name="Start the race").click()
        verdict = page.locator("#race-verdict", has_text="Identical text")
        assert verdict.inner_text().startswith("Identical text: yes")
    finally:
        served.stop()


@pytest.mark.browser
def test_text_comes_from_the_server_where_the_browser_lacks_it(visit, llm):
    served = Served(create_app(AsyncLLM(llm), ServeConfig(drain_s=0.0)))
    try:
        there = visit(served.url)
        say(there, "begun elsewhere")
        answer = there.locator(".turn.assistant .text").text_content()
        here = visit(served.url)
        here.locator(".session").click()
        here.locator(".turn.assistant").wait_for()
        assert here.locator(".turn.assistant .text").text_content() == answer
        assert here.locator(".said").inner_text() == "begun elsewhere"
        here.locator(".session .title", has_text="begun elsewhere").wait_for()
        assert "exact" in here.locator(".turn.assistant .note").inner_text()
        say(here, "gone on with here")
        there.locator(".session").click()
        there.locator(".turn.assistant").nth(1).wait_for()
        assert there.locator(".said").all_inner_texts() == ["begun elsewhere", "gone on with here"]
        assert there.locator(".turn.assistant").first.locator(".tok").count() > 0  # marks stay
    finally:
        served.stop()


@pytest.mark.browser
def test_themes_follow_the_system_and_the_button(visit, stub):
    page = visit(stub.url, color_scheme="dark")
    ground = "document.body.computedStyleMap().get('background-color').toString()"
    dark = page.evaluate(ground)
    page.get_by_role("button", name="Switch to the light theme").click()
    light = page.evaluate(ground)
    assert dark != light
    page.reload()
    assert page.evaluate(ground) == light


@pytest.mark.browser
def test_the_page_fits_a_phone(visit, stub):
    page = visit(stub.url, width=360, has_touch=True)
    say(page)
    page.locator(".text .step").nth(1).tap()
    box = page.locator("#step-card").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 360
    for view in ("Sessions", "Settings"):
        page.get_by_role("button", name=view, exact=True).click()
    page.locator("#method").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.get_by_role("button", name="Race").click()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
