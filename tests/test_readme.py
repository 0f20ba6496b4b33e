"""The documents as promises: two languages that say the same, settings, verbs, modules and files that exist."""

import re
from collections import Counter
from pathlib import Path

import pytest
import yaml

from job.config import fields, load_config, parse_config
from job.families import FAMILIES
from tests.conftest import REPOSITORY, qlora

ENGLISH, CHINESE = (REPOSITORY / name for name in ("README.md", "README.zh-CN.md"))
READMES = pytest.mark.parametrize("readme", [ENGLISH, CHINESE], ids=lambda path: path.name)
DOCUMENTS = [*REPOSITORY.glob("*.md"), *REPOSITORY.glob("bench/*.md")]
RUN_FILES = sorted(REPOSITORY.glob("configs/*.yaml"))
LEAST = "model: {name: owner/model}\ndata: {train: rows.jsonl}\noutput: {url: runs/first}\n"
FIELDS = {f"{section}.{name}": field for section, name, field in fields()}
SECTIONS = {key.partition(".")[0] for key in FIELDS}
ENGLISH_OF = {"必填": "required", "关闭": "off", "贪心": "greedy"}
_NAMES = {
    "model": "name trust_remote_code",
    "quantization": "type double_quant",
    "lora": "rank alpha dropout targets",
    "data": "train format workers max_length packing",
    "evaluation": "file share micro_batch_size",
    "train": "epochs max_steps learning_rate global_batch_size micro_batch_size precision optimizer recompute seed",
    "parallel": "strategy processes",
    "checkpoint": "every_steps",
    "output": "url",
}
RELIED_ON = {f"{section}.{name}" for section, names in _NAMES.items() for name in names.split()}


def blocks(document: Path) -> list[list[str]]:
    """The lines of each code block, without comments."""
    found = re.findall(r"^```\w*\n(.*?)^```$", document.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    return [[re.sub(r"(^|\s+)#.*", "", line) for line in block.splitlines()] for block in found]


def prose(document: Path) -> str:
    """What stands outside of the code blocks."""
    return re.sub(r"^```.*?^```$", "", document.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)


def codes(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", text)


def commands(document: Path) -> list[str]:
    """Everything that could be typed: inline code and the lines of code blocks."""
    return [*codes(prose(document)), *(line for block in blocks(document) for line in block)]


def tables(document: Path) -> list[list[list[str]]]:
    """The cells of each table, by row, headers included."""
    found = re.findall(r"(?:^\|.*\|\n)+", prose(document), re.MULTILINE)
    rows = [[line.strip("|").split("|") for line in table.splitlines()] for table in found]
    return [[[cell.strip() for cell in row] for row in table if set(row[0]) != {"-"}] for table in rows]


def settings(document: Path) -> list[tuple[list[str], list[str]]]:
    """The rows of the table of settings: keys, and their defaults in English."""
    (table,) = (table for table in tables(document) if "`model.name`" in table[1])
    return [(codes(keys), [ENGLISH_OF.get(word, word) for word in said.split(", ")]) for keys, said, _ in table[1:]]


def numbers(text: str) -> list[str]:
    return re.findall(r"\d+(?:\.\d+)*", text)


def links(document: Path) -> list[str]:
    return re.findall(r"\]\(([^)#\s]+)", prose(document))


def test_both_languages_have_the_same_commands() -> None:
    assert blocks(CHINESE) == blocks(ENGLISH)
    assert Counter(codes(prose(CHINESE))) == Counter(codes(prose(ENGLISH)))


def test_both_languages_have_the_same_tables() -> None:
    keys = [[[codes(row[0]) for row in table] for table in tables(readme)] for readme in (ENGLISH, CHINESE)]
    assert len(keys[0]) == 11 and keys[0] == keys[1]
    assert settings(CHINESE) == settings(ENGLISH)


def test_both_languages_have_the_same_numbers() -> None:
    demo = [re.search(r"^`make demo`(?:.+\n)+", prose(readme), re.MULTILINE) for readme in (ENGLISH, CHINESE)]
    said = [numbers(found[0]) for found in demo if found]
    assert len(said) == 2 and said[0] and said[0] == said[1]
    assert Counter(numbers(prose(CHINESE))) == Counter(numbers(prose(ENGLISH)))


def test_each_language_links_to_the_other_and_both_to_the_same() -> None:
    assert [CHINESE.name, *links(ENGLISH)[1:]] == links(ENGLISH)
    assert [ENGLISH.name, *links(ENGLISH)[1:]] == links(CHINESE)


@READMES
def test_every_setting_it_names_is_real(readme: Path) -> None:
    words = [word.partition("=")[0] for command in commands(readme) for word in command.split()]
    files = r"[\w./-]+\.(?:py|ya?ml|jsonl?|md)"
    named = {word for word in words if re.fullmatch(r"[a-z]+\.(?:\w+|\*)", word) and not re.fullmatch(files, word)}
    chart = yaml.safe_load((REPOSITORY / "charts/qlora/values.yaml").read_text())
    values = {f"{group}.{name}" for group, inner in chart.items() if isinstance(inner, dict) for name in inner}
    known = {*FIELDS, *values, *(f"{section}.*" for section in SECTIONS), "section.key"}
    assert named > RELIED_ON and named <= known, named - known
    listed = [key for keys, _ in settings(readme) for key in keys]
    assert set(listed) <= known and len(listed) == len(set(listed))


@READMES
def test_the_defaults_it_tells_are_those_of_the_code(readme: Path) -> None:
    for keys, said in settings(readme):
        if keys == ["generation.*"]:
            assert said == ["greedy", f"{FIELDS['generation.max_new_tokens'].default} tokens"]
            assert FIELDS["generation.temperature"].default == 0
            continue
        for key, word in zip(keys, said if len(said) > 1 else said * len(keys), strict=True):
            default = FIELDS[key].default
            if word == "required":
                assert FIELDS[key].is_required(), key
            elif word == "off":
                assert default is None or default == 0, key  # False too
            else:
                section, _, name = key.partition(".")
                written = getattr(getattr(parse_config(LEAST, [f"{key}={word}"]), section), name)
                assert (type(written), written) == (type(default), default), key


@READMES
def test_settings_that_other_programs_rely_on_stay(readme: Path) -> None:
    listed = {key for keys, _ in settings(readme) for key in keys}
    assert not RELIED_ON - set(FIELDS) and not RELIED_ON - listed


def test_every_make_target_and_verb_that_is_named_exists() -> None:
    said = [command for document in DOCUMENTS for command in commands(document)]
    asked = {found[1] for command in said if (found := re.match(r"make ([a-z]+)", command))}
    verbs = {found[1] for command in said if (found := re.match(r"(?:qlora|python -m job) (\w+)", command))}
    targets = set(re.findall(r"^([a-z]+):", (REPOSITORY / "Makefile").read_text("utf-8"), re.MULTILINE))
    listed = qlora("--help").stdout.partition("Commands:\n")[2].partition("\n\n")[0]
    helped = set(re.findall(r"^  (\w+) ", listed, re.MULTILINE))
    assert {"demo", "test"} <= asked <= targets and verbs == helped


@READMES
def test_the_tree_names_the_modules_that_there_are(readme: Path) -> None:
    tree = blocks(readme)[-1]
    modules = [path.name for path in (REPOSITORY / "job").glob("*.py") if not path.name.startswith("__")]
    packages = [f"{path.parent.name}/" for path in (REPOSITORY / "job").glob("*/__init__.py")]
    assert sorted(line.split()[0] for line in tree if line.startswith("  ")) == sorted(modules + packages)
    assert all((REPOSITORY / line.split()[0]).exists() for line in tree if not line.startswith(" "))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_linked_files_exist(document: Path) -> None:
    missing = [link for link in links(document) if "://" not in link and not (document.parent / link).exists()]
    assert not missing


@READMES
def test_its_run_file_is_accepted(readme: Path) -> None:
    (text,) = re.findall(r"^```yaml\n(.*?)^```$", readme.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    assert parse_config(text).output.url.startswith("s3://")


def test_there_are_run_files() -> None:
    assert RUN_FILES


@pytest.mark.parametrize("path", RUN_FILES, ids=lambda path: path.name)
def test_run_files_load_and_open_with_their_command_and_what_was_measured(path: Path) -> None:
    assert load_config(str(path)).output.url
    (head,) = re.findall(r"\A(?:#.*\n)+", path.read_text("utf-8"))
    assert f" train configs/{path.name}" in head
    assert re.search(r"not measured|\d ?(?:ms|s|min|h|MiB|GiB|tokens/s)\b", head)


@READMES
def test_the_models_are_those_of_the_families(readme: Path) -> None:
    listed = next(table for table in tables(readme) if any("model_type" in cell for cell in table[0]))
    expected = [[family.name, ", ".join(family.model_types), ", ".join(family.targets)] for family in FAMILIES]
    assert listed[1:] == expected
