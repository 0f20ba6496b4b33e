"""Where the time until the first step goes: `qlora train` in this process, looked at twenty times a second.

    python -m bench.first_step RUN_FILE [KEY=VALUE...]

Prints, in the order of their beginning, which functions of the package were at work for how long, which libraries they
were in, and where these were most often; what took less than a fifth of a second is left out. Ends with the first step;
takes a run of one process. Says too how many modules had to be compiled and will be again, which takes longer than all
else (`python -m compileall` on where they are). Results with date and hardware: bench/RESULTS.md.
"""

import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import job

EVERY_S = 0.05
LEAST_S = 0.2
PACKAGE = str(Path(job.__file__).parent)


class Seen(NamedTuple):
    """One look: seconds since the start, the innermost place in the package, the libraries on the stack, and the
    innermost place at all."""

    at: float
    place: str
    libraries: tuple[str, ...]
    inside: str


def look(frame: FrameType | None, at: float) -> Seen:
    """What is on a stack."""
    place, libraries = "-", []
    inside = f"{Path(frame.f_code.co_filename).name} {frame.f_code.co_name}" if frame else "-"
    while frame is not None:
        file = frame.f_code.co_filename
        if place == "-" and file.startswith(PACKAGE):
            place = f"{Path(file).relative_to(PACKAGE)} {frame.f_code.co_name}"
        if "site-packages/" in file:
            libraries.append(file.split("site-packages/")[1].split("/")[0])
        frame = frame.f_back
    return Seen(at, place, tuple(dict.fromkeys(libraries)), inside)


def compiled_each_time() -> int:
    """How many modules' bytecode is kept nowhere."""
    specs = [getattr(module, "__spec__", None) for module in tuple(sys.modules.values())]
    kept = [getattr(spec, "cached", None) for spec in specs]
    return sum(not Path(one).exists() for one in kept if one)


def main() -> None:
    begun, main_thread = time.time(), threading.main_thread().ident
    seen: list[Seen] = []
    done = threading.Event()

    def watch() -> None:
        while not done.wait(EVERY_S):
            seen.append(look(sys._current_frames().get(main_thread or 0), time.time() - begun))

    threading.Thread(target=watch, daemon=True).start()
    sys.argv = ["qlora", "train", *sys.argv[1:]]
    from job import engine
    from job.cli import main as command

    step = engine.Engine.train_step

    def first(*given: object, **named: object) -> object:
        found = step(*given, **named)  # type: ignore[arg-type]
        done.set()
        return found

    engine.Engine.train_step = first  # type: ignore[method-assign,assignment]
    try:
        command()
    finally:
        looks: dict[str, list[Seen]] = {}
        for one in seen:
            looks.setdefault(one.place, []).append(one)
        for place, found in looks.items():
            if len(found) * EVERY_S >= LEAST_S:
                libraries = Counter(name for one in found for name in one.libraries)
                names = " ".join(name for name, _ in libraries.most_common(4))
                (inside, times), *_ = Counter(one.inside for one in found).most_common(1)
                most = f"{names}; {times * EVERY_S:.2f} s in {inside}"
                print(f"{found[0].at:7.2f} {len(found) * EVERY_S:6.2f} s  {place:45} {most}")
        print(f"{seen[-1].at:7.2f} s until the first step was done; {compiled_each_time()} modules have no bytecode")


if __name__ == "__main__":
    main()
