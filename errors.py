"""What every script does with bad input: one sentence on stderr and exit code 2, no traceback."""

import functools
import sys


class BadInput(Exception):
    """The user's mistake in one sentence: which file or key, what was found, what was expected."""


def exits_on_bad_input(main):
    """Wraps a script's main(): BadInput and running out of memory become one sentence and exit code 2."""

    @functools.wraps(main)
    def wrapped(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except BadInput as mistake:
            print(f"error: {mistake}", file=sys.stderr)
            sys.exit(2)
        except RuntimeError as problem:  # torch.OutOfMemoryError on a GPU, a plain RuntimeError on the CPU
            if "out of memory" not in str(problem) and "can't allocate memory" not in str(problem):
                raise
            print("error: out of memory; try a smaller batch, for example --batch_size 32", file=sys.stderr)
            sys.exit(2)

    return wrapped
