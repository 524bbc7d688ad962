"""What ended a worker, found in all that it printed."""

import re

IGNORED = ("Exception ignored", "Error in atexit")  # Python's words above a traceback that ended nothing


def exception_line(output: str) -> str | None:
    """The line that names the exception, such as "MemoryError: ...": the last traceback's own, though other lines may
    follow it. Of a fatal error the line of faulthandler. None where the output has neither."""
    found, before, in_traceback = None, "", False
    for line in output.splitlines():
        if line.startswith("Traceback (most recent call last):"):
            in_traceback = not before.startswith(IGNORED)
        elif in_traceback and line and not line[0].isspace():
            found, in_traceback = line, False
        elif line.startswith("Fatal Python error: "):
            found = line
        before = line
    return found


def place_of_hang(output: str) -> str | None:
    """The innermost frame that faulthandler printed, such as 'File "x.py", line 3 in f'."""
    match = re.search(r"\(most recent call first\):\n\s+(File .*)", output)
    return match and match.group(1)
