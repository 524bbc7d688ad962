"""Instructions of demonstrations and scenes -> 512-D sentence embeddings, written as language_embeddings.npz beside the
demonstrations, in each of several folders its own.

python embed_language.py --data_directory /path/to/libero_object
python embed_language.py --config conf/quickstart.yaml --encoder offline
python embed_language.py --data_directory /read/only/libero_object --output my_embeddings.npz
"""

import argparse
from dataclasses import replace
from pathlib import Path

from config import add_config_flags, load_config
from demos.hdf5 import demos_of, find_task_files
from demos.hdf5_errors import open_hdf5
from demos.hdf5_writing import SCENES_FOLDER
from demos.instructions import task_instruction
from demos.language import embeddings_files, write_embeddings
from demos.scenes import instructions_in
from errors import exits_on_bad_input
from files import expanded


@exits_on_bad_input
def main() -> None:
    parser = argparse.ArgumentParser(description="Embeds the instructions of a data directory.")
    add_config_flags(parser)
    parser.add_argument(
        "--data_directory", type=expanded, metavar="DIR", help="folder of *_demo.hdf5 files (default: the config's)"
    )
    parser.add_argument(
        "--output", type=expanded, metavar="FILE",
        help="where the embeddings go (default: the config's data.language_embeddings, or language_embeddings.npz in "
        "the data directory)",
    )  # fmt: skip
    parser.add_argument(
        "--encoder", choices=("auto", "clip", "offline"), default="auto",
        help="clip (ViT-B/32), offline (weights inside a Python package), or auto: clip if it can be had "
        "(default: %(default)s)",
    )  # fmt: skip
    arguments = parser.parse_args()
    data = load_config(arguments.config, arguments.set).data
    data = replace(data, data_directory=arguments.data_directory or data.data_directory)
    data = replace(data, language_embeddings=arguments.output or data.language_embeddings)
    texts: dict[Path, set[str]] = {}
    for folder in data.folders:
        texts[folder] = set()
        for path in find_task_files(folder):
            with open_hdf5(path) as file:
                texts[folder].add(task_instruction(path, demos_of(path, file)[0]))
        texts[folder] |= instructions_in(folder / SCENES_FOLDER)
    if data.scenes:
        texts[data.folders[0]] |= instructions_in(Path(data.scenes))
    targets = embeddings_files(data)
    of_targets = list(texts.values()) if len(targets) > 1 else [set.union(*texts.values())]
    for target, found in zip(targets, of_targets, strict=True):
        write_embeddings(target, sorted(found), arguments.encoder)


if __name__ == "__main__":
    main()
