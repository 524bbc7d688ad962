"""A conversion that may be interrupted: what is done lies in OUT.part, which becomes OUT when all of it is done."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from errors import BadInput
from files import Lock, unwritable_named, written_whole

PLAN = "plan.json"
RESULT = "result"


@contextmanager
def becomes_whole(out: Path, plan: dict[str, Any]) -> Iterator[Path]:
    """The folder OUT.part for the block's work, whose `result/` becomes `out` when the block ends without an error.

    `plan` is all that decides the result. Raises BadInput where `out` is there already, where OUT.part was begun by
    another plan or another process is at it, and where OUT.part cannot be made or cannot become `out`.
    """
    if not out.name or out.is_symlink():
        what = "a symbolic link" if out.name else "no name of a folder"
        raise BadInput(f"{out}: is {what}, expected a folder that can be made; choose another place")
    work = out.with_name(f"{out.name}.part")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        if (work / PLAN).exists() and not (work / RESULT).exists():  # of a run that was killed while it cleared it away
            _clear(work)
        raise BadInput(f"{out}: is there already; delete it or choose another place")
    with unwritable_named(work):
        work.mkdir(parents=True, exist_ok=True)
        lock = Lock(work / "lock", f"{work}: another process is converting into it")
    with lock:
        _same_plan(work / PLAN, json.loads(json.dumps(plan)))
        (work / RESULT).mkdir(exist_ok=True)
        lock.forget_parts(work, "**/*")
        yield work
        os.rename(work / RESULT, out)
    _clear(work)


def _clear(work: Path) -> None:
    """Removes it, the plan last: as long as it is there, the folder is known to be one of these."""
    for path in list(work.iterdir()):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != PLAN:
            path.unlink(missing_ok=True)
    shutil.rmtree(work, ignore_errors=True)


def _same_plan(path: Path, plan: dict[str, Any]) -> None:
    try:
        before = json.loads(path.read_text())
    except FileNotFoundError:
        write_json(path, plan)
        return
    except ValueError:
        before = {}
    for key, value in plan.items():
        if before.get(key) != value:
            raise BadInput(
                f"{path.parent}: an interrupted conversion with another {key} is there; go on with the command and the "
                "files that it had, or delete it"
            )


def write_json(path: Path, content: Any) -> None:
    with written_whole(path) as stream:
        stream.write(json.dumps(content, indent=1, ensure_ascii=False).encode())
