"""The settings of a run. conf/*.yaml is read strictly: an unknown or mistyped key stops the program by name.

conf/config.yaml has the values and says what each key does; this file has the keys, their types and their ranges.
Any other YAML file lists what it changes of conf/config.yaml.
"""

import argparse
import copy
import difflib
import math
import types
import typing
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin

import yaml

from errors import BadInput
from files import expanded
from observation import ROBOT_STATES

DEFAULTS = Path(__file__).parent / "conf/config.yaml"
UNREADABLE = (  # PyYAML's own error, and what Python makes of a date, a number or a depth that is none
    yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError,
)  # fmt: skip
LARGEST = 2**63 - 1  # whole number, that every generator and tensor takes


@dataclass(frozen=True)
class Range:
    """Of a number: from `least` to `most`, or, where it is `open`, between them and neither of the two."""

    least: float
    most: float = math.inf
    open: bool = False

    def expected(self, value: float) -> str | None:
        """What should stand there instead of `value`, None where it is in range."""
        if math.isfinite(value) and (self.least < value < self.most if self.open else self.least <= value <= self.most):
            return None
        if self.open and self.most < math.inf:
            return f"between {self.least:g} and {self.most:g}"
        return (
            f"at most {self.most:g}" if value > self.most else f"a number {'>' if self.open else '>='} {self.least:g}"
        )


class PathText:
    """Of a text: it is a path. ~ is one's home in it, and it must not be empty, as an unset variable of a shell is."""


Positive = Range(0, open=True)
NotNegative = Range(0)  # 0 means "none of it"
Number = Annotated[float, Positive]
NumberOrZero = Annotated[float, NotNegative]
Count = Annotated[int, Positive]
CountOrZero = Annotated[int, NotNegative]
Share = Annotated[float, Range(0, 1)]
FilePath = Annotated[str, PathText]


@dataclass(frozen=True)
class DataConfig:
    data_directory: FilePath | list[FilePath]
    robot_state: Literal["joints", "end_effector"]
    demos_per_task: Count
    max_len_data: Count
    train_split: Annotated[float, Range(0, 1, open=True)]
    obs_alignment: Literal["auto", "before", "after"]
    split_seed: CountOrZero
    cache: Literal["disk", "ram", "gpu", "none"]
    cache_directory: FilePath | None
    language_embeddings: FilePath | None
    scenes: FilePath | None

    @property
    def folders(self) -> list[Path]:
        """Those of data_directory, one or several."""
        directories = [self.data_directory] if isinstance(self.data_directory, str) else self.data_directory
        return [Path(directory) for directory in directories]


@dataclass(frozen=True)
class ModelConfig:
    """What decides the shapes of StateVLA's parameters (with the temporal predictor's width, which is phase 1's)."""

    image_size: Count
    patch_size: Count
    embed_dim: Count  # D
    lang_emb_dim: Count
    robot_state_dim: Count  # the width of data.robot_state
    encoder_depth: Count
    d_state: Count  # N
    d_conv: Count
    expand: Count
    state_dim: Count
    action_dim: Count  # A, 7: 6 pose deltas + gripper
    action_seq_len: Count  # H
    policy_layers: Count
    policy_embed_dim: Count
    prediction_gap: Count  # K, frames from z_t to the state that the temporal predictor predicts
    gaze: bool


@dataclass(frozen=True)
class Phase1Config:
    num_epochs: CountOrZero
    learning_rate: Number | None
    temporal_predictor_hidden_dim: Count
    vicreg_on: Literal["both", "state"]
    variance_weight: NumberOrZero
    covariance_weight: NumberOrZero
    inverse_dynamics_weight: NumberOrZero
    foresight_weight: NumberOrZero
    gaze_weight: NumberOrZero
    gaze_scenes_weight: NumberOrZero
    place_weight: NumberOrZero
    place_scenes_weight: NumberOrZero
    place_of: Literal["target", "target_and_goal", "target_goal_and_hand"]
    proprioception_masking: Share
    image_shift: CountOrZero


@dataclass(frozen=True)
class Phase2Config:
    num_epochs: CountOrZero
    learning_rate: Number | None
    freeze_encoder: bool
    store_states: bool
    image_shift: CountOrZero
    state_scaling: Literal["standardise", "none"]
    state_noise: NumberOrZero
    gripper_noise: NumberOrZero | None
    flow_start: Literal["noise", "zero"]
    rollout_interval: CountOrZero
    rollouts_per_task: Count
    rollout_suite: str


@dataclass(frozen=True)
class TrainingConfig:
    batch_size: Count
    learning_rate: Number
    weight_decay: NumberOrZero
    gradient_clip: Number
    accumulate: Count
    max_bad_steps: Count
    ema_momentum: Share
    ema_momentum_schedule: Literal["cosine", "constant"]
    save_interval: Count
    save_minutes: NumberOrZero
    rank_timeout_minutes: Number
    log_interval: Count
    learning_rate_schedule: Literal["constant", "cosine"]
    warmup_steps: CountOrZero
    seed: CountOrZero
    device: Literal["auto", "cuda", "mps", "cpu"]
    mamba_backend: Literal["auto", "cuda", "cpp", "torch"]
    precision: Literal["auto", "bf16", "fp32"]
    activation_checkpointing: bool
    checkpoint_directory: FilePath
    phase1: Phase1Config
    phase2: Phase2Config


@dataclass(frozen=True)
class WandbConfig:
    mode: Literal["disabled", "offline", "online"]
    project: str


@dataclass(frozen=True)
class Config:
    data: DataConfig
    model: ModelConfig
    training: TrainingConfig
    wandb: WandbConfig

    def to_dict(self) -> dict:
        """The nested dictionary that a checkpoint keeps; `parse_config` reads it back."""
        return asdict(self)


def add_config_flags(parser: argparse.ArgumentParser) -> None:
    """--config and --set, the same in every script that reads settings."""
    parser.add_argument(
        "--config", action="append", default=[], type=expanded, metavar="FILE",
        help="YAML file of changes to conf/config.yaml; may be repeated, the later one wins (default: none)",
    )  # fmt: skip
    add_set_flag(parser)


def add_set_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE",
        help="override one setting, e.g. training.phase1.num_epochs=5; may be repeated",
    )  # fmt: skip


def load_config(paths: str | Path | typing.Sequence[str | Path] = (), overrides: typing.Sequence[str] = ()) -> Config:
    """conf/config.yaml, changed by one YAML file after the other and then by `--set a.b.c=value` overrides.

    Raises BadInput naming the file and the key at fault."""
    tree = _read_yaml(DEFAULTS)
    config = parse_config(tree, str(DEFAULTS))
    for path in [paths] if isinstance(paths, str | Path) else paths:
        changes = _read_yaml(Path(path))
        _change(tree, changes, "", str(path))
        _follow_robot_state(tree, _leaves(changes))
        config = parse_config(tree, str(path))
    return parse_config(tree, "--set", overrides) if overrides else config


def parse_config(tree: dict, source: str, overrides: typing.Sequence[str] = ()) -> Config:
    """Builds a Config from a nested dictionary that has every key. `source` is the file that errors name."""
    tree = copy.deepcopy(tree)
    config = _build(Config, tree, "", source)
    keys = [override.partition("=")[0] for override in overrides]
    for override in overrides:
        _override(tree, override)
        _follow_robot_state(tree, keys)
        source = f"--set {override}"
        config = _build(Config, tree, "", source)
    _check_consistency(config, source)
    return config


class _StrictLoader(yaml.SafeLoader):
    """YAML in which no key stands twice in a section; PyYAML takes the last one and forgets the others."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice[0]} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict:
    if not path.is_file():
        raise BadInput(f"{path}: no such config file; conf/config.yaml is the one to start from")
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _StrictLoader)
    except (OSError, *UNREADABLE) as problem:
        raise BadInput(f"{path}: not readable as YAML ({' '.join(str(problem).split())})") from None
    return {} if tree is None else tree


def _change(tree: dict, changes: dict, prefix: str, source: str) -> None:
    """Puts the values of `changes` into `tree`, section by section."""
    if not isinstance(changes, dict):
        raise BadInput(f"{source}: {prefix.rstrip('.') or 'the file'} must be a section of keys, found {changes!r}")
    for key, value in changes.items():
        if key not in tree:
            raise BadInput(f"{source}: unknown key {prefix}{key}{_suggestion(str(key), list(tree))}")
        if isinstance(tree[key], dict):
            _change(tree[key], value, f"{prefix}{key}.", source)
        else:
            tree[key] = value


def _follow_robot_state(tree: dict, keys: typing.Sequence[str]) -> None:
    """model.robot_state_dim becomes the width of data.robot_state where, of the two, only this is among the `keys` that
    a file or the command line sets."""
    name = tree["data"]["robot_state"]
    if "data.robot_state" in keys and "model.robot_state_dim" not in keys and name in list(ROBOT_STATES):
        tree["model"]["robot_state_dim"] = sum(ROBOT_STATES[name].values())


def _override(tree: dict, override: str) -> None:
    """Applies one --set. A text stays as it was typed, with every # and colon that a path may have; [a, b] is a list
    where one may stand."""
    key, separator, text = override.partition("=")
    if not separator:
        raise BadInput(f"--set {override}: expected section.key=value, for example training.phase1.num_epochs=5")
    *sections, name = key.split(".")
    node: typing.Any = tree
    kind: typing.Any = Config
    for section in sections:
        node = node.get(section) if isinstance(node, dict) else None
        kind = typing.get_type_hints(kind).get(section) if is_dataclass(kind) else None
    if not isinstance(node, dict) or name not in node or isinstance(node[name], dict):
        raise BadInput(f"--set {override}: no such key{_suggestion(key, _leaves(tree))}")
    accepted, _ = _unpacked(typing.get_type_hints(kind, include_extras=True)[name])
    if str in accepted and not (list in accepted and text[:1] == "[" and text[-1:] == "]"):
        quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
        is_null = types.NoneType in accepted and text == "null"
        node[name] = text[1:-1] if quoted else None if is_null else text
        return
    try:
        node[name] = yaml.safe_load(text) if text else text
    except UNREADABLE:
        raise BadInput(f"--set {override}: the value is not readable as YAML") from None


def _build(cls, tree, prefix: str, source: str):
    """One section of the file as its dataclass: exactly its keys, each of its type."""
    if not isinstance(tree, dict):
        raise BadInput(f"{source}: {prefix.rstrip('.') or 'the file'} must be a section of keys, found {tree!r}")
    hints = typing.get_type_hints(cls, include_extras=True)
    names = [field.name for field in fields(cls)]
    for key in tree:
        if key not in names:
            raise BadInput(f"{source}: unknown key {prefix}{key}{_suggestion(str(key), names)}")
    for name in names:
        if name not in tree:
            raise BadInput(f"{source}: key {prefix}{name} is missing")
    return cls(**{name: _value(tree[name], hints[name], prefix + name, source) for name in names})


def _value(value, expected, key: str, source: str):
    if is_dataclass(expected):
        return _build(expected, value, key + ".", source)
    accepted, notes = _unpacked(expected)
    if type(value) is int and value > LARGEST:
        raise BadInput(f"{source}: key {key} is {value}, expected at most 2^63 - 1")
    if float in accepted and type(value) in (int, str):  # YAML 1.1 takes 1e-4 for text
        try:
            value = float(value)
        except ValueError:
            pass
    if type(value) is list and list in accepted:
        if not value:
            raise BadInput(f"{source}: key {key} is an empty list")
        (part,) = get_args(next(kind for kind in get_args(expected) if get_origin(kind) is list))
        return [_value(one, part, f"{key}[{index}]", source) for index, one in enumerate(value)]
    if type(value) not in accepted:
        names = " or ".join("null" if kind is types.NoneType else kind.__name__ for kind in accepted)
        raise BadInput(f"{source}: key {key} is {value!r}, expected {names}")
    for note in notes if value is not None else ():
        if note is PathText:
            if not value:
                raise BadInput(f"{source}: key {key} is empty, expected a path")
            value = expanded(value)
        elif isinstance(note, Range):
            if expected_instead := note.expected(value):
                raise BadInput(f"{source}: key {key} is {value!r}, expected {expected_instead}")
        elif value not in note:
            raise BadInput(f"{source}: key {key} is {value!r}, expected one of {', '.join(note)}")
    return value


def _unpacked(expected) -> tuple[tuple[type, ...], tuple]:
    """A field's annotation as plain types, and what it says beside them: a Range, PathText, or a tuple of choices."""
    if get_origin(expected) is Literal:
        return (str,), (get_args(expected),)
    if get_origin(expected) is Annotated:
        kind, *notes = get_args(expected)
        return (kind,), tuple(notes)
    if get_origin(expected) is list:  # its parts are looked at one by one
        return (list,), ()
    if get_origin(expected) in (types.UnionType, typing.Union):
        parts = [_unpacked(part) for part in get_args(expected)]
        return tuple(kind for kinds, _ in parts for kind in kinds), tuple(note for _, notes in parts for note in notes)
    return (expected,), ()


def _check_consistency(config: Config, source: str) -> None:
    model = config.model
    if model.image_size % model.patch_size:
        raise BadInput(
            f"{source}: model.image_size {model.image_size} is not a multiple of model.patch_size {model.patch_size}"
        )
    if model.action_dim != 7:
        raise BadInput(f"{source}: model.action_dim is {model.action_dim}, expected 7 (6 pose deltas + gripper)")
    recipe = config.training.phase1
    taught_on_scenes = (model.gaze and recipe.gaze_scenes_weight) or (
        recipe.place_weight and recipe.place_scenes_weight
    )
    if config.data.scenes is not None and not taught_on_scenes:
        raise BadInput(
            f"{source}: data.scenes is {config.data.scenes}, but nothing is taught on them; set model.gaze to true, or "
            "training.phase1.place_weight and place_scenes_weight above 0"
        )
    robot_state = config.data.robot_state
    parts = ROBOT_STATES[robot_state]
    if model.robot_state_dim != sum(parts.values()):
        told = " + ".join(f"{width} {name}" for name, width in parts.items())
        raise BadInput(
            f"{source}: model.robot_state_dim is {model.robot_state_dim}, expected {sum(parts.values())}, since "
            f"data.robot_state is {robot_state} ({told}); it follows where data.robot_state alone is set"
        )


def _leaves(tree: dict, prefix: str = "") -> list[str]:
    keys = []
    for key, value in tree.items():
        keys += _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [f"{prefix}{key}"]
    return keys


def _suggestion(key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    return f"; did you mean {close[0]}?" if close else f"; known are {', '.join(known)}"
