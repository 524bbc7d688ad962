"""Makes of a checkpoint a folder that can be handed on, without a pickle in it and with a card for people.

    python export_policy.py --checkpoint checkpoints/phase2_flow_matching/checkpoint_best.pt --output_dir my_policy \\
        --evaluation results/libero_object_1/results.json

The folder has model.safetensors, config.json and README.md. It takes a checkpoint's place wherever one is asked for, on
disk and, once it was uploaded, as hf://owner/name[@revision]. The weights stay what they are, bit for bit, so that an
evaluation goes on or is compared whichever of the two it was started with. A training cannot be resumed from it.
"""

import argparse
from pathlib import Path

from errors import exits_on_bad_input
from files import expanded
from published.card import card_of, evaluations_of
from published.folder import weights_sha256, write_folder
from training.checkpoint import SCHEMA, read_checkpoint


@exits_on_bad_input
def main() -> None:
    arguments = parse_arguments()
    checkpoint, directory = read_checkpoint(arguments.checkpoint), Path(arguments.output_dir)
    sha256 = weights_sha256(checkpoint["model_state_dict"])
    evaluations = evaluations_of([Path(path) for path in arguments.evaluation], sha256)
    is_personal = directory.is_absolute() or ".." in directory.parts
    card = card_of(checkpoint, directory.name if is_personal else str(directory), evaluations)
    write_folder(checkpoint | {"schema": SCHEMA}, directory, card)
    for path in sorted(path for path in directory.iterdir() if path.is_file()):
        print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")
    print(f"weights {sha256}; `hf upload OWNER/NAME {directory}` puts the folder on the hub")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Writes a checkpoint's weights, settings and model card into a folder to be handed on."
    )
    parser.add_argument("--checkpoint", type=expanded, required=True, help="what is exported")
    parser.add_argument("--output_dir", type=expanded, required=True, help="the folder; an earlier export is replaced")
    parser.add_argument(
        "--evaluation",
        type=expanded,
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help="results.json of run_libero_eval.py that come into the card, played by these weights or by a blind policy",
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
