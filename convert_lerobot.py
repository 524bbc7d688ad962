"""Demonstrations to and from LeRobot datasets.

python convert_lerobot.py export data/libero_object exported/libero_object
python convert_lerobot.py export data/libero_object exported/libero_object --pictures video --language
python convert_lerobot.py import downloaded/libero data/imported
python convert_lerobot.py import downloaded/other data/imported --key agentview_rgb=observation.images.top

A conversion that was stopped, however hard, goes on where it was with the same command. docs/lerobot.md says which
datasets are known, and what is lost on the way.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from config import LARGEST, load_config
from errors import BadInput, exit_code, exits_on_bad_input
from files import expanded


def parse_arguments(arguments=None) -> argparse.Namespace:
    whole = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=whole)
    directions = parser.add_subparsers(dest="direction", required=True)
    # fmt: off
    add = directions.add_parser("export", help="LIBERO's HDF5 files -> a LeRobot dataset v3.0").add_argument
    add("source", metavar="DATA", type=expanded, help="folder of *_demo.hdf5 files")
    add("out", metavar="OUT", type=expanded, help="the dataset's folder, which must not be there yet")
    add("--pictures", choices=("image", "video"), default="image",
        help="image: PNG, equal in every pixel; video: mp4 (h264), smaller and not exact (default: %(default)s)")
    add("--image_size", type=int, metavar="PIXELS", help="makes the pictures smaller (default: as they are)")
    add("--language", action="store_true",
        help="adds the instruction's embedding as observation.environment_state, for policies that read no text")
    add = directions.add_parser("import", help="a LeRobot dataset v3.0 or v2.1 -> LIBERO's HDF5 files").add_argument
    add("source", metavar="DATASET", type=expanded, help="the dataset's folder")
    add("out", metavar="OUT", type=expanded, help="folder of the HDF5 files, which must not be there yet")
    add("--preset", choices=("statevla", "libero", "physical-intelligence", "ipec"),
        help="whose names the features have (default: the first whose features are all there)")
    add("--key", action="append", default=[], metavar="KEY=FEATURE",
        help="which feature a key of the HDF5 file comes from, such as agentview_rgb=observation.images.top or "
        "gripper_states=observation.state[6:8]; may be repeated")
    add("--orientation", choices=("turned", "raw"), default="turned",
        help="turned: pictures stand by 180 degrees against LIBERO's raw rows, as in all known sets; raw: they do not "
        "(default: %(default)s)")
    add("--closes", choices=("high", "low"),
        help="whether the higher or the lower gripper command closes (default: found out from the fingers)")
    # fmt: on
    parser.epilog = "\n".join(direction.format_help() for direction in directions.choices.values())
    return parser.parse_args(arguments)


def export_demos(args: argparse.Namespace) -> None:
    from lerobot_format.export import export

    data = replace(load_config().data, data_directory=args.source, demos_per_task=LARGEST, max_len_data=LARGEST)
    done = export(data, Path(args.out), args.pictures, args.language, args.image_size)
    print(f"{args.out}: {len(done.episodes)} episodes, {done.num_frames} frames, {len(done.tasks)} tasks")


def import_demos(args: argparse.Namespace) -> None:
    from lerobot_format.to_hdf5 import Import, convert

    work = Import(Path(args.source), args.preset, args.key, args.orientation, args.closes)
    print("\n".join(work.told()))
    convert(work, Path(args.out))
    print(f"{args.out}: {len(work.files)} files, {len(work.dataset.episodes)} demos")
    print(f"next: python embed_language.py --data_directory {args.out}")


@exits_on_bad_input
def main() -> None:
    args = parse_arguments()
    try:
        (export_demos if args.direction == "export" else import_demos)(args)
    except ImportError as problem:
        raise BadInput(f"a package is missing ({problem}); `pip install -r requirements-interop.txt`") from None
    except KeyboardInterrupt as stop:
        print(f"\nStopped. What is done is kept in {args.out}.part; the same command continues.")
        raise SystemExit(exit_code(stop)) from None


if __name__ == "__main__":
    main()
