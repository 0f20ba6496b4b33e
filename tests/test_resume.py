"""A run that was killed goes on as if nothing had happened: on as many ranks, on others, under other strategies."""

import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save

from job.config import parse_config
from job.engine import Engine
from job.saved import RunState
from job.train import train
from job.world import World
from tests.checkpoints import change_run, manifest, newest, part, rank_states, rewrite, run_state, whole
from tests.conftest import alpaca_rows, losses, metrics, write_rows
from tests.forked import Done, run
from tests.ranks import run_ranks

RunFile = Callable[..., Path]
STEPS = 8
BATCH = {"max_steps": STEPS, "global_batch_size": 6, "micro_batch_size": 1}


def config(run_file: RunFile, name: str, **sections: Any) -> Path:
    """A run of eight steps with dropout that takes a checkpoint every third."""
    sections["train"] = BATCH | sections.get("train", {})
    values = {"lora": {"dropout": 0.1}, "checkpoint": {"every_steps": 3}, "data": {"max_length": 64}} | sections
    path = run_file(name, **values)
    write_rows(path.parent / "rows.jsonl", alpaca_rows(96))
    return path


def killed(ranks: int, path: Path, *words: str, after: int = 4) -> None:
    """Run until the ranks are killed after a step."""
    done = run_ranks(ranks, "train", path, *words, env={"DIE_AFTER_STEP": str(after)})
    assert all(one.code for one in done), done[0].err


def finished(ranks: int, path: Path, *words: str) -> Done:
    """Run to the end; what the first rank said."""
    done = run_ranks(ranks, "train", path, *words)
    assert [one.code for one in done] == [0] * ranks, "\n".join(one.err for one in done)
    return done[0]


def same(one: Path, other: Path) -> bool:
    """Whether two runs came to the same state, bit for bit."""
    first, second = whole(one), whole(other)
    assert first.keys() == second.keys() and len(first) == 3 * 2 * 7 * 2, "master and two moments of A and B"
    return all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(
    ("ranks", "sections"),
    [
        (1, {}),
        (2, {"parallel": {"strategy": "replicate"}}),
        (2, {"parallel": {"strategy": "zero2"}}),
        (2, {"parallel": {"strategy": "zero3", "persistence": 700}}),
        (2, {"parallel": {"strategy": "zero3"}, "train": {"optimizer": "adamw_8bit", "precision": "bf16"}}),
        (1, {"train": {"optimizer": "adamw_8bit"}, "lora": {"rank": 16, "dropout": 0.1}}),
        (2, {"parallel": {"strategy": "zero3", "offload_optimizer": "cpu", "offload_parameters": "cpu"}}),
    ],
)
def test_on_as_many_ranks_a_killed_run_goes_on_bit_for_bit(
    run_file: RunFile, tmp_path: Path, ranks: int, sections: dict[str, Any]
) -> None:
    finished(ranks, config(run_file, "whole", **sections))
    killed(ranks, broken := config(run_file, "broken", **sections))
    assert json.loads((tmp_path / "out/broken/status.json").read_text())["state"] != "finished"
    said = finished(ranks, broken)
    assert "going on after step 3" in said.err
    one, other = tmp_path / "out/whole", tmp_path / "out/broken"
    assert losses(one) == losses(other) and len(losses(one)) == STEPS
    assert [row["learning_rate"] for row in metrics(one)] == [row["learning_rate"] for row in metrics(other)]
    assert same(one, other)
    adapters = [(out / "adapter/adapter_model.safetensors").read_bytes() for out in (one, other)]
    assert adapters[0] == adapters[1]


def test_the_second_copies_of_hpz_follow_what_was_restored(run_file: RunFile, tmp_path: Path) -> None:
    sections = {"parallel": {"strategy": "hpz"}, "train": {"global_batch_size": 8}}
    for name, ends in (("whole", {}), ("broken", {"DIE_AFTER_STEP": "4"}), ("broken", {})):
        done = run_ranks(4, "train", config(run_file, name, **sections), per_node=2, env=ends)
        assert bool(ends) or [one.code for one in done] == [0] * 4, done[0].err
    assert "going on after step 3" in done[0].err
    assert losses(tmp_path / "out/whole") == losses(tmp_path / "out/broken")
    assert same(tmp_path / "out/whole", tmp_path / "out/broken")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((2, "replicate"), (1, "replicate")),
        ((2, "zero3"), (3, "zero3")),
        ((3, "zero3"), (2, "replicate")),
        ((1, "replicate"), (2, "zero3")),
        ((2, "zero2"), (2, "zero3")),
    ],
)
def test_on_other_ranks_or_under_another_strategy_the_losses_are_the_same(
    run_file: RunFile, tmp_path: Path, before: tuple[int, str], after: tuple[int, str]
) -> None:
    finished(1, config(run_file, "whole"))
    path = config(run_file, "moved")
    killed(before[0], path, f"parallel.strategy={before[1]}")
    at_kill = whole(tmp_path / "out/moved", 3)
    said = finished(after[0], path, f"parallel.strategy={after[1]}")
    assert f"from {before[0]} ranks under {before[1]} to {after[0]} under {after[1]}" in said.err
    assert losses(tmp_path / "out/moved") == pytest.approx(losses(tmp_path / "out/whole"), rel=1e-5)
    assert at_kill.keys() == whole(tmp_path / "out/moved").keys()


def test_moments_in_8_bits_are_rounded_again_on_other_ranks_and_that_is_said(run_file: RunFile, tmp_path: Path) -> None:
    eight = {"train": {"optimizer": "adamw_8bit"}, "lora": {"rank": 16, "dropout": 0.1}}
    finished(1, config(run_file, "whole", **eight))
    path = config(run_file, "moved", **eight)
    killed(2, path)
    said = finished(1, path)
    assert "moments in 8 bits are rounded again" in said.err
    assert losses(tmp_path / "out/moved") == pytest.approx(losses(tmp_path / "out/whole"), rel=1e-3)


def damage(out: Path, kind: str) -> None:
    """Remove a part of the newest checkpoint."""
    (part(out, kind) if kind != "manifest" else part(out, "run").parent / "manifest.json").unlink()


@pytest.mark.parametrize("kind", ["run", "rank00000", "rank00001", "best", "manifest"])
def test_without_any_one_part_a_checkpoint_is_skipped_and_the_one_before_is_taken(
    run_file: RunFile, tmp_path: Path, kind: str
) -> None:
    judged = {"evaluation": {"share": 0.25, "every_steps": 2, "keep_best": True}, "checkpoint": {"every_steps": 2}}
    finished(2, config(run_file, "whole", **judged))
    path, out = config(run_file, "broken", **judged), tmp_path / "out/broken"
    killed(2, path, after=5)
    assert newest(out) == 4
    damage(out, kind)
    said = finished(2, path)
    assert "skipping the checkpoint of step 4: " in said.err and "going on after step 2" in said.err
    assert f"it has no {kind}" in said.err or (f"{kind}-" in said.err and "is missing" in said.err)
    assert losses(out) == losses(tmp_path / "out/whole")
    assert [row for row in metrics(out) if "eval_loss" in row] == [
        row for row in metrics(tmp_path / "out/whole") if "eval_loss" in row
    ]
    assert manifest(out, 4), "written again, whole"


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(RunState)])
def test_a_state_that_lacks_a_field_is_skipped(run_file: RunFile, tmp_path: Path, field: str) -> None:
    path, out = config(run_file, "broken", checkpoint={"every_steps": 2}), tmp_path / "out/broken"
    killed(1, path, after=4)
    change_run(out, **{field: None})
    done = run("train", path)
    assert f"skipping the checkpoint of step 4: its run.json lacks or adds {field}" in done.err
    assert done.code == 0 and "going on after step 2" in done.err


def without(out: Path, name: str) -> None:
    """A rank's part without a tensor, under a manifest that fits it."""
    file = part(out, "rank00000")
    with safe_open(file, "pt") as opened:
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - no mapping
        about = opened.metadata()
    del tensors[name]
    rewrite(out, "rank00000", save(tensors, about))


@pytest.mark.parametrize("tensor", ["0.master", "0.exp_avg", "0.exp_avg_sq", "random.cpu"])
def test_a_rank_that_lacks_a_tensor_of_its_state_is_skipped(run_file: RunFile, tmp_path: Path, tensor: str) -> None:
    path, out = config(run_file, "broken", checkpoint={"every_steps": 2}), tmp_path / "out/broken"
    killed(1, path, after=4)
    without(out, tensor)
    done = run("train", path)
    assert f"skipping the checkpoint of step 4: it lacks '{tensor}'" in done.err
    assert done.code == 0 and "going on after step 2" in done.err


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_state_that_lacks_values_is_refused_on_every_rank(run_file: RunFile, tmp_path: Path, ranks: int) -> None:
    path, out = config(run_file, "broken"), tmp_path / "out/broken"
    killed(ranks, path)
    state = rank_states(out)[0]
    (flat,) = state.flats
    rest = flat.pieces[1:]
    rewrite(out, "rank00000", dataclasses.replace(state, flats=[dataclasses.replace(flat, pieces=rest)]).content())
    expected, found = (sum(piece.stop - piece.start for piece in pieces) for pieces in (flat.pieces, rest))
    done = run_ranks(ranks, "train", path)
    assert [one.code for one in done] == [2] * ranks
    assert (
        f"OutputError: output.url: the checkpoint of step 3 has {found} of the trained values that belong on this "
        f"rank, expected {expected}: it is not whole, or was taken of a model of another shape. Bring that model "
        "back, or remove that checkpoint, so that the one before is used\n" in done[0].err
    )


@pytest.mark.parametrize("kind", ["state1", "absmax1", "qmap2", "absmax2"])
def test_moments_in_8_bits_come_back_with_their_scales_or_not_at_all(
    run_file: RunFile, tmp_path: Path, kind: str
) -> None:
    eight = {"train": {"optimizer": "adamw_8bit"}, "lora": {"rank": 16}, "checkpoint": {"every_steps": 2}}
    path, out = config(run_file, "broken", **eight), tmp_path / "out/broken"
    killed(1, path, after=4)
    assert f"0.{kind}" in {f"{n}.{k}" for n, flat in enumerate(rank_states(out)[0].flats) for k in flat.tensors}
    without(out, f"0.{kind}")
    done = run("train", path)
    assert f"skipping the checkpoint of step 4: it lacks '0.{kind}'" in done.err
    assert done.code == 0


def test_random_states_of_a_user_s_code_go_on_where_they_were(
    run_file: RunFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[float, float, float]] = []
    train_step = Engine.train_step
    dies = [False]

    def drawing(self: Engine, *arguments: Any) -> Any:
        if dies[0] and len(drawn) == 5:
            raise RuntimeError("killed")
        drawn.append((random.random(), float(numpy.random.rand()), float(torch.rand(()))))
        return train_step(self, *arguments)

    monkeypatch.setattr(Engine, "train_step", drawing)
    for name in ("whole", "broken"):
        dies[0] = name == "broken"
        settings = parse_config(config(run_file, name).read_text())
        if dies[0]:
            with pytest.raises(RuntimeError, match="killed"):
                train(settings, World(), lambda line: None)
            dies[0] = False
            del drawn[3:]  # the checkpoint is that of step 3
        train(settings, World(), lambda line: None)
        drawn, expected = [], drawn
        if name == "whole":
            undisturbed = expected
    assert expected == undisturbed and len(set(expected)) == STEPS


def test_the_random_states_of_every_rank_go_on(run_file: RunFile, tmp_path: Path) -> None:
    for name, after in (("whole", None), ("broken", 4), ("broken", None)):
        ends = {} if after is None else {"DIE_AFTER_STEP": str(after)}
        done = run_ranks(2, "train", config(run_file, name), env={"DRAW_EACH_STEP": "1", **ends})
        assert bool(after) or [one.code for one in done] == [0, 0], done[0].err
    one, other = rank_states(tmp_path / "out/whole"), rank_states(tmp_path / "out/broken")
    for before, after_kill in zip(one, other, strict=True):
        assert before.random.keys() == after_kill.random.keys() >= {"python", "numpy", "random.cpu"}
        assert before.random["python"] == after_kill.random["python"]
        assert before.random["numpy"] == after_kill.random["numpy"]
        assert torch.equal(before.random["random.cpu"], after_kill.random["random.cpu"])
    assert one[0].random["python"] != one[1].random["python"], "ranks draw other numbers"


def test_loss_scaling_is_kept_and_handed_back(
    run_file: RunFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scaling = dict.fromkeys(("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis"), 7)
    handed: list[Any] = []
    monkeypatch.setattr(Engine, "scaler", lambda self: scaling)
    monkeypatch.setattr(Engine, "restore_scaler", lambda self, values: handed.append(values))
    settings = parse_config(config(run_file, "run").read_text())
    train(settings, World(), lambda line: None)
    assert run_state(tmp_path / "out/run").scaler == scaling and not handed
    train(parse_config(config(run_file, "run", train={"max_steps": 9}).read_text()), World(), lambda line: None)
    assert handed == [scaling]


def test_rows_that_changed_are_refused(run_file: RunFile, tmp_path: Path) -> None:
    path = config(run_file, "run")
    killed(1, path)
    write_rows(tmp_path / "rows.jsonl", alpaca_rows(95))
    done = run("train", path)
    assert (
        done.code == 2
        and (
            "data.train: the rows are not those that the checkpoint of step 3 was trained on. Bring them back, or use "
            "another output.url"
        )
        in done.err
    )
    write_rows(tmp_path / "rows.jsonl", alpaca_rows(96))
    assert run("train", path).code == 0


def test_another_fixed_setting_is_refused_with_old_value_and_new(run_file: RunFile) -> None:
    path = config(run_file, "run")
    killed(1, path)
    done = run("train", path, "lora.rank=8")
    assert done.code == 2 and "lora.rank: 4 there, 8 here" in done.err
    assert "Use another output.url, or set these back to what they were" in done.err


def test_a_finished_run_goes_on_when_it_shall_take_more_steps(run_file: RunFile, tmp_path: Path) -> None:
    path, out = config(run_file, "run", train={"schedule": "constant", "warmup_steps": 0}), tmp_path / "out/run"
    finished(1, config(run_file, "whole", train={"schedule": "constant", "warmup_steps": 0, "max_steps": 12}))
    finished(1, path)
    again = run("train", path)
    assert again.code == 0 and "This run is finished already (8 steps)" in again.err
    more = run("train", path, "train.max_steps=12")
    assert more.code == 0 and "the schedule now ends after step 12, it was 8" in more.err
    assert losses(out) == losses(tmp_path / "out/whole")
    assert same(out, tmp_path / "out/whole")
    assert json.loads((out / "status.json").read_text())["step"] == 12


def forgetful(run_file: RunFile, name: str, *, max_steps: int = 8, checkpoint: Any = None, **evaluation: Any) -> Path:
    """A run that learns in three steps what it is judged by, and then forgets it over other rows."""
    folder = run_file(name).parent
    first = [row | {"output": "one one one one one"} for row in alpaca_rows(18)]
    path = config(
        run_file,
        name,
        data={"shuffle": False, "packing": False, "max_length": 64},
        evaluation={"file": str(write_rows(folder / "judged.jsonl", first)), "every_steps": 1, **evaluation},
        checkpoint={"every_steps": 1, **(checkpoint or {})},
        train={"max_steps": max_steps, "learning_rate": 0.02, "schedule": "constant", "warmup_steps": 0},
    )
    write_rows(folder / "rows.jsonl", first + [row | {"output": "zq9" * 10} for row in alpaca_rows(54)])
    return path


def judged(out: Path) -> dict[int, float]:
    """Evaluation losses by step, without the one before training."""
    return {row["step"]: row["eval_loss"] for row in metrics(out) if "eval_loss" in row and row["step"]}


def best_step(out: Path) -> int:
    """The step with the lowest evaluation loss."""
    losses = judged(out)
    return min(losses, key=lambda step: losses[step])


def taken(out: Path) -> list[int]:
    """Steps whose checkpoints are there."""
    return sorted(int(folder.name[5:]) for folder in (out / "checkpoints").iterdir())


def test_the_newest_checkpoints_are_kept_and_the_best_one(run_file: RunFile, tmp_path: Path) -> None:
    finished(1, forgetful(run_file, "run", checkpoint={"keep": 2, "keep_best": True}))
    out = tmp_path / "out/run"
    best, kept = best_step(out), taken(out)
    assert best < 6, judged(out)
    assert best in kept and kept[-1] == 8 and len(kept) <= 3


def test_checkpoints_are_taken_after_each_epoch(run_file: RunFile, tmp_path: Path) -> None:
    epochs = {"train": {"max_steps": None, "epochs": 3.0}, "checkpoint": {"every_epoch": True, "keep": 9}}
    path = config(run_file, "run", **epochs)
    write_rows(path.parent / "rows.jsonl", alpaca_rows(30))
    finished(1, path)
    ends = [row["step"] for row in metrics(tmp_path / "out/run") if row["epoch"].is_integer()]
    found = taken(tmp_path / "out/run")
    assert len(ends) == len(found) == 3
    assert all(end <= step <= end + 3 for end, step in zip(ends, found, strict=True)), "later while one is written"


def test_checkpoints_are_taken_by_the_clock_of_the_first_rank(run_file: RunFile, tmp_path: Path) -> None:
    at_once = {"checkpoint": {"every_minutes": 1e-6, "keep": 99}, "train": {"max_steps": 30}}
    finished(2, config(run_file, "run", **at_once))
    often = taken(tmp_path / "out/run")
    assert len(often) > 2 and often[-1] == 30, "as soon as the last one was written"
    finished(2, config(run_file, "seldom", **{**at_once, "checkpoint": {"every_minutes": 60.0}}))
    assert taken(tmp_path / "out/seldom") == [30], "the end"


def test_the_best_adapter_before_a_kill_is_the_one_that_is_left(run_file: RunFile, tmp_path: Path) -> None:
    finished(2, forgetful(run_file, "whole", keep_best=True))
    one, other = tmp_path / "out/whole", tmp_path / "out/broken"
    assert best_step(one) < 6, judged(one)
    killed(2, path := forgetful(run_file, "broken", keep_best=True), after=6)
    finished(1, path)
    adapters = [(out / "adapter/adapter_model.safetensors").read_bytes() for out in (one, other)]
    assert adapters[0] == adapters[1]
    assert run_state(other).counters["kept_eval"] == min(judged(one).values())


def test_patience_counts_on_after_a_kill(run_file: RunFile, tmp_path: Path) -> None:
    finished(1, forgetful(run_file, "whole", patience=3, max_steps=40))
    end = len(losses(tmp_path / "out/whole"))
    assert 4 < end < 40
    killed(1, path := forgetful(run_file, "broken", patience=3, max_steps=40), after=end - 1)
    finished(1, path)
    assert losses(tmp_path / "out/broken") == losses(tmp_path / "out/whole")
    again = run("train", path)
    assert "finished already" in again.err
    assert "finished already" not in run("train", path, "evaluation.patience=5").err


@pytest.mark.parametrize("missing", [("counters", "worse"), ("counters", "left_out"), ("schedule", "steps")])
def test_a_state_whose_numbers_are_incomplete_is_skipped(
    run_file: RunFile, tmp_path: Path, missing: tuple[str, str]
) -> None:
    path, out = config(run_file, "broken", checkpoint={"every_steps": 2}), tmp_path / "out/broken"
    killed(1, path, after=4)
    field, name = missing
    values = {key: value for key, value in getattr(run_state(out), field).items() if key != name}
    change_run(out, **{field: values})
    done = run("train", path)
    assert f"skipping the checkpoint of step 4: {field} in its run.json lacks or adds {name}" in done.err
    assert done.code == 0 and "going on after step 2" in done.err


def test_a_run_that_is_lost_again_and_again_without_progress_fails(run_file: RunFile, tmp_path: Path) -> None:
    path, out = config(run_file, "run", checkpoint={"every_steps": 3, "max_restarts": 2}), tmp_path / "out/run"
    for _ in range(3):
        killed(1, path, after=5)
    assert json.loads((out / "status.json").read_text())["restarts"] == 2
    done = run("train", path)
    said = "lost 3 times without a new checkpoint since step 3 (checkpoint.max_restarts is 2)"
    assert done.code == 1 and f"the run was {said}" in done.err
    status = json.loads((out / "status.json").read_text())
    assert (status["state"], status["reason"]) == ("failed", said)
    assert run("train", path).code == 0, "somebody looked for the cause"


def test_a_run_without_any_usable_checkpoint_starts_from_the_beginning_and_says_so(
    run_file: RunFile, tmp_path: Path
) -> None:
    finished(1, config(run_file, "whole"))
    path, out = config(run_file, "run"), tmp_path / "out/run"
    killed(1, path)
    damage(out, "rank00000")
    done = run("train", path)
    assert done.code == 0 and f"no usable checkpoint in {out}: starting from the beginning" in done.err
    assert losses(out) == losses(tmp_path / "out/whole")


def test_a_checkpoint_holds_what_trains_and_nothing_of_the_base(run_file: RunFile, tmp_path: Path) -> None:
    finished(1, config(run_file, "run"))
    out = tmp_path / "out/run"
    assert {name for name, _ in whole(out)} and all("lora_" in name for name, _ in whole(out))
    state = run_state(out)
    assert state.counters["step"] == STEPS and state.schedule["steps"] == STEPS
    assert state.settings["lora"]["rank"] == 4
