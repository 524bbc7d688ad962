"""Demonstrations to and from LeRobot datasets.

python convert_lerobot.py export data/libero_object exported/libero_object
python convert_lerobot.py export data/libero_object exported/libero_object --pictures video --language

A conversion that was stopped, however hard, goes on where it was with the same command.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from config import LARGEST, load_config
from errors import BadInput, exits_on_bad_input
from files import expanded


def parse_arguments(arguments=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    directions = parser.add_subparsers(dest="direction", required=True)
    # fmt: off
    add = directions.add_parser("export", help="LIBERO's HDF5 files -> a LeRobot dataset v3.0").add_argument
    add("data", metavar="DATA", type=expanded, help="folder of *_demo.hdf5 files")
    add("out", metavar="OUT", type=expanded, help="the dataset's folder, which must not be there yet")
    add("--pictures", choices=("image", "video"), default="image",
        help="image: PNG, equal in every pixel; video: mp4 (h264), smaller and not exact (default: %(default)s)")
    add("--language", action="store_true",
        help="adds the instruction's embedding as observation.environment_state, for policies that read no text")
    # fmt: on
    return parser.parse_args(arguments)


@exits_on_bad_input
def main() -> None:
    args = parse_arguments()
    try:
        from lerobot_format.export import export
    except ImportError as problem:
        raise BadInput(f"a package is missing ({problem}); `pip install -r requirements-interop.txt`") from None
    data = replace(load_config().data, data_directory=args.data, demos_per_task=LARGEST)
    try:
        done = export(data, Path(args.out), args.pictures, args.language)
    except KeyboardInterrupt:
        print("\nStopped. Finished files are kept; the same command continues.")
        raise SystemExit(130) from None
    print(f"{args.out}: {len(done.episodes)} episodes, {done.num_frames} frames, {len(done.tasks)} tasks")


if __name__ == "__main__":
    main()
