"""Which code made a checkpoint or a result: the commit, and whether files were changed since."""

import functools
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent


@functools.cache
def code_version() -> str:
    """The commit's forty digits, with " + changes" where tracked files differ from it; "unknown" outside a checkout."""
    commit = _git("rev-parse", "HEAD")
    if commit is None or _git("rev-parse", "--show-prefix"):  # a copy inside somebody else's repository
        return "unknown"
    return f"{commit} + changes" if _git("status", "--porcelain", "--untracked-files=no") else commit


def _git(*arguments: str) -> str | None:
    """What git says about this folder, None where there is no git or it refuses. Another user's checkout is fine: only
    questions are asked."""
    command = ["git", "-c", "safe.directory=*", "-C", str(ROOT), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
