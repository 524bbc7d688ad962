"""A checkpoint as a folder that can be handed on: written, and read back as the dictionary that it was made of.

    model.safetensors   the weights and the instructions' embeddings, numbers alone
    config.json         all else that makes an evaluation independent of any other file, readable by people
    README.md           the card (card.py)

What only a training needs to go on, such as the optimizer's state, stays behind.
"""

import hashlib
import json
import math
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from errors import BadInput
from files import Lock, unwritable_named, written_whole
from published import CARD, FACTS, WEIGHTS

EMBEDDINGS = "language.embeddings"  # (n, lang_emb_dim), beside the weights
LARGEST_FACTS = 32_000_000  # bytes; the demos that are held out are listed in it
KEPT = (
    "schema", "code", "phase", "epoch", "step", "loss", "best_loss", "success", "best_success", "precision",
    "observation", "instructions", "held_out_demos", "split_rule", "config",
)  # fmt: skip
MOST_NAMES = 4  # of a folder's path
LFS_POINTER = b"version https://git-lfs"


def weights_sha256(weights: dict[str, Tensor]) -> str:
    """A hash of names, types, shapes and values, whatever file they come from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# -------------------------------------------------------------------------------------------------------- writing


def write_folder(checkpoint: dict, directory: Path, card: str) -> None:
    """checkpoint: as `training.checkpoint.read_checkpoint` gives it. An earlier export in the folder is replaced.

    Raises BadInput where the folder is another program's, or cannot be written.
    """
    with unwritable_named(f"--output_dir {directory}"):
        directory.mkdir(parents=True, exist_ok=True)
        lock = Lock(directory / ".lock", f"--output_dir {directory}: another export is writing into this folder")
    with lock:
        _check_free(directory)
        language = checkpoint["language"]
        own, same_as = _each_once(checkpoint["model_state_dict"])
        embeddings = torch.stack(list(language["embeddings"].values()))
        weights = safetensors.torch.save(own | {EMBEDDINGS: embeddings}, metadata={"format": "pt"})
        facts = {key: _as_json(checkpoint[key]) for key in KEPT if key in checkpoint} | {
            "config": portable(checkpoint["config"]),
            "language": {"encoder": language["encoder"], "instructions": list(language["embeddings"])},
            "weights": {
                "file_sha256": hashlib.sha256(weights).hexdigest(),
                "weights_sha256": weights_sha256(checkpoint["model_state_dict"]),
                "same_as": same_as,
            },
        }
        contents = {WEIGHTS: weights, CARD: card.encode(), FACTS: (json.dumps(facts, indent=2) + "\n").encode()}
        for name, content in contents.items():  # the facts last: what is half replaced fits no hash, and is not read
            with unwritable_named(directory / name), written_whole(directory / name) as stream:
                stream.write(content)


def _as_json(value):
    """JSON has no NaN, the loss of a checkpoint that was not validated, and no infinity, that of no best one yet."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def portable(config: dict) -> dict:
    """The settings without the places of one machine, of which the next has others: whoever reads them writes nowhere
    that they name, and the folder says nothing of its writer's disk."""
    data, training = config.get("data"), config.get("training")
    if not isinstance(data, dict) or not isinstance(training, dict):
        return config
    folders, scenes = data.get("data_directory"), data.get("scenes")
    places = _portable_places(folders if isinstance(folders, list) else [folders])
    data = data | {
        "data_directory": places if isinstance(folders, list) else places[0],
        "scenes": None if scenes is None else _portable_places([scenes])[0],
        "cache_directory": None,
        "language_embeddings": None,
    }
    return config | {"data": data, "training": training | {"checkpoint_directory": "checkpoints"}}


def _portable_places(folders: list) -> list[str]:
    """Of those that only one machine has, as many of the last names as tell all apart, as the names of demos have them,
    or a number where that takes many."""
    places = [Path(str(folder)) for folder in folders]
    names = [[name for name in place.parts if name not in (place.anchor, "..", "~")] for place in places]
    choices = [[named[-count:] for named in names] for count in range(1, MOST_NAMES + 1)]
    for chosen in [*choices, [[str(number)] for number in range(len(places))]]:
        portable = [
            str(Path("data", *named) if _is_of_one_machine(place) else place)
            for place, named in zip(places, chosen, strict=True)
        ]
        if len(set(portable)) == len(set(places)):
            break
    return portable


def _is_of_one_machine(place: Path) -> bool:
    return place.is_absolute() or ".." in place.parts or str(place).startswith("~")


def _check_free(directory: Path) -> None:
    if (directory / FACTS).exists():
        facts = _read_facts(directory)
        if "weights" not in facts:
            raise BadInput(f"--output_dir {directory}: already holds the {FACTS} of something else; choose another")
    elif any((directory / name).exists() for name in (WEIGHTS, CARD)):
        raise BadInput(f"--output_dir {directory}: already holds files of something else; choose another")


def _each_once(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The weights that share no memory, and name -> name for those that are one of them."""
    own: dict[str, Tensor] = {}
    same_as: dict[str, str] = {}
    places: dict[tuple, str] = {}
    for name, value in weights.items():
        place = (value.data_ptr(), value.dtype, value.shape, value.stride())
        if value.numel() and place in places:
            same_as[name] = places[place]
        else:
            places[place] = name
            own[name] = value.clone(memory_format=torch.contiguous_format)
    return own, same_as


# -------------------------------------------------------------------------------------------------------- reading


def read_folder(directory: Path) -> dict:
    """The checkpoint's dictionary, without an optimizer's state. Its values are checked by who reads checkpoints.

    Raises BadInput where a file of the folder is missing, damaged or not of the same export.
    """
    facts = _read_facts(directory)
    about, language = facts.pop("weights", None), facts.pop("language", None)
    if not isinstance(about, dict) or not isinstance(language, dict):
        raise BadInput(f"{directory / FACTS}: is not of export_policy.py, it lacks weights or language")
    stored = _read_weights(directory / WEIGHTS, about.get("file_sha256"))
    embeddings, instructions = stored.pop(EMBEDDINGS, None), language.get("instructions")
    if (
        embeddings is None or not isinstance(instructions, list)
        or embeddings.ndim != 2 or len(embeddings) != len(instructions)
    ):  # fmt: skip
        raise BadInput(f"{directory}: {FACTS} and {WEIGHTS} have not the same instructions")
    same_as = about.get("same_as")
    if not isinstance(same_as, dict) or not {*map(str, same_as.values())} <= stored.keys():
        raise BadInput(f"{directory / FACTS}: weights.same_as names a weight that {WEIGHTS} has not")
    config = facts.get("config")
    not_finite = {"loss": math.nan, "best_loss": math.inf}
    return (
        facts
        | {key: value for key, value in not_finite.items() if facts.get(key, 0) is None}
        | {
            "config": portable(config) if isinstance(config, dict) else config,
            "model_state_dict": stored | {name: stored[str(twin)] for name, twin in same_as.items()},
            "optimizer_state_dict": {},
            "language": {
                "encoder": language.get("encoder"),
                "embeddings": dict(zip(map(str, instructions), embeddings, strict=True)),
            },
        }
    )


def _read_facts(directory: Path) -> dict:
    path = directory / FACTS
    try:
        if (length := path.stat().st_size) > LARGEST_FACTS:
            raise BadInput(f"{path}: has {length:,} bytes, at most {LARGEST_FACTS:,} are read")
        facts = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        best = directory / "checkpoint_best.pt"
        advice = f"; did you mean {best}?" if best.is_file() else f", it has no {FACTS} of export_policy.py"
        raise BadInput(f"{directory}: no such checkpoint{advice}") from None
    except OSError as problem:
        raise BadInput(f"{path}: cannot be read ({problem.strerror})") from None
    except (ValueError, RecursionError) as problem:
        raise BadInput(f"{path}: not readable as JSON ({problem})") from None
    if not isinstance(facts, dict):
        raise BadInput(f"{path}: is not of export_policy.py, expected a JSON object")
    return facts


def _read_weights(path: Path, sha256: object) -> dict[str, Tensor]:
    """The library compares every size and place that the file's header claims with the file before it takes memory."""
    try:
        content = path.read_bytes()
    except OSError as problem:
        raise BadInput(f"{path}: cannot be read ({problem.strerror})") from None
    if content.startswith(LFS_POINTER):
        raise BadInput(f"{path}: is a Git LFS pointer and not the file itself; fetch that with `git lfs pull`")
    try:
        weights = safetensors.torch.load(content)
    except (safetensors.SafetensorError, KeyError) as problem:  # KeyError: a type of number that torch has not
        raise BadInput(f"{path}: not readable as safetensors ({problem}); copy or download it again") from None
    if hashlib.sha256(content).hexdigest() != sha256:
        raise BadInput(
            f"{path}: is damaged, or not the one that {FACTS} beside it was written with; copy or download both again"
        )
    return weights
