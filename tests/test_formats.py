"""Rows of the usual formats as segments."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from job.errors import InputError
from job.formats import FORMATS, format_of, learn_last, segments_of
from job.turns import Segment

S, U, A, T = "system", "user", "assistant", "text"
PLACES = {"prompt": "Q: {q}\n[[Context: {c}\n]]A: ", "completion": "{a}!"}

ROWS: dict[str, tuple[str, dict[str, Any], list[tuple[str, str, bool]]]] = {
    "alpaca": (
        "alpaca",
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        [(U, "Add.\n1 2", False), (A, "3", True)],
    ),
    "alpaca with empty input": (
        "alpaca",
        {"instruction": "Hi", "input": "", "output": "Ho"},
        [(U, "Hi", False), (A, "Ho", True)],
    ),
    "alpaca without input": ("alpaca", {"instruction": "Hi", "output": "Ho"}, [(U, "Hi", False), (A, "Ho", True)]),
    "alpaca with system and a number": (
        "alpaca",
        {"system": "Be brief.", "instruction": "1+1?", "input": None, "output": 2},
        [(S, "Be brief.", False), (U, "1+1?", False), (A, "2", True)],
    ),
    "conversations by role": (
        "conversations",
        {"conversations": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        [(U, "a", False), (A, "b", True)],
    ),
    "conversations of ShareGPT": (
        "conversations",
        {"system": "s", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        [(S, "s", False), (U, "a", False), (A, "b", True)],
    ),
    "messages": (
        "messages",
        {
            "messages": [
                {"role": "system", "content": "s"},
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                {"role": "assistant", "content": "c", "learn": False},
                {"role": "tool", "content": "d"},
                {"role": "assistant", "content": "e"},
            ]
        },
        [(S, "s", False), (U, "ab", False), (A, "c", False), ("tool", "d", False), (A, "e", True)],
    ),
    "prompt and completion as text": (
        "prompt_completion",
        {"prompt": "Once ", "completion": "upon"},
        [(T, "Once ", False), (T, "upon", True)],
    ),
    "prompt and completion as messages": (
        "prompt_completion",
        {
            "prompt": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "b"},
                {"role": "user", "content": "c"},
            ],
            "completion": [{"role": "assistant", "content": "d"}],
        },
        [(U, "a", False), (A, "b", False), (U, "c", False), (A, "d", True)],
    ),
    "AdvertiseGen": (
        "content_summary",
        {"content": "类型#裤", "summary": "宽松的裤子"},
        [(U, "类型#裤", False), (A, "宽松的裤子", True)],
    ),
    "text": ("text", {"text": "all of it"}, [(T, "all of it", True)]),
}


def give(row: dict[str, Any]) -> Any:
    """A user's own format: whatever the row has in x."""
    return row["x"]


def generate(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A user's own format: two turns, one after the other."""
    yield {"role": "user", "content": row["q"]}
    yield {"role": "assistant", "content": row["a"]}


def leave(row: dict[str, Any]) -> None:
    """A user's own format that ends the process."""
    sys.exit(3)


def segments(name: str, row: dict[str, Any], template: dict[str, str] | None = None) -> list[Segment]:
    name, kind = format_of(name, template, row)
    return segments_of(kind, name, row)


@pytest.mark.parametrize("case", ROWS)
def test_a_row_becomes_segments(case: str) -> None:
    name, row, expected = ROWS[case]
    assert [segment[:3] for segment in segments(name, row)] == expected


@pytest.mark.parametrize("case", ROWS)
def test_the_format_is_recognised_by_its_fields(case: str) -> None:
    name, row, _ = ROWS[case]
    assert format_of("auto", None, row)[0] == name


def test_every_format_has_a_case() -> None:
    assert {name for name, _, _ in ROWS.values()} == set(FORMATS)


@pytest.mark.parametrize(
    ("row", "text", "learnt"),
    [
        ({"q": "why", "c": "rain", "a": "wet"}, "Q: why\nContext: rain\nA: wet!", "wet!"),
        ({"q": "why", "c": "", "a": "wet"}, "Q: why\nA: wet!", "wet!"),
        ({"q": "why", "a": "wet"}, "Q: why\nA: wet!", "wet!"),
        ({"q": "{a} [[x]]", "c": "{q}", "a": "{c}"}, "Q: {a} [[x]]\nContext: {q}\nA: {c}!", "{c}!"),
    ],
    ids=["all fields", "empty optional field", "missing optional field", "braces in a field stay as they are"],
)
def test_a_template_is_filled_and_its_completion_learnt(row: dict[str, str], text: str, learnt: str) -> None:
    made = segments("auto", row, PLACES)
    assert "".join(part.content for part in made) == text
    assert "".join(part.content for part in made if part.learn) == learnt
    assert {part.content for part in made if part.role == "text"} == {value for value in row.values() if value}


def test_template_places_outside_the_brackets_are_needed_wherever_the_brackets_are() -> None:
    template = {"prompt": "[[{c}]]{c}{q}", "completion": "{a}[[ ({why})]]"}
    assert format_of("template", template, {})[1].needs == ("c", "q", "a")
    assert "".join(part.content for part in segments("template", {"c": "c", "q": "q", "a": "a"}, template)) == "ccqa"


def test_a_field_between_marks_of_different_parts_is_needed() -> None:
    assert format_of("template", {"prompt": "[[{q}", "completion": "{a}]]"}, {})[1].needs == ("q", "a")


def test_doubled_braces_of_a_template_are_braces() -> None:
    template = {"prompt": "[[{{{c}}} ]]{q} {{q}}", "completion": '{{"a": "{a}"}}'}
    made = segments("template", {"c": "{{c}}", "q": "why", "a": "}}"}, template)
    assert "".join(part.content for part in made) == '{{{c}}} why {q}{"a": "}}"}'
    assert format_of("template", template, {})[1].needs == ("q", "a")
    assert "".join(part.content for part in segments("template", {"q": "", "a": ""}, template)) == ' {q}{"a": ""}'


def test_the_user_s_own_function_makes_turns() -> None:
    made = segments("tests.my_rows:ask", {"q": "Why?", "a": "So."})
    assert [(part.content, part.learn) for part in made if part.role == "assistant"] == [
        ("Let me think.", False),
        ("So.", True),
    ]


@pytest.mark.parametrize("kind", [list, tuple, iter])
def test_the_user_s_own_function_may_give_turns_as_a_list_a_tuple_or_a_generator(kind: Callable[..., Any]) -> None:
    turns = kind([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    assert segments("tests.test_formats:give", {"x": turns}) == [Segment(U, "a"), Segment(A, "b", True)]


@pytest.mark.parametrize("content", [{"text": "b"}, {"type": "text", "text": "b"}, [{"type": "text", "text": "b"}]])
def test_a_turn_s_content_may_be_an_object_with_text(content: Any) -> None:
    made = segments("messages", {"messages": [{"role": "assistant", "content": content}]})
    assert made == [Segment(A, "b", True)]


def test_the_user_s_own_module_is_found_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "beside_the_run_file.py").write_text("def f(row): return [{'role': 'assistant', 'content': row['x']}]")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    assert segments("beside_the_run_file:f", {"x": "y"}) == [Segment("assistant", "y", True)]


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        (
            "alpaca",
            {"instruction": "a", "answer": "b", "output": None},
            "has instruction, answer; the format alpaca needs instruction, output (missing: output)",
        ),
        ("text", {"text": None}, "has no fields; the format text needs text (missing: text)"),
        ("text", {"text": {"a": 1}}, "text is a dict, expected text"),
        ("messages", {"messages": []}, "messages: expected a list of turns"),
        ("messages", {"messages": "hello"}, "messages: expected a list of turns"),
        (
            "messages",
            {"messages": [{"role": "user", "content": "a"}, {"role": "narrator", "content": "b"}]},
            "messages: turn 2 has the role 'narrator', expected one of system, user, human, assistant, gpt, bot, "
            "model, tool, observation",
        ),
        ("conversations", {"conversations": ["hello"]}, "conversations: turn 1 is a str, expected {role, content}"),
        (
            "messages",
            {"messages": [{"role": "user", "txt": "q"}]},
            "messages: turn 1 has role, txt, but no text in content or value",
        ),
        (
            "messages",
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "messages: turn 1 has role, content, but no text in content or value",
        ),
        (
            "messages",
            {"messages": [{"role": "assistant", "content": None, "tool_calls": [1]}]},
            "messages: turn 1 has tool_calls, which are not read",
        ),
        (
            "messages",
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": {"answer": "b"}}]},
            "messages: turn 2 has role, content, but no text in content or value",
        ),
        (
            "messages",
            {"messages": [{"role": "user", "content": {"type": "image", "text": "a"}}]},
            "messages: turn 1 has role, content, but no text in content or value",
        ),
        (
            "messages",
            {"messages": [{"role": "user", "content": [{"type": "text", "text": {"value": "a"}}]}]},
            "messages: turn 1 has role, content, but no text in content or value",
        ),
        ("messages", {"messages": [7]}, "messages: turn 1 is an int, expected {role, content}"),
        (
            "prompt_completion",
            {"prompt": [{"role": "user", "content": "a"}], "completion": "b"},
            "completion: expected a list of turns",
        ),
        ("prompt_completion", {"prompt": [7], "completion": []}, "prompt: turn 1 is an int, expected {role, content}"),
        ("tests.my_rows:ask", {"q": "Why?", "x": 1}, "has q, x; tests.my_rows:ask failed with KeyError: 'a'"),
        ("tests.test_formats:leave", {"q": "Why?"}, "has q; tests.test_formats:leave failed with SystemExit: 3"),
        (
            "tests.test_formats:give",
            {"x": None},
            "tests.test_formats:give returned None, expected a list of {role, content}",
        ),
        (
            "tests.test_formats:give",
            {"x": "a"},
            "tests.test_formats:give returned a str, expected a list of {role, content}",
        ),
        (
            "tests.test_formats:give",
            {"x": []},
            "tests.test_formats:give returned no turns, expected a list of {role, content}",
        ),
        ("tests.test_formats:give", {"x": ["a"]}, "tests.test_formats:give: turn 1 is a str, expected {role, content}"),
        ("tests.test_formats:generate", {"q": "Why?"}, "has q; tests.test_formats:generate failed with KeyError: 'a'"),
    ],
)
def test_a_row_that_lacks_something_says_what_it_has(name: str, row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as refused:
        segments(name, row)
    assert str(refused.value).startswith(message)


OFFERS = (
    "alpaca: instruction, output; conversations: conversations; messages: messages; prompt_completion: prompt, "
    "completion; content_summary: content, summary; text: text"
)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("auto", f"data.format: no format has the fields q, a. Set data.template, or use {OFFERS}"),
        (
            "sharegpt",
            "data.format: sharegpt is unknown. Valid: auto, template, module:function, alpaca, conversations, "
            "messages, prompt_completion, content_summary, text",
        ),
        (
            "no_such_module:f",
            "data.format: no_such_module:f cannot be imported (No module named 'no_such_module'). "
            "Expected module:function",
        ),
        (
            "tests.my_rows:tell",
            "data.format: tests.my_rows:tell cannot be imported (module 'tests.my_rows' has no attribute 'tell'). "
            "Expected module:function",
        ),
        (":f", "data.format: :f cannot be imported (Empty module name). Expected module:function"),
    ],
)
def test_a_format_that_cannot_be_had_is_refused(name: str, message: str) -> None:
    with pytest.raises(InputError) as refused:
        format_of(name, None, {"q": "a", "a": "b"})
    assert str(refused.value) == message


@pytest.mark.parametrize(
    ("module", "code", "message"),
    [
        ("syntax", "\n\ndef f(row:\n", "SyntaxError: '(' was never closed, {file} line 3"),
        ("division", "a = 1\nb = a / 0\n", "ZeroDivisionError: division by zero, {file} line 2"),
        (
            "missing",
            "import no_such_library\n",
            "ModuleNotFoundError: No module named 'no_such_library', {file} line 1",
        ),
        (
            "deep",
            "import json\njson.loads('')\n",
            "JSONDecodeError: Expecting value: line 1 column 1 (char 0), {file} line 2",
        ),
        ("leaving", "raise SystemExit(3)\n", "SystemExit: 3, {file} line 1"),
    ],
)
def test_an_own_module_that_fails_names_its_file_and_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, code: str, message: str
) -> None:
    file = tmp_path / f"rows_with_{module}.py"
    file.write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(InputError) as refused:
        format_of(f"{file.stem}:f", None, {})
    fault = message.format(file=file)
    assert str(refused.value) == f"data.format: {file.stem}:f cannot be imported ({fault}). Expected module:function"


def test_only_the_last_answer_is_learnt_when_asked() -> None:
    turns = [Segment(U, "a"), Segment(A, "b", True), Segment(U, "c"), Segment(A, "d", True), Segment(U, "e")]
    assert [part.content for part in learn_last(turns) if part.learn] == ["d"]
    assert learn_last([Segment(U, "a")]) == [Segment(U, "a")]


@pytest.mark.parametrize("name", ["alpaca", "messages", "text", "prompt_completion"])
def test_a_question_is_a_row_whose_answer_is_empty(name: str) -> None:
    *asked, answer = FORMATS[name].ask("Why?")
    assert [part.content for part in asked] == ["Why?"]
    assert (answer.content, answer.learn) == ("", True)


def test_a_question_fills_the_template_s_first_place() -> None:
    asked = format_of("template", PLACES, {})[1].ask("Why?")
    assert "".join(part.content for part in asked) == "Q: Why?\nA: "
    assert asked[-1] == Segment("text", "", True)
