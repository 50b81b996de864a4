"""Data sets: each layout's prompt, what is skipped and why, our own prompts, published files."""

import csv
import gzip
import hashlib
import io
import json
import lzma
from collections import Counter
from pathlib import Path

import pytest

from outrider.bench.datasets import PUBLISHED, load_dataset, own_domains
from outrider.bench.layouts import WITHHELD
from outrider.errors import ConfigError

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def lines(*rows: object) -> str:
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n"


@pytest.fixture
def read(tmp_path):
    """Loads a text as a file."""

    def read(text: str | bytes, name: str = "prompts.jsonl", **options: object):
        path = tmp_path / name
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return load_dataset(str(path), **options)

    return read


SPEC = {"question_id": 81, "category": "writing", "turns": ["Write.", "Again."]}
LAYOUTS = [
    ("spec_bench", SPEC, user("Write."), "81", "writing"),
    (
        "speed_bench",
        {**SPEC, "sub_category": "poem"},
        user("Write."),
        "81",
        "writing",
    ),
    (
        "speed_bench",
        {"category": "code", "sub_category": "x", "messages": user("Sort.")},
        user("Sort."),
        "row 0",
        "code",
    ),
    (
        "messages",
        {"messages": [*user("Hi"), {"role": "assistant", "content": "Hello"}]},
        user("Hi"),
        "row 0",
        "",
    ),
    (
        "messages",
        {"custom_id": "r1", "method": "POST", "body": {"messages": user("Hi")}},
        user("Hi"),
        "r1",
        "",
    ),
    (
        "sharegpt",
        {
            "id": "s",
            "conversations": [
                {"from": "system", "value": "Be kind."},
                {"from": "human", "value": "Q"},
                {"from": "gpt", "value": "A"},
                {"from": "human", "value": "Q2"},
            ],
        },
        user("Q"),
        "s",
        "",
    ),
    (
        "mbpp",
        {"text": "Add.", "code": "...", "task_id": 3, "test_list": ["assert f(1) == 2"]},
        user("Add.\nIt has to pass:\nassert f(1) == 2"),
        "3",
        "code",
    ),
    (
        "humaneval",
        {"task_id": "HumanEval/0", "prompt": "def f():\n", "canonical_solution": "    return 1\n",
         "entry_point": "f", "test": ""},
        "def f():\n",
        "HumanEval/0",
        "code",
    ),
    (
        "longbench",
        {"context": "Long.", "input": "Q?", "answers": ["A"], "dataset": "qasper", "_id": "q"},
        user("Long.\n\nQ?"),
        "q",
        "qasper",
    ),
    ("question", {"question": "How many?", "answer": "4"}, user("How many?"), "row 0", ""),
    ("question", {"context": "C", "question": "Q?"}, user("C\n\nQ?"), "row 0", ""),
    ("instruction", {"instruction": "Do", "input": "this"}, user("Do\n\nthis"), "row 0", ""),
    ("oasst_tree", {"message_tree_id": "t", "prompt": {"text": "Q"}}, user("Q"), "t", ""),
    ("prompt", {"prompt": "Once", "domain": "tales"}, "Once", "row 0", "tales"),
    ("prompt", {"prompt": [1, 2, 3]}, [1, 2, 3], "row 0", ""),
    ("prompt", {"prompt": user("Hi")}, user("Hi"), "row 0", ""),
    ("prompt", {"text": "Once"}, "Once", "row 0", ""),
    ("turns", {"turns": ["Q"]}, user("Q"), "row 0", ""),
]  # fmt: skip


@pytest.mark.parametrize(("layout", "row", "prompt", "name", "domain"), LAYOUTS)
def test_a_layout_is_known_by_its_rows(read, layout, row, prompt, name, domain):
    found = read(lines(row, row))
    first, second = found.questions
    assert (found.layout, first.prompt, first.id, first.domain) == (layout, prompt, name, domain)
    assert second.id != first.id  # though the rows say the same
    assert read(json.dumps([row, row]), "a.json").questions == found.questions
    assert read(json.dumps({"data": [row]}), "b.json").questions[0] == first
    assert read(json.dumps(row), "c.json").questions[0] == first


def test_a_table_is_read_by_its_header(read):
    out = io.StringIO()
    writer = csv.DictWriter(out, ["question", "query_category"])
    writer.writeheader()
    writer.writerow({"question": 'Which "one",\nor two?', "query_category": "join"})
    found = read(out.getvalue(), "q.csv")
    assert found.questions[0].prompt == user('Which "one",\nor two?')
    assert found.domains == {"join": 1}


def test_plain_text_is_cut_at_blank_lines(read):
    found = read("One block of\ntwo lines.\n\nHeading\n\nAnother block here.\n", "a.txt")
    assert [q.prompt for q in found.questions] == [
        "One block of\ntwo lines.",
        "Another block here.",
    ]
    assert found.skipped == {"a block of fewer than 3 words": 1}
    assert [q.prompt for q in read("line by line\nwithout a gap\n", "b.txt").questions] == [
        "line by line",
        "without a gap",
    ]


@pytest.mark.parametrize("pack", [gzip.compress, lzma.compress])
def test_packed_files_are_unpacked(read, pack):
    assert read(pack(lines({"prompt": "Once"}).encode()), "x.bin").questions[0].prompt == "Once"


def test_a_line_separator_inside_a_string_is_no_line_s_end(read):
    assert read(lines({"prompt": "a\u2028b"})).questions[0].prompt == "a\u2028b"


def test_rows_without_a_prompt_are_left_out_with_their_reason(read):
    image = {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}
    tools = {"messages": [*user("x"), {"role": "tool", "content": "42"}]}
    odd = {"other": 1}
    found = read(lines({"messages": user("Hi")}, image, tools, odd, {"messages": user(" ")}))
    assert len(found.questions) == 1
    assert found.skipped == {
        "parts that are no text (images, sound)": 1,
        "calls of tools in the conversation": 1,
        "not of the layout 'messages'": 1,
        "an empty prompt": 1,
    }
    assert "left out 1: an empty prompt" in found.told()


def test_withheld_texts_are_no_prompts(read):
    row = {**SPEC, "sub_category": "x", "turns": [f"{WITHHELD} USING A TOOL"]}
    with pytest.raises(ConfigError, match=r"1 rows: a placeholder .* preparation has to fetch"):
        read(lines(row))


def test_recorded_answers_bound_the_length_if_asked(read):
    text = lines({"prompt": "Q", "output": "a b c"}, {"prompt": "R", "max_tokens": 9})
    assert [q.max_tokens for q in read(text).questions] == [None, 9]
    counted = read(text, count_tokens=lambda answer: len(answer.split()))
    assert [q.max_tokens for q in counted.questions] == [3, 9]


def test_a_limit_takes_all_domains_in_turn(read):
    rows = [{"prompt": f"{domain}{i}", "domain": domain} for domain in "abc" for i in range(5)]
    found = read(lines(*rows), limit=7)
    assert [q.prompt for q in found.questions] == ["a0", "b0", "c0", "a1", "b1", "c1", "a2"]
    assert len(read(lines(*rows), limit=100).questions) == 15


def test_the_hash_is_of_the_questions_in_use(read):
    whole = read(lines({"prompt": "a"}, {"prompt": "b"}))
    packed = read(gzip.compress(lines({"prompt": "a"}, {"prompt": "b"}).encode()), "x.gz")
    assert packed.hash == whole.hash
    assert whole.take(1).hash != whole.hash
    assert read(lines({"prompt": "a"}, {"prompt": "c"})).hash != whole.hash


def test_conversations_become_text_for_models_without_a_template(read):
    said = [*user("Q"), {"role": "assistant", "content": "A"}, *user("Q2")]
    found = read(lines({"messages": said}, {"messages": user("Only")})).as_text()
    assert [q.prompt for q in found.questions] == ["User: Q\n\nAssistant: A\n\nUser: Q2\n\nAssistant:", "Only"]  # fmt: skip  # noqa: E501


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ('{"foo": 1}\n', "a.jsonl", 'keys foo: rename one to "prompt"'),
        ('{"timestamp": 0, "input_length": 5, "output_length": 1}\n', "t.jsonl", "without text"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n1,2,3\n", "azure.csv", "without text"),
        ('{"prompt": "a"}\n{"prompt"\n', "b.jsonl", r"b\.jsonl:2: no JSON"),
        (b"PAR1\x00", "c.parquet", "save it as JSON lines"),
        (b"\xff\xfe\x00", "d.txt", "no UTF-8"),
        (b"abc\x00def", "e.tar", "zero bytes"),
        ("", "f.txt", "it is empty"),
    ],
)
def test_what_holds_no_prompts_is_refused_with_a_remedy(read, text, name, message):
    with pytest.raises(ConfigError, match=message):
        read(text, name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("spec_bench", "not shipped: fetch it"),
        ("speed_bench", "not shipped"),
        ("nothing.jsonl", "no file"),
        ("outrider/cod", "did you mean 'code'"),
    ],
)
def test_names_that_lead_nowhere_say_where_to_look(name, message):
    with pytest.raises(ConfigError, match=message):
        load_dataset(name)


def test_a_folder_is_no_data_set(tmp_path):
    with pytest.raises(ConfigError, match="is a folder"):
        load_dataset(str(tmp_path))


def test_our_own_prompts_are_sixty_in_six_domains():
    own = load_dataset("outrider")
    assert own.domains == dict.fromkeys(own_domains(), 10)
    assert len(own.domains) == 6
    assert not own.skipped
    texts = Counter(str(q.prompt) for q in own.questions)
    assert max(texts.values()) == 1
    assert all(q.prompt[-1]["role"] == "user" for q in own.questions)
    code = load_dataset("outrider/code")
    assert {q.domain for q in code.questions} == {"code"}
    assert code.hash != own.hash


def test_our_own_prompts_fit_the_demo_pair(demo_tokenizer):
    lengths = [
        len(demo_tokenizer.apply_chat_template(q.prompt))
        for q in load_dataset("outrider").questions
    ]
    assert max(lengths) < 400


@pytest.fixture
def demo_tokenizer():
    from outrider.models.hub import resolve
    from outrider.tokenizer import load_tokenizer

    return load_tokenizer(resolve("demo"))


@pytest.mark.parametrize(
    ("file", "name", "num_questions", "num_domains"),
    [
        ("spec_bench.jsonl", "spec_bench", 480, 13),
        ("mt_bench_question.jsonl", "mt_bench", 80, 8),
        ("gsm8k_train.jsonl", "gsm8k_train", 7473, 1),
        ("gsm8k_model_solutions.jsonl", "gsm8k_test", 1319, 1),
        ("mbpp.jsonl", "mbpp", 974, 1),
        ("oasst_en_100_tree.jsonl", None, 100, 1),
        ("json_mode_WikiQuestions.json", None, 112, 1),
        ("sqleval_instruct_basic_postgres.csv", None, 40, 5),
    ],
)
def test_published_files_are_read_and_known(file, name, num_questions, num_domains):
    path = SHARED / "prompts" / file
    if not path.is_file():
        pytest.skip(f"{file} is not beside this checkout")
    found = load_dataset(str(path))
    assert (len(found.questions), len(found.domains)) == (num_questions, num_domains)
    assert not found.skipped
    assert found.is_known == (name is not None)
    assert name is None or found.name == name
    assert all(str(q.prompt[0]["content"]).strip() for q in found.questions)


def test_what_we_know_has_a_licence_and_a_source():
    assert all(known.licence and known.where for known in PUBLISHED.values())


def test_a_set_says_which_file_it_is_and_how_much_of_it(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(f'{{"prompt": "number {i} of them"}}\n' for i in range(5)))
    told = load_dataset(str(path), limit=2)
    held = told.describe()
    assert held["path"] == str(path)
    assert held["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (held["num_questions"], held["num_in_file"]) == (2, 5)
    assert held["origin"] == "a file of the user's own"
    assert "2 prompts of 5" in told.told()
    own = load_dataset("outrider").describe()
    assert (own["path"], own["origin"]) == ("", "shipped with outrider")
