"""Workloads: each layout from a small file of that layout, and the real ones where they are."""

import io
import json
import tarfile

import pytest

from outrider.bench.workloads import (
    SOURCES,
    Encoder,
    Record,
    available,
    load,
    read_aider,
    read_jsonl,
    read_swe_agent,
    read_tau_bench,
    turns,
)
from outrider.errors import ConfigError
from outrider.testing import ByteTokenizer
from outrider.testing.tiny import EOS


def write_lines(path, *values):
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": [{"type": "text", "text": "By"}, {"type": "text", "text": "e"}]},
    {"role": "assistant", "content": "Bye."},
]


def text_of(record):
    return "".join(record.prompt)


def test_each_turn_of_the_assistant_is_a_record_after_the_conversation_so_far():
    first, second = turns(CHAT, "s")
    assert text_of(first) == "system:\nBe brief.\n\nuser:\nHi\n\nassistant:\n"
    assert first.output == "Hello."
    assert text_of(second) == text_of(first) + "Hello.\n\nuser:\nBye\n\nassistant:\n"
    assert (second.output, second.session) == ("Bye.", "s")


def test_a_turn_that_calls_functions_says_their_names_and_arguments():
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    silent = {"role": "assistant", "content": None, "tool_calls": [call]}
    spoken = {"role": "assistant", "content": "So:", "tool_calls": [call, call]}
    empty = {"role": "assistant", "content": ""}
    said = json.dumps({"name": "f", "arguments": '{"x": 1}'})
    found = list(turns([silent, spoken, empty], "s"))
    assert [record.output for record in found] == [said, f"So:\n{said}\n{said}"]


def test_encoding_is_piece_by_piece_and_keeps_the_end_of_a_long_prompt():
    encoder = Encoder(ByteTokenizer(), max_prompt_tokens=5)
    record = Record(("abc", (7, 8), "de"), "xy", "s", "xz")
    prompt, output, session, prediction = encoder(record)
    assert prompt == [ord("c"), 7, 8, ord("d"), ord("e")]
    assert output == (ord("x"), ord("y"), EOS), "an answer ends"
    assert (session, prediction) == ("s", (ord("x"), ord("z")))
    assert encoder(record._replace(output=(1, 2))).output == (1, 2), "ids are left as they are"


def test_jsonl_holds_texts_or_ids(tmp_path):
    path = write_lines(
        tmp_path / "log.jsonl",
        {"prompt": "p", "output": "o"},
        {"prompt": [1, 2], "output": [3], "session": "s", "prediction": "q"},
    )
    expected = [Record(("p",), "o"), Record(((1, 2),), (3,), "s", "q")]
    assert list(read_jsonl(path)) == load(str(path)) == expected


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "x"}', ":2: give an object with"),
        ("[1]", ":2: give an object with"),
        ('{"prompt": "", "output": "x"}', ":2: prompt or output is empty"),
        ('{"prompt": "x", "output": []}', ":2: prompt or output is empty"),
        ("{", ":2: no JSON"),
        ('{"prompt": 3, "output": "x"}', "has another layout"),
    ],
)
def test_a_line_that_cannot_be_read_is_named(tmp_path, line, message):
    path = tmp_path / "log.jsonl"
    path.write_text('{"prompt": "p", "output": "o"}\n' + line + "\n")
    with pytest.raises(ConfigError, match=message):
        load(str(path))


def test_mt_bench_pairs_answers_with_the_questions_beside_them(tmp_path):
    folder = tmp_path / "prompts"
    folder.mkdir()
    answers = folder / SOURCES["mt_bench"].file
    write_lines(answers, {"question_id": 81, "choices": [{"turns": ["A1", "A2"]}]})
    write_lines(folder / "mt_bench_question.jsonl", {"question_id": 81, "turns": ["Q1", "Q2"]})
    assert available(tmp_path) == ["mt_bench"]
    first, second = load("mt_bench", tmp_path)
    assert (text_of(first), first.output) == ("user:\nQ1\n\nassistant:\n", "A1")
    assert text_of(second) == "user:\nQ1\n\nassistant:\nA1\n\nuser:\nQ2\n\nassistant:\n"
    assert (second.output, second.session) == ("A2", "81")


def test_gsm8k_takes_one_model_s_solution(tmp_path):
    solved = {"question": "1+1?", "175b_verification": {"solution": "2"}}
    write_lines(tmp_path / SOURCES["gsm8k"].file, solved, {**solved, "6b_finetuning": {}})
    assert load("gsm8k", tmp_path) == [Record(("1+1?", "\n"), "2")] * 2


def test_tau_bench_episodes_are_sessions(tmp_path):
    path = tmp_path / "tau.json"
    episodes = [{"task_id": t, "trial": n, "traj": CHAT} for t, n in ((0, 0), (0, 1))]
    path.write_text(json.dumps(episodes))
    assert [r.session for r in read_tau_bench(path)] == ["0/0", "0/0", "0/1", "0/1"]


def test_swe_agent_trajectories_are_read_from_the_archive(tmp_path):
    path = tmp_path / "sweagent.tar.xz"
    with tarfile.open(path, "w:xz") as archive:
        for name, body in (
            ("b.traj", {"history": CHAT}),
            ("a.traj", {"history": CHAT[:3]}),
            ("x", 1),
        ):
            data = json.dumps(body).encode()
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    found = [(record.session, record.output) for record in read_swe_agent(path)]
    assert found == [("a.traj", "Hello."), ("b.traj", "Hello."), ("b.traj", "Bye.")]


def test_aider_edits_expect_the_old_lines(tmp_path):
    marks = "@" * 20
    path = tmp_path / "chat.txt"
    path.write_text(
        f"@@@ #### rename x {marks}\n@@@ SEARCH: a.py {marks}\nx = 1\n{marks}\ny = 1\n"
        f"@@@ REPLACE {marks}\n\n@@@ SEARCH: b.py {marks}\n{marks}\nnew\n@@@ REPLACE {marks}\n"
        f"@@@ #### drop it {marks}\n@@@ SEARCH: a.py {marks}\nz\n{marks}\n@@@ REPLACE {marks}\n"
    )
    assert list(read_aider(path)) == [
        Record(("rename x\na.py\n", "x = 1\n", "\n"), "y = 1\n", "0", "x = 1\n"),
        Record(("rename x\nb.py\n", "", "\n"), "new\n", "0", ""),
    ]


def test_a_workload_that_is_not_there_is_told_with_its_remedy(tmp_path):
    with pytest.raises(ConfigError, match=r"gsm8k_model_solutions.jsonl, no folder .* --data"):
        load("gsm8k")
    with pytest.raises(ConfigError, match="not in"):
        load("gsm8k", tmp_path)
    with pytest.raises(ConfigError, match="unknown workload 'gsm9k'; did you mean 'gsm8k'"):
        load("gsm9k", tmp_path)
    (tmp_path / SOURCES["tau_bench"].file).write_text('[{"task_id": 1}]')
    with pytest.raises(ConfigError, match="another layout"):
        load("tau_bench", tmp_path)
    (tmp_path / SOURCES["tau_bench"].file).write_text("[]")
    with pytest.raises(ConfigError, match="holds no answer"):
        load("tau_bench", tmp_path)


def test_the_real_logs_are_read(shared_data):
    names = available(shared_data)
    if not names:
        pytest.skip("none of the logs is there")
    num = {name: len(load(name, shared_data)) for name in names}
    expected = {"mt_bench": 160, "gsm8k": 1319, "tau_bench": 2454, "swe_agent": 209, "aider": 573}
    assert {name: num[name] for name in names} == {name: expected[name] for name in names}
