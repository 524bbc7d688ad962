"""Which code made a checkpoint or a result: the commit, and whether files were changed since."""

import functools
import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent


@functools.cache
def code_version() -> str:
    """The commit's forty digits, with " + changes" where tracked files differ from it; "unknown" outside a checkout."""
    commit, folder = _git("rev-parse", "HEAD"), _git("rev-parse", "--show-prefix")
    if commit is None or folder is None or folder:  # a folder: a copy inside somebody else's repository
        return "unknown"
    changes = _git("status", "--porcelain", "--untracked-files=no")
    if changes is None:
        return f"{commit} + perhaps changes"
    return f"{commit} + changes" if changes else commit


def _git(*arguments: str) -> str | None:
    """What git says about this folder, None where there is no git or it refuses. Another user's checkout is fine: its
    code runs already. The index is left alone, and so are variables like GIT_DIR, which a git hook sets for its own
    repository."""
    command = ["git", "--no-optional-locks", "-c", "safe.directory=*", "-C", str(ROOT), *arguments]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=10, env=environment)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
