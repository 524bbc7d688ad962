"""Checkpoint files: read strictly and brought up to date, written whole. This file knows files and not the model;
`load_checkpoint` beside the model builds one from what is read here.

A checkpoint is a dictionary of tensors and plain values (`weights_only=True`): the training guide's six keys, and what
makes an evaluation independent of any other file. It comes as a file of train.py's, as a folder of export_policy.py, or
from the hub, as hf://owner/name[@revision].
"""

import copy
import math
import pickle
import re
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from config import Config, parse_config
from errors import BadInput, is_out_of_memory
from files import written_whole
from observation import MIXED
from published.folder import read_folder
from published.hub import downloaded, is_address
from untrusted import check_archive

SCHEMA = 1  # goes up when an older program could not use what is written; files without a number are of schema 0
# What zipfile and torch raise for a file that is no archive of torch.save, or a damaged one.
UNREADABLE = (
    zipfile.BadZipFile, zlib.error, RuntimeError, EOFError, LookupError, ValueError, pickle.UnpicklingError,
)  # fmt: skip
GUIDES_KEYS = ("epoch", "model_state_dict", "optimizer_state_dict", "loss", "config", "phase")
MOST_VALUES = 10_000  # in the config or the description of the observations
FURTHER_KEYS = ("best_loss", "observation", "language", "held_out_demos")

# How the config of an older checkpoint becomes one of today. What came later has the value that does what was done
# before; what was moved has its places; what was removed is no obstacle where it holds what is done today.
CAME_LATER = {
    "data.robot_state": "joints",
    "data.cache": "none",
    "data.cache_directory": None,
    "data.language_embeddings": None,
    "data.scenes": None,
    "model.gaze": False,
    "training.precision": "fp32",
    "training.activation_checkpointing": False,
    "training.accumulate": 1,
    "training.max_bad_steps": 10,
    "training.save_minutes": 0.0,
    "training.rank_timeout_minutes": 30.0,
    "training.phase1.vicreg_on": "both",
    "training.phase1.foresight_weight": 0.0,
    "training.phase1.gaze_weight": 0.0,
    "training.phase1.gaze_scenes_weight": 0.0,
    "training.phase1.place_weight": 0.0,
    "training.phase1.place_scenes_weight": 0.0,
    "training.phase1.place_of": "target",
    "training.phase1.proprioception_masking": 0.0,
    "training.phase1.image_shift": 0,
    "training.phase2.freeze_encoder": True,
    "training.phase2.store_states": False,
    "training.phase2.image_shift": 0,
    "training.phase2.state_scaling": "standardise",
    "training.phase2.state_noise": 0.0,
    "training.phase2.gripper_noise": None,
    "training.phase2.flow_start": "noise",
    "training.phase2.rollout_interval": 0,
    "training.phase2.rollouts_per_task": 2,
    "training.phase2.rollout_suite": "libero_object",
}
MOVED = {"training.image_shift": ("training.phase1.image_shift", "training.phase2.image_shift")}
ANYTHING = object()
REMOVED = {
    "training.num_workers": ANYTHING,  # of a loader that is gone; it never changed a number
    "model.state_norm": "none",
    "training.phase1.predictor_dropout": 0.0,
    "training.phase1.rollout_length": 1,
    "training.phase2.scenes_share": 0.0,
    "training.phase2.weight_average": ANYTHING,  # its weights are what they are; train.py resumes none
}


def read_checkpoint(source: str | Path, phase: int | None = None) -> dict:
    """A checkpoint's dictionary, its config and the names of its weights as this version has them.

    source: a file, a folder or hf://owner/name[@revision]. Raises BadInput where it is missing, damaged, of a newer
    version, lacks a key, or belongs to the other phase than `phase`.
    """
    path = downloaded(str(source)) if is_address(source) else Path(source)
    checkpoint = read_folder(path) if path.is_dir() else _read_file(path)
    missing = [key for key in GUIDES_KEYS + FURTHER_KEYS if not isinstance(checkpoint, dict) or key not in checkpoint]
    if missing:
        raise BadInput(f"{path}: not a checkpoint of train.py, it lacks {', '.join(missing)}")
    schema = checkpoint.get("schema", 0)
    if type(schema) is int and schema > SCHEMA:
        raise BadInput(
            f"{path}: was written by a newer version (schema {schema}, this one knows up to {SCHEMA}), of commit "
            f"{str(checkpoint.get('code', 'unknown'))[:60]}"
        )
    _check_kinds(checkpoint, path)
    if phase is not None and checkpoint["phase"] != phase:
        raise BadInput(f"{path}: key phase is {checkpoint['phase']}, expected a checkpoint of phase {phase}")
    return checkpoint | {
        "config": _config_of_today(checkpoint["config"], path),
        "model_state_dict": _weights_of_today(checkpoint["model_state_dict"]),
    }


def instructions_of(checkpoint: dict) -> list[str]:
    """Those that it was trained on, sorted: its language table may know more. The first versions did not say."""
    return sorted(checkpoint.get("instructions") or checkpoint["language"]["embeddings"])


def _read_file(path: Path):
    """What is in a file of torch.save, whatever it is."""
    if not path.is_file():
        raise BadInput(f"{path}: no such checkpoint; `python train.py --phase 1` and `--phase 2` write them")
    try:
        if not zipfile.is_zipfile(path):  # torch.save writes zip archives, whose table of contents stands at the end
            raise BadInput(f"{path}: not readable as a checkpoint of train.py{_what_it_is(path)}")
        return _load(path)
    except OSError as problem:
        raise BadInput(f"{path}: cannot be read ({problem.strerror or problem})") from None
    except UNREADABLE as problem:
        if is_out_of_memory(problem):
            raise
        reason = (str(problem) or type(problem).__name__).splitlines()[0]
        raise BadInput(f"{path}: not readable as a checkpoint of train.py ({reason})") from None


def _check_kinds(checkpoint: dict, path: Path) -> None:
    """Raises BadInput where a key of a checkpoint holds another kind of thing than train.py writes there."""

    def check(key: str, is_right: bool, expected: str) -> None:
        if not is_right:
            raise BadInput(f"{path}: not a checkpoint of train.py, key {key} is not {expected}")

    for key in ("epoch", "phase"):
        check(key, type(checkpoint[key]) is int and checkpoint[key] >= 0, "a whole number")
    for key in ("loss", "best_loss"):
        check(key, type(checkpoint[key]) in (int, float), "a number")
    check("phase", checkpoint["phase"] in (1, 2), "1 or 2")
    check("schema", type(checkpoint.get("schema", 0)) is int, "a whole number")
    check("code", type(checkpoint.get("code", "")) is str, "a text")
    for key in ("config", "observation"):
        check(key, isinstance(checkpoint[key], dict) and _is_plain(checkpoint[key], MOST_VALUES), "a section of values")
    held_out, language, weights = (checkpoint[key] for key in ("held_out_demos", "language", "model_state_dict"))
    are_names = isinstance(held_out, list) and all(type(name) is str for name in held_out)
    check("held_out_demos", are_names, "a list of names")
    check("model_state_dict", _are_tensors(weights), "names with a tensor each")
    check("optimizer_state_dict", isinstance(checkpoint["optimizer_state_dict"], dict), "an optimizer's state")
    is_table = isinstance(language, dict) and language.keys() == {"encoder", "embeddings"}
    check("language", is_table and type(language["encoder"]) is str, "an encoder and its embeddings")
    embeddings = language["embeddings"]
    check("language", _are_tensors(embeddings) and len(embeddings) > 0, "instructions with a vector each")
    told = checkpoint.get("instructions", [])
    are_told = isinstance(told, list) and all(type(text) is str and text in embeddings for text in told)
    check("instructions", are_told, "a list of instructions that language has")
    are_vectors = all(one.ndim == 1 and one.is_floating_point() for one in embeddings.values())
    check("language", are_vectors, "vectors of numbers")


def _are_tensors(named: object) -> bool:
    return isinstance(named, dict) and all(
        type(name) is str and isinstance(value, Tensor) for name, value in named.items()
    )


def _is_plain(tree: object, most: int) -> bool:
    """Whether dictionaries and lists hold at most so many plain values. A pickle can have one list within itself, or in
    a thousand places."""
    waiting = [tree]
    while waiting and most:
        value, most = waiting.pop(), most - 1
        if isinstance(value, dict):
            if not all(type(key) is str for key in value):
                return False
            waiting += value.values()
        elif isinstance(value, (list, tuple)):
            waiting += value
        elif value is not None and type(value) not in (str, int, float, bool):
            return False
    return not waiting


def config_of(checkpoint: dict, source: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The checkpoint's settings for use on this machine, which need not be the trainer's."""
    here = ["training.device=auto", "training.mamba_backend=auto"]
    return parse_config(checkpoint["config"], str(source), [*here, *overrides])


def save_checkpoint(checkpoint: dict, path: Path) -> None:
    """Writes the file whole or not at all: an interrupted save leaves the previous one as it was. Raises BadInput where
    it cannot be written."""
    try:
        with written_whole(path) as stream:
            torch.save(checkpoint | {"schema": SCHEMA}, stream)
    except (OSError, RuntimeError) as problem:
        # torch's zip writer raises errors of its own after, and in place of, the system's.
        refused = problem if isinstance(problem, OSError) else problem.__context__
        if not isinstance(refused, OSError) and "PytorchStreamWriter" not in str(problem):
            raise
        reason = getattr(refused, "strerror", None) or problem
        raise BadInput(f"{path}: cannot be written ({reason}); what was there before is untouched") from None


def check_same_run(
    checkpoint: dict, path: str, config: dict, observation: dict, held_out: set[str], resumes: bool
) -> list[str]:
    """Raises BadInput where the weights of a checkpoint don't fit this run's model, pictures or split. Returns notes on
    what differs and may.

    Phase 2 takes the encoder alone from phase 1, so there the policy's settings may differ."""
    earlier, notes = checkpoint["config"], []
    if resumes and checkpoint["phase"] == 2:
        before, now = (settings["training"]["phase2"]["freeze_encoder"] for settings in (earlier, config))
        if before != now:
            raise BadInput(f"{path}: training.phase2.freeze_encoder is {before}, a resumed run cannot have {now}")
    of_policy = () if resumes else ("action_seq_len", "policy_layers", "policy_embed_dim")
    for section, before, now in (
        ("model", earlier["model"], config["model"]),
        ("observation", checkpoint["observation"], observation),
    ):
        for key, value in now.items():
            by_demo = key == "obs_alignment" and MIXED in (before.get(key), value)  # no picture depends on it
            if before.get(key) != value and key not in of_policy and not by_demo:
                raise BadInput(f"{path}: {section}.{key} is {before.get(key)}, but this run has {value}")
    unseen = set(checkpoint["held_out_demos"])
    if resumes:
        other_phase = f"phase{3 - checkpoint['phase']}"
        notes += _differences(earlier["training"], config["training"], "training.", {other_phase, *MAY_DIFFER})
        of_phase1 = {"scenes"} if checkpoint["phase"] == 2 else set()
        notes += _differences(earlier["data"], config["data"], "data.", DATA_MAY_DIFFER | of_phase1)
        if unseen != held_out:
            raise BadInput(
                f"{path}: it held out {len(unseen)} demos, of which this run finds {len(unseen & held_out)}; a resumed "
                "run needs the same data (data.data_directory, data.demos_per_task)"
            )
    else:
        files = {name.rpartition("/")[0] for name in unseen}
        seen = {name for name in held_out - unseen if name.rpartition("/")[0] in files}
        if seen:
            notes.append(f"{len(seen)} demos held out here have trained the encoder in {path}")
    return notes


MAY_DIFFER = {
    "save_interval", "save_minutes", "log_interval", "rank_timeout_minutes", "max_bad_steps", "device",
    "checkpoint_directory",
}  # fmt: skip
DATA_MAY_DIFFER = {"cache", "cache_directory", "language_embeddings"}  # what these hold is compared itself


def _differences(before: dict, now: dict, prefix: str, left_out: set[str]) -> list[str]:
    lines = []
    for key in now.keys() - left_out:
        if isinstance(now[key], dict):
            lines += _differences(before.get(key, {}), now[key], f"{prefix}{key}.", set())
        elif before.get(key) != now[key]:
            lines.append(f"{prefix}{key} was {before.get(key)} and is now {now[key]}")
    return sorted(lines)


class Score(NamedTuple):
    """What a checkpoint is worth: the share of episodes that it solved, then its validation loss."""

    success: float  # below 0 where none were played
    loss: float

    def __str__(self) -> str:
        solved = f"{self.success:.0%} of the rollouts solved, " if self.success >= 0 else ""
        return f"{solved}validation loss {self.loss:.4f}"

    def beats(self, other: "Score") -> bool:
        return (self.success, -self.loss) > (other.success, -other.loss)


NO_SCORE = Score(-1.0, math.inf)
NOT_VALIDATED = Score(-1.0, math.nan)  # of a checkpoint from within an epoch: nobody's equal


def best_score(checkpoint: dict) -> Score:
    """That of the best checkpoint of the run so far."""
    return Score(checkpoint.get("best_success", NO_SCORE.success), checkpoint["best_loss"])


def best_of_run(resumed: dict, path: Path) -> Path | None:
    """The file of the resumed run that has its best score so far: the best checkpoint beside the resumed one, the
    resumed one itself or one of the epochs. None where it is gone."""
    beside = [path.with_name("checkpoint_best.pt"), path, *sorted(path.parent.glob("checkpoint_epoch_*.pt"))]
    return next((candidate for candidate in beside if epoch_and_score(candidate)[1] == best_score(resumed)), None)


def epoch_and_score(path: Path) -> tuple[int, Score]:
    """Of a checkpoint: its epoch and its score, NO_SCORE where there is none to be read."""
    try:
        checkpoint = _load(path, mmap=True)
        return checkpoint["epoch"], Score(checkpoint.get("success", NO_SCORE.success), checkpoint["loss"])
    except (OSError, TypeError, *UNREADABLE):
        return 0, NO_SCORE


def _load(path: Path, **options):
    """What torch.save wrote, all of it as it was written: torch.load itself does not look at the check sums, and takes
    a block that a disk lost for weights that are 0."""
    check_archive(path)
    with zipfile.ZipFile(path) as archive:
        if (damaged := archive.testzip()) is not None:
            raise zipfile.BadZipFile(f"its part {damaged} is damaged; copy or download it again")
    return torch.load(path, map_location="cpu", weights_only=True, **options)


def _what_it_is(path: Path) -> str:
    with path.open("rb") as stream:
        start = stream.read(64)
    if start.startswith(b"version https://git-lfs"):
        return ": it is a Git LFS pointer, `git lfs pull` fetches the file itself"
    if not start:
        return ": it is empty"
    return ", is it truncated?" if start.startswith(b"PK") else ": it is no file of torch.save"


# --------------------------------------------------------------------------------------------- from older versions


def _config_of_today(config: dict, path: Path) -> dict:
    config = copy.deepcopy(config)
    for key, places in MOVED.items():
        if (value := _take(config, key)) is not None:
            for place in places:
                _put(config, place, value)
    for key, stayed in REMOVED.items():
        value = _take(config, key)
        if value is not None and stayed is not ANYTHING and value != stayed:
            raise BadInput(
                f"{path}: was trained with {key} {value}, which this version no longer has; it does what {stayed} did"
            )
    for key, value in CAME_LATER.items():
        if not _has(config, key):
            _put(config, key, value)
    return config


def _section(config: dict, key: str) -> tuple[dict, str]:
    *sections, name = key.split(".")
    for section in sections:
        found = config.get(section, {})
        config = found if isinstance(found, dict) else {}
    return config, name


def _has(config: dict, key: str) -> bool:
    section, name = _section(config, key)
    return name in section


def _take(config: dict, key: str):
    section, name = _section(config, key)
    return section.pop(name, None)


def _put(config: dict, key: str, value) -> None:
    section, name = _section(config, key)
    section[name] = value


def _weights_of_today(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of the first version: one linear layer to z without a place in a sequence, a predictor without a place for
    dropout, and z standardised by a mean and a std instead of by a matrix."""
    if "model.state_normalizer.mean" not in weights:
        return weights
    renamed = {}
    for name, value in weights.items():
        name = re.sub(r"encoder\.to_state\.(weight|bias)$", r"encoder.to_state.0.\1", name)
        name = re.sub(r"predictor\.mlp\.(\d)\.", lambda match: f"predictor.mlp.{int(match.group(1)) + 1}.", name)
        renamed[name] = value
    renamed["model.state_scaling.mean"] = renamed.pop("model.state_normalizer.mean")
    renamed["model.state_scaling.transform"] = torch.diag(1 / renamed.pop("model.state_normalizer.std"))
    return renamed
