"""The command as users meet it: help, settings explained, rows shown, and what bad input gets."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from job import __version__
from job.config import load_config
from job.run_folder import RunFolder
from tests.conftest import alpaca_rows, qlora, write_rows
from tests.forked import Done, run
from tests.s3 import S3

RunFile = Callable[..., Path]
VERBS = ("train", "data", "compare", "chat", "config", "submit", "status", "logs", "cancel")


def test_help_names_every_verb_the_first_steps_and_the_exit_codes() -> None:
    done = qlora("--help")
    assert done.returncode == 0 and all(f"  {verb} " in done.stdout for verb in VERBS)
    said = " ".join(done.stdout.split())
    assert "Start with: qlora data CONFIG" in said and "section.key=value" in said
    assert "0 done, 1 failed, 2 wrong input, 75 interrupted, 130 second Ctrl-C" in said


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb: str) -> None:
    done = run(verb, "--help")
    assert done.code == 0 and verb in done.out and len(done.out.splitlines()) > 5


def test_without_a_verb_it_shows_the_help_or_asks_for_one() -> None:
    assert "Commands:" in (nothing := run()).out + nothing.err
    assert (launched := run("--local_rank=0")).code == 2 and "Missing command" in launched.err


@pytest.mark.parametrize(
    ("module", "words", "package"),
    [
        ("ray", ("submit", "ray"), r"ray\[default,train\]>=2\.\d+"),
        ("ray", ("train", "--on", "ray"), r"ray\[default,train\]>=2\.\d+"),
    ],
)
def test_an_optional_library_that_is_missing_is_named_with_what_installs_it(
    run_file: RunFile, tmp_path: Path, module: str, words: tuple[str, ...], package: str
) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(f"import sys\nsys.modules[{module!r}] = None\n")
    done = qlora(*words, run_file(), env={"PYTHONPATH": str(tmp_path / "site")})
    assert done.returncode == 2
    said = rf"InputError: {module}[\w.]* is not installed\. Install it with: pip install '{package}'"
    assert re.search(said, done.stderr), done.stderr
    assert "Traceback" not in done.stderr


def test_version() -> None:
    assert run("--version").out == f"qlora {__version__}\n"
    assert run("--local_rank=0", "--version").out == f"qlora {__version__}\n"


def test_the_schema_describes_every_setting() -> None:
    done = run("config", "--schema")
    schema = json.loads(done.out)
    assert done.code == 0 and schema["$defs"]["Lora"]["properties"]["rank"]["default"] == 16
    sections = [definition["properties"] for definition in schema["$defs"].values()]
    assert all(setting["description"] for section in sections for setting in section.values())


def test_explain_says_type_default_meaning_and_rule() -> None:
    done = run("config", "--explain", "lora.rank")
    assert done.code == 0 and done.out.startswith("lora.rank (integer > 0; default 16)\n")
    assert "Rank r of each product" in done.out and "fixed: another value is another run" in done.out
    section = run("config", "--explain", "lora").out
    assert all(f"lora.{name} (" in section for name in ("rank", "alpha", "dropout", "targets"))


def test_explain_suggests_the_nearest_name() -> None:
    done = run("config", "--explain", "lora.rnak")
    assert done.code == 2 and 'lora.rnak: unknown name. Did you mean "lora.rank"?' in done.err
    assert run("config").code == 2


def test_remote_code_that_is_asked_for_is_warned_of(run_file: RunFile) -> None:
    warning = "Warning: model.trust_remote_code runs Python code from the checkpoint with all your rights"
    assert warning in run("data", run_file(), "model.trust_remote_code=true").err
    assert warning not in run("data", run_file()).err


def test_data_marks_what_is_learnt_and_lists_dropped_and_cut_rows_with_reasons(
    run_file: RunFile, tmp_path: Path
) -> None:
    long = "word " * 200
    rows = [*alpaca_rows(3), {"instruction": "Empty.", "output": " "}, {"instruction": long, "output": "An end."}]
    config = run_file(data={"train": str(write_rows(tmp_path / "mixed.jsonl", rows))})
    done = run("data", config, "--rows", "2")
    assert (done.code, done.err) == (0, "")
    assert "format alpaca" in done.out and "learnt text stands between ⟦ and ⟧" in done.out
    shown = [line for line in done.out.splitlines() if "⟦" in line and "<|im_end|>" in line]
    assert len(shown) == 2 and all("⟦one" in line or "⟦ one" in line for line in shown)
    assert "<|im_start|>user\nCount to 1.\nin words<|im_end|>" in done.out, "the row as the model sees it"
    assert "mixed.jsonl line 1: " in done.out and " tokens, " in done.out
    assert "\ntrain: 5 rows (3 kept, 1 " in done.out and "longest 128" in done.out and "held out" not in done.out
    assert "mixed.jsonl line 4: dropped: nothing to learn" in done.out
    assert "mixed.jsonl line 5: truncated: over max_length" in done.out
    assert not (tmp_path / "out").exists()


def test_data_shows_held_out_rows_and_what_was_lost_among_them(run_file: RunFile, tmp_path: Path) -> None:
    held = [*alpaca_rows(2), {"instruction": "Empty.", "output": " "}, {"instruction": "w " * 200, "output": "An end."}]
    file = write_rows(tmp_path / "held.jsonl", held)
    done = run("data", run_file(), f"evaluation.file={file}", "--rows", "1")
    assert (done.code, done.err) == (0, "")
    assert f"\n{tmp_path}/rows.jsonl line 1: " in done.out and f"\nheld out, {file} line 1: " in done.out
    assert f"{file} line 2: " not in done.out
    assert "\ntrain: 24 rows (24 kept)\n" in done.out
    assert "\nheld out: 4 rows (2 kept, 1 " in done.out
    assert f"\n  {file} line 3: dropped: nothing to learn\n" in done.out
    assert f"\n  {file} line 4: truncated: over max_length\n" in done.out


def test_data_counts_completions_whose_written_eos_was_taken_off(run_file: RunFile, tmp_path: Path) -> None:
    rows = [{"prompt": "Say it. ", "completion": f"It{end}"} for end in ("<|im_end|>", "<|im_end|>", "")]
    done = run("data", run_file(data={"train": str(write_rows(tmp_path / "ended.jsonl", rows))}))
    assert done.out.count("Say it. ⟦It<|im_end|>⟧\n") == 3, done
    assert "\ntrain: 3 rows (2 kept without the eos text at the end, 1 kept)\n" in done.out
    assert "ended.jsonl line 1: kept" not in done.out


def test_data_says_which_rows_a_share_holds_out(run_file: RunFile) -> None:
    done = run("data", run_file(), "evaluation.share=0.25", "--rows", "2")
    assert "\ntrain: 18 rows (18 kept)\n" in done.out and "\nheld out: 6 rows (6 kept)\n" in done.out
    heads = [line for line in done.out.splitlines() if " learnt, kept" in line]
    assert [line.startswith("held out, ") for line in heads] == [False, False, True, True]
    assert len({line.removeprefix("held out, ") for line in heads}) == 4


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"instruction": "a", "output": "b"}\n{"text": "a"}\n', "evaluation: {tmp}/held.jsonl line 2: has text; the "),
        ('{"instruction": "a", "output": ""}\n', "evaluation: none of the 1 rows has anything to learn: 1 dropped: "),
        ("", "evaluation.file: {tmp}/held.jsonl: no rows. Expected at least one"),
    ],
)
def test_data_refuses_held_out_rows_as_train_does(
    run_file: RunFile, tmp_path: Path, content: str, message: str
) -> None:
    (tmp_path / "held.jsonl").write_text(content)
    words = (run_file(), f"evaluation.file={tmp_path}/held.jsonl")
    shown, trained = run("data", *words), run("train", *words)
    assert (shown.code, trained.code) == (2, 2) and shown.err == trained.err
    assert shown.err.startswith(f"DataError: {message.format(tmp=tmp_path)}")


def test_the_deepspeed_launchers_option_is_accepted_and_a_finished_run_says_so(run_file: RunFile) -> None:
    words = ("--local_rank=0", "train", run_file(), "train.max_steps=1")
    first = run(*words)
    assert first.code == 0, first.err
    assert "step 1/1  loss " in first.err and "\x1b" not in first.err and "adapter: " in first.err
    again = run(*words)
    assert again.code == 0 and again.err.startswith("This run is finished already (1 steps). Adapter: ")


def test_a_process_of_its_own_says_one_thing_about_bad_input(run_file: RunFile, tmp_path: Path) -> None:
    done = qlora("train", run_file(), f"data.train={tmp_path}/none.jsonl")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("DataError: ") and len(done.stderr.splitlines()) == 1, done.stderr


# --- bad input: words behind CONFIG, or the rows; then what the message says, {tmp} being the test's folder

WORDS = {
    "missing data file": (
        "data.train={tmp}/none.jsonl",
        "DataError: data.train: {tmp}/none.jsonl: not found. Give a file, glob or folder of .json, ",
    ),
    "unknown key": ("lora.rnak=3", '\n  lora.rnak: unknown name. Did you mean "rank"? Valid: alpha, '),
    "unknown section": ("lroa.rank=3", '\n  lroa: unknown name. Did you mean "lora"? Valid: '),
    "wrong type": ("lora.rank=many", "\n  lora.rank: 'many' is wrong: "),
    "number out of range": ("lora.dropout=1.5", "\n  lora.dropout: 1.5 is wrong: "),
    "no setting": ("lora.rank", "\n  lora.rank: is no setting. Write section.key=value, such as train.max_steps=20"),
    "batches that do not divide": (
        "train.global_batch_size=5",
        "train.global_batch_size: 5 is not a multiple of micro_batch_size 2. Try 4 or 6",
    ),
    "target that does not exist": (
        "lora.targets=[q_proj, c_attn]",
        "\n  lora.targets: c_attn: no such linear in this model. "
        "It has down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj",
    ),
    "fp16 on a CPU": (
        "train.precision=fp16",
        "\n  train.precision: fp16 does not train on a CPU. Use auto, bf16 or fp32",
    ),
    "missing model": (
        "model.name={tmp}/none",
        "ModelError: model.name: {tmp}/none: no such folder, and no hub id (owner/name). Check the path",
    ),
    "missing held-out file": (
        "evaluation.file={tmp}/none.jsonl",
        "DataError: evaluation.file: {tmp}/none.jsonl: not found.",
    ),
    "missing own format": ("data.format=nowhere:rows", "nowhere"),
    "output of an unknown kind": (
        "output.url=ftpx://a/b",
        "OutputError: output.url: ftpx://a/b: ValueError: Protocol not",
    ),
}

ROW = '{"instruction": "a", "output": "b"}\n'
FILES = {
    "row without needed fields": (
        ROW + '{"instruction": "a", "answer": "b"}\n',
        "rows.jsonl line 2: ",
    ),
    "fields of no known format": ('{"frage": "a", "antwort": "b"}\n', "rows.jsonl line 1: "),
    "broken JSON": (ROW * 2 + '{"instruction": "a", \n', "rows.jsonl line 3: broken JSON: "),
    "row that is no object": (ROW + "[1, 2]\n", "rows.jsonl line 2: a list, expected an object with named fields"),
    "empty data set": ("", "rows.jsonl: no rows. Expected at least one"),
    "nothing to learn in any row": ('{"instruction": "a", "output": ""}\n', "nothing to learn"),
}


def refused(done: Done, tmp_path: Path, words: str) -> str:
    """Exit code 2, one message with these words, no traceback, and no output folder."""
    assert done.code == 2 and done.out == "", done
    kind = done.err.partition(": ")[0]
    assert kind.isidentifier() and kind.endswith("Error"), done.err
    assert "Traceback" not in done.err and words.format(tmp=tmp_path) in done.err, done.err
    assert not (tmp_path / "out").exists()
    return done.err


@pytest.mark.parametrize("word, message", WORDS.values(), ids=WORDS.keys())
def test_a_bad_setting_is_refused(run_file: RunFile, tmp_path: Path, word: str, message: str) -> None:
    refused(run("train", run_file(), word.format(tmp=tmp_path)), tmp_path, message)


@pytest.mark.parametrize("content, message", FILES.values(), ids=FILES.keys())
def test_bad_rows_are_refused_by_file_and_line(run_file: RunFile, tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "rows.jsonl").write_text(content)
    refused(run("train", run_file()), tmp_path, message)


def test_a_row_without_needed_fields_says_which_it_has_and_which_it_needs(run_file: RunFile, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(FILES["row without needed fields"][0])
    said = refused(run("train", run_file()), tmp_path, "line 2")
    assert all(field in said for field in ("answer", "instruction", "output"))


def test_all_faults_of_a_run_file_come_in_one_message(run_file: RunFile, tmp_path: Path) -> None:
    done = run("train", run_file(), "lora.rnak=3", "train.epochs=no", "model.nmae=x")
    said = refused(done, tmp_path, "ConfigError: 3 problems in {tmp}/run.yaml and the settings behind it\n")
    assert all(name in said for name in ("lora.rnak", "train.epochs", "model.nmae"))


def test_a_missing_run_file_is_refused(tmp_path: Path) -> None:
    said = (
        "ConfigError: 1 problem in {tmp}/none.yaml\n  cannot be read: No such file or directory. Give the path of a run"
    )
    refused(run("train", tmp_path / "none.yaml"), tmp_path, said)


def test_a_missing_bucket_is_refused(run_file: RunFile, tmp_path: Path, s3: S3) -> None:
    there = run_file(storage=s3.storage)
    refused(run("train", there, "data.train=s3://no-such-bucket/a.jsonl"), tmp_path, "s3://no-such-bucket/a.jsonl: ")
    refused(run("train", there, "model.name=s3://no-such-bucket/model"), tmp_path, "s3://no-such-bucket/model")
    done = run("train", there, "output.url=s3://no-such-bucket/out")
    refused(done, tmp_path, "OutputError: output.url: s3://no-such-bucket/out: there is no bucket no-such-bucket.")


def test_wrong_keys_are_refused_and_not_printed(run_file: RunFile, tmp_path: Path, s3: S3) -> None:
    env = {"AWS_SECRET_ACCESS_KEY": "not-this-one"}
    words = ("train", run_file(storage=s3.storage), "data.train=s3://bucket/a.jsonl")
    said = refused(run(*words, env=env), tmp_path, "access denied (are the keys in the environment right?)")
    assert "not-this-one" not in said


def test_a_model_folder_without_weights_is_refused(run_file: RunFile, tmp_path: Path, tiny_model: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    done = run("train", run_file(), f"model.name={tmp_path}/model")
    said = refused(
        done, tmp_path, "ModelError: {tmp}/model: no weights. Expected model.safetensors or its parts. The folder"
    )
    assert "config.json" in said


def test_an_output_url_with_another_run_is_refused_and_left_alone(run_file: RunFile, tmp_path: Path) -> None:
    there = RunFolder(load_config(str(run_file()), ["lora.rank=8"]))
    there.begin()
    there.write_status("finished", "", 3)
    before = {file.name: file.read_bytes() for file in (tmp_path / "out/run").iterdir()}
    done = run("train", run_file())
    assert done.code == 2 and "Traceback" not in done.err
    assert "holds a run with other fixed settings\n  lora.rank: 8 there, 4 here\n  Use another output.url" in done.err
    assert {file.name: file.read_bytes() for file in (tmp_path / "out/run").iterdir()} == before


def test_memory_is_no_place_for_what_a_command_leaves(run_file: RunFile) -> None:
    done = run("train", run_file(output={"url": "memory://runs/a"}))
    assert done.code == 2
    assert "output.url: memory://runs/a goes with this process. Use a folder or a bucket" in done.err
