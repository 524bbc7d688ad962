"""Demonstrations examined before a training: what is wrong with them, what is odd, what they look like.

    python check_demos.py data/libero_object
    python check_demos.py data/libero_object data/imported --preview preview.png

Reads every file as training does, but goes on behind a problem, and looks at every picture. Prints a table of each
folder and then every problem with its file, demo and key, what was found and what was expected: an error is what
training refuses, a warning what it reads without a word. The exit code is 1 where there is an error, 0 otherwise.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from checkup.folder import examine, refused_together
from checkup.preview import draw_preview
from checkup.table import folder_table
from config import add_config_flags, load_config
from demos.hdf5 import find_task_files
from errors import BadInput, exits_on_bad_input
from files import expanded


@exits_on_bad_input
def main() -> None:
    arguments = parse_arguments()
    config = load_config(arguments.config, arguments.set)
    folders = []
    for directory in arguments.directories:
        folders.append(examine(replace(config, data=replace(config.data, data_directory=directory))))
        print("\n".join(folder_table(folders[-1])), end="\n\n")

    errors = [sentence for folder in folders for sentence in folder.all_errors()]
    warnings = [sentence for folder in folders for sentence in folder.all_warnings()]
    if len(folders) > 1:
        listed = replace(config.data, data_directory=list(map(str, arguments.directories)))
        warnings += refused_together(folders, replace(config, data=listed))
    for kind, sentences in (("warning", warnings), ("error", errors)):
        for sentence in sentences:
            print(f"{kind}: {sentence}")
    files = [report for folder in folders for report in folder.files]
    if arguments.preview:
        num_rows = draw_preview(files, arguments.preview)
        print(f"preview of {num_rows} files: {arguments.preview}" if num_rows else "no preview, no film could be read")
    lengths = [length for report in files for length in report.lengths]
    verdict = "training would refuse them" if errors else "training reads them"
    print(
        f"{len(files)} files, {len(lengths)} demos, {sum(lengths):,} steps: {len(errors)} errors, {len(warnings)} "
        f"warnings; {verdict}"
    )
    sys.exit(1 if errors else 0)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Examines demonstrations and tells all that is wrong with them.")
    parser.add_argument(
        "directories", nargs="+", type=expanded, metavar="DIR", help="data directories, folders of *_demo.hdf5 files"
    )
    parser.add_argument(
        "--preview", type=expanded, metavar="FILE",
        help="draw the first, middle and last picture of both cameras of each file into this PNG (default: none)",
    )  # fmt: skip
    add_config_flags(parser)
    arguments = parser.parse_args()
    for directory in arguments.directories:
        if not Path(directory).is_dir():
            raise BadInput(f"{directory}: no such directory, expected a folder of <task>_demo.hdf5 files")
        find_task_files(directory)
    if arguments.preview:
        arguments.preview = Path(arguments.preview)
        if not arguments.preview.parent.is_dir() or arguments.preview.is_dir():
            raise BadInput(f"--preview {arguments.preview}: expected a file in a directory that is there")
    return arguments


if __name__ == "__main__":
    main()
