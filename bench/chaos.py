"""Checkpoints under chaos: ranks that are killed, damaged files, racing writers and storage that refuses.

    python -m bench.chaos [--seed 0] [--kills 50] [--flips 1000] [--races 50]

From the repository's root. Against a real S3 server, SeaweedFS, with a proxy between it and the runs that delays and
refuses. Prints tables; any fault ends it with an error. Results with date and machine: bench/RESULTS.md.
"""

import argparse
import multiprocessing
import os
import random
import re
import subprocess
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from job.checkpoint import Checkpoints, Manifest
from job.config.running import Storage
from job.store import Store
from tests.chaos import BEFORE, DELAY_S, ELSEWHERE, INSIDE, STARTING, Killer, finish, steps_put
from tests.conftest import make_llama, make_tokenizer
from tests.faults import proxied
from tests.forked import Command
from tests.place import STEPS, Place, run_file, some_rows
from tests.s3 import BUCKET, S3, serve

WRITERS = 8
KILLS_A_RUN = 7


def main(seed: int, kills: int, flips: int, races: int) -> None:
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    print(f"seed {seed}, commit {commit}", flush=True)
    with TemporaryDirectory() as folder, serve(Path(folder, "s3")) as s3:
        os.environ.update(s3.env)
        bench = Bench(s3, Path(folder), seed)
        for part in (bench.undisturbed, lambda: bench.kills(kills), lambda: bench.refusals(3)):
            timed(part)
        timed(lambda: bench.damage(flips))
        timed(lambda: bench.publishers(races))
        timed(lambda: bench.runs(3))


def timed(part: Any) -> None:
    """Do a part and print its table."""
    began = time.monotonic()
    table = part()
    for name, figure in table.items():
        print(f"| {name} | {figure} |")
    print(f"{time.monotonic() - began:.0f} s\n", flush=True)


class Bench:
    """What all parts share: a model, rows, and what an undisturbed run came to."""

    def __init__(self, s3: S3, work: Path, seed: int):
        self.s3, self.work, self.seed = s3, work, seed
        self.model, self.rows = work / "model", some_rows(work)
        make_llama(self.model)
        make_tokenizer(self.model)
        self.place = Place(s3, "undisturbed")

    def file(self, place: Place, seen: S3) -> Path:
        """A run file."""
        return run_file(place, seen.storage, self.model, self.rows, self.work)

    def undisturbed(self) -> dict[str, Any]:
        """The run that all others are compared with; its second start knows how long it takes."""
        finish(self.file(self.place, self.s3), self.s3.env)
        again = Place(self.s3, "again")
        with proxied(self.s3) as (flaky, faults):
            faults.delay_s = DELAY_S
            self.first_s, self.all_s = finish(self.file(again, flaky), flaky.env)
        assert again.result() == self.place.result()
        self.place.check_tidy()
        return {"undisturbed, seconds until the first step and in all": f"{self.first_s:.1f}, {self.all_s:.1f}"}

    def kills(self, count: int) -> dict[str, Any]:
        """Runs that are killed."""
        with proxied(self.s3, self.seed) as (flaky, faults):
            faults.delay_s = DELAY_S
            killer, number = Killer(self.seed, faults, self.first_s, self.all_s), 0
            tally = killer.tally
            while len(tally.kills) < count:
                number += 1
                place = Place(self.s3, f"killed-{number}")
                killer.run(place, self.file(place, flaky), flaky.env, min(KILLS_A_RUN, count - len(tally.kills)))
                assert place.result() == self.place.result(), place.name
        whom = Counter(whom for whom, _ in tally.kills)
        said = Counter(map(last_words, tally.left))
        return {
            "kills: of rank 0, of rank 1, of both": f"{len(tally.kills)}: {whom[0,]}, {whom[1,]}, {whom[0, 1]}",
            **{f"of them {where}": tally.count(where) for where in (BEFORE, INSIDE, STARTING, ELSEWHERE)},
            f"runs of {STEPS} steps, all with the undisturbed run's losses, adapter and state": tally.runs,
            "starts that said where they go on: all at the newest complete checkpoint": len(tally.resumes_s),
            "seconds until they said so, mean": f"{mean(tally.resumes_s):.1f}",
            "steps done again": tally.repeated,
            "ranks left alone that ended by themselves; seconds, mean and most": (
                f"{len(tally.alone_s)}; {mean(tally.alone_s):.1f}, {max(tally.alone_s, default=0):.1f}"
            ),
            "ranks left alone that waited for the other to connect": tally.waiting,
            **{f"said by ranks left alone: {words}": times for words, times in said.most_common()},
        }

    def refusals(self, count: int) -> dict[str, Any]:
        """Runs whose model, rows and output are on storage that is slow and refuses; nothing else lets them fail."""
        self.place.fs.put(f"{self.model}/", f"{BUCKET}/model/", recursive=True)
        self.place.fs.put_file(str(self.rows), f"{BUCKET}/rows.jsonl")
        given: Counter[str] = Counter()
        took = []
        for number in range(count):
            place = Place(self.s3, f"refused-{number}")
            with proxied(self.s3, self.seed + number) as (flaky, faults):
                faults.delay_s, faults.share_503 = 0.2, 0.1
                path = run_file(place, flaky.storage, f"s3://{BUCKET}/model", f"s3://{BUCKET}/rows.jsonl", self.work)
                took.append(finish(path, flaky.env)[1])
                given += faults.given
                assert steps_put(faults.log)
            place.check_tidy()
            assert place.result() == self.place.result(), place.name
        return {
            "runs with 200 ms delay and 10% 503, all with the undisturbed run's losses, adapter and state": count,
            "requests delayed, refused with 503": f"{given['delay_s']}, {given['share_503']}",
            "seconds of a run, mean": f"{mean(took):.0f}",
        }

    def damage(self, count: int) -> dict[str, Any]:
        """Bits flipped and ends cut in the files of complete checkpoints."""
        from job.resume import find
        from job.world import World

        chance, seen = random.Random(self.seed), Counter[str]()
        store = Store(f"s3://{self.place.root}", Storage(**self.s3.storage))
        checkpoints = Checkpoints(store)
        steps = checkpoints.steps()
        world, files = World(), [name for name in self.place.files() if name.startswith("checkpoints/")]
        assert len(steps) > 1
        for _ in range(count):
            name = chance.choice(files)
            step, content = int(name.split("/")[1][5:]), self.place.read(name)
            kind = chance.choice(["bit flipped", "end cut off"])
            self.place.fs.pipe_file(f"{self.place.root}/{name}", damaged(content, kind, chance))
            order, said = sorted(steps, key=lambda other: other != step), list[str]()
            found = find(checkpoints, order, world, said.append, lambda act, what: act())
            assert found is not None and found.manifest.step == order[1], f"{kind} in {name} was not found"
            assert [line.partition(":")[0] for line in said] == [f"skipping the checkpoint of step {step}"], said
            self.place.fs.pipe_file(f"{self.place.root}/{name}", content)
            seen[f"{kind}, of {name.split('/')[2].partition('-')[0].partition('.')[0].rstrip('01')}"] += 1
        last = find(checkpoints, steps, world, print, lambda act, what: act())
        assert last is not None and last.manifest.step == STEPS
        return {"damages, each found and skipped": count, **dict(sorted(seen.items()))}

    def publishers(self, rounds: int) -> dict[str, Any]:
        """Writers that publish different checkpoints of the same step at the same moment."""
        context, name = multiprocessing.get_context("forkserver"), "raced"
        barrier, wins = context.Barrier(WRITERS), context.Queue()
        writers = [
            context.Process(target=publish, args=(self.s3, name, number, rounds, barrier, wins))
            for number in range(WRITERS)
        ]
        for writer in writers:
            writer.start()
        found = [wins.get(timeout=300) for _ in range(WRITERS * rounds)]
        for writer in writers:
            writer.join()
        place, winners = Place(self.s3, name), Counter[int]()
        for step in range(1, rounds + 1):
            won = [number for at, number, wins in found if at == step and wins]
            manifest = f"checkpoints/step-{step:08d}/manifest.json"
            assert len(won) == 1 and place.whole(manifest), (step, won)
            assert Manifest.parse(place.read(manifest)).settings == str(won[0])
            winners[won[0]] += 1
        return {
            f"races of {WRITERS} processes to publish a step, one won each, whole and as it wrote it": rounds,
            "races won by the writer that won most, that won least": (
                f"{max(winners.values())}, {min(winners[number] for number in range(WRITERS))}"
            ),
        }

    def runs(self, rounds: int) -> dict[str, Any]:
        """Whole runs that are started in the same folder at the same moment, each of one rank."""
        ends: Counter[str] = Counter()
        alone = Place(self.s3, "alone")
        finish(self.file(alone, self.s3), self.s3.env, 1)
        for number in range(rounds):
            place = Place(self.s3, f"one-of-many-{number}")
            path = self.file(place, self.s3)
            with ExitStack() as stack:
                commands = [stack.enter_context(Command("train", path, env=self.s3.env)) for _ in range(WRITERS)]
                done = [command.wait(300) for command in commands]
            known = Counter(how_it_ended(one.code, one.err) for one in done)
            assert known["trained"] == 1, [one.err for one in done]
            ends += known
            place.check_tidy()
            assert place.result() == alone.result(), place.name
        return {f"{WRITERS} runs started at once, times": rounds, **{f"of them {how}": n for how, n in ends.items()}}


def how_it_ended(code: int | None, said: str) -> str:
    """One of the three ways in which a run may end that is started together with others."""
    if code == 2 and "is in use by another run that is alive" in said:
        return "refused, the folder is in use"
    assert code == 0, said
    return "told that the run is finished" if "This run is finished already" in said else "trained"


def publish(s3: S3, name: str, number: int, rounds: int, barrier: Any, wins: Any) -> None:
    """A writer: publish one checkpoint a round, each when all others do."""
    os.environ.update(s3.env)
    checkpoints = Checkpoints(Store(f"s3://{BUCKET}/{name}", Storage(**s3.storage)))
    for step in range(1, rounds + 1):
        parts = tuple(
            checkpoints.write(step, kind, f"{kind} {number} {step}".encode() * 999) for kind in ("run", "a.b")
        )
        barrier.wait(120)
        wins.put((step, number, checkpoints.publish(Manifest(step, str(number), None, parts))))
        barrier.wait(120)


def damaged(content: bytes, kind: str, chance: random.Random) -> bytes:
    """One bit changed, or any number of bytes missing at the end."""
    if kind == "end cut off":
        return content[: chance.randrange(len(content))]
    at = chance.randrange(len(content))
    return content[:at] + bytes([content[at] ^ 1 << chance.randrange(8)]) + content[at + 1 :]


def last_words(said: str) -> str:
    """The last line without the numbers, which differ each time, and whether it ends a traceback."""
    line = re.sub(r"\d+", "N", (said.strip().splitlines() or ["nothing"])[-1])[:120]
    return f"a traceback, {line}" if "Traceback" in said else line


def mean(values: list[float]) -> float:
    return sum(values) / max(len(values), 1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Checkpoints under chaos.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--flips", type=int, default=1000)
    parser.add_argument("--races", type=int, default=50)
    main(**vars(parser.parse_args()))
