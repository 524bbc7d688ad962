"""The settings of a run. conf/*.yaml is read strictly: an unknown or mistyped key stops the program by name.

The values live in conf/config.yaml, each with its comment; this file only says which keys there are and of which type.
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

import yaml

from errors import BadInput
from files import expanded

DEFAULTS = Path(__file__).parent / "conf/config.yaml"
LARGEST = 2**63 - 1  # whole number, that every generator and tensor takes


@dataclass(frozen=True)
class DataConfig:
    data_directory: str
    demos_per_task: int
    max_len_data: int
    train_split: float
    obs_alignment: str
    split_seed: int
    cache: str
    cache_directory: str | None
    language_embeddings: str | None


@dataclass(frozen=True)
class ModelConfig:
    """What decides the shapes of StateVLA's parameters (with the temporal predictor's width, which is phase 1's)."""

    image_size: int
    patch_size: int
    embed_dim: int  # D
    lang_emb_dim: int
    robot_state_dim: int
    encoder_depth: int
    d_state: int  # N
    d_conv: int
    expand: int
    state_dim: int
    action_dim: int  # A, 6 pose deltas + gripper
    action_seq_len: int  # H
    policy_layers: int
    policy_embed_dim: int
    prediction_gap: int  # K, frames from z_t to the state that the temporal predictor predicts


@dataclass(frozen=True)
class Phase1Config:
    num_epochs: int
    learning_rate: float | None
    temporal_predictor_hidden_dim: int
    vicreg_on: str
    variance_weight: float
    covariance_weight: float
    inverse_dynamics_weight: float
    foresight_weight: float
    proprioception_masking: float
    image_shift: int


@dataclass(frozen=True)
class Phase2Config:
    num_epochs: int
    learning_rate: float | None
    freeze_encoder: bool
    store_states: bool
    image_shift: int
    state_scaling: str
    state_noise: float
    flow_start: str


@dataclass(frozen=True)
class TrainingConfig:
    batch_size: int
    learning_rate: float
    weight_decay: float
    gradient_clip: float
    ema_momentum: float
    ema_momentum_schedule: str
    save_interval: int
    log_interval: int
    learning_rate_schedule: str
    warmup_steps: int
    seed: int
    device: str
    mamba_backend: str
    precision: str
    activation_checkpointing: bool
    checkpoint_directory: str
    phase1: Phase1Config
    phase2: Phase2Config


@dataclass(frozen=True)
class WandbConfig:
    mode: str
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


CHOICES = {
    "data.obs_alignment": ("auto", "before", "after"),
    "data.cache": ("disk", "ram", "gpu", "none"),
    "training.ema_momentum_schedule": ("cosine", "constant"),
    "training.learning_rate_schedule": ("constant", "cosine"),
    "training.device": ("auto", "cuda", "mps", "cpu"),
    "training.mamba_backend": ("auto", "cuda", "cpp", "torch"),
    "training.precision": ("auto", "bf16", "fp32"),
    "training.phase1.vicreg_on": ("both", "state"),
    "training.phase2.state_scaling": ("standardise", "none"),
    "training.phase2.flow_start": ("noise", "zero"),
    "wandb.mode": ("disabled", "offline", "online"),
}
NON_NEGATIVE = {  # 0 means "none of it"; every other number must be positive
    "data.split_seed", "training.weight_decay", "training.ema_momentum", "training.warmup_steps", "training.seed",
    "training.phase1.variance_weight", "training.phase1.covariance_weight",
    "training.phase1.inverse_dynamics_weight", "training.phase1.foresight_weight",
    "training.phase1.proprioception_masking",
    "training.phase1.num_epochs", "training.phase1.image_shift",
    "training.phase2.num_epochs", "training.phase2.image_shift", "training.phase2.state_noise",
}  # fmt: skip


PATHS = (  # ~ is one's home in them
    "data.data_directory", "data.cache_directory", "data.language_embeddings", "training.checkpoint_directory",
)  # fmt: skip


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
        _change(tree, _read_yaml(Path(path)), "", str(path))
        config = parse_config(tree, str(path))
    return parse_config(tree, "--set", overrides) if overrides else config


def parse_config(tree: dict, source: str, overrides: typing.Sequence[str] = ()) -> Config:
    """Builds a Config from a nested dictionary that has every key. `source` is the file that errors name."""
    tree = copy.deepcopy(tree)
    config = _build(Config, tree, "", source)
    for override in overrides:
        _override(tree, override)
        source = f"--set {override}"
        config = _build(Config, tree, "", source)
    for key in PATHS:
        section, name = key.split(".")
        if (path := tree[section][name]) == "":  # an unset variable of a shell
            raise BadInput(f"{source}: key {key} is empty, expected a path")
        if path is not None:
            tree[section][name] = expanded(path)
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
    except (OSError, ValueError, yaml.YAMLError) as problem:  # ValueError: a date or a number that is none
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


def _override(tree: dict, override: str) -> None:
    """Applies one --set. A text stays as it was typed, with every # and colon that a path may have."""
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
    accepted = _accepted(typing.get_type_hints(kind)[name])
    if str in accepted:
        quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
        is_null = types.NoneType in accepted and text == "null"
        node[name] = text[1:-1] if quoted else None if is_null else text
        return
    try:
        node[name] = yaml.safe_load(text) if text else text
    except (ValueError, yaml.YAMLError):
        raise BadInput(f"--set {override}: the value is not readable as YAML") from None


def _build(cls, tree, prefix: str, source: str):
    """One section of the file as its dataclass: exactly its keys, each of its type."""
    if not isinstance(tree, dict):
        raise BadInput(f"{source}: {prefix.rstrip('.') or 'the file'} must be a section of keys, found {tree!r}")
    hints = typing.get_type_hints(cls)
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
    accepted = _accepted(expected)
    if type(value) is int and value > LARGEST:
        raise BadInput(f"{source}: key {key} is {value}, expected at most 2^63 - 1")
    if float in accepted and type(value) in (int, str):  # YAML 1.1 takes 1e-4 for text
        try:
            value = float(value)
        except ValueError:
            pass
    if type(value) not in accepted:
        names = " or ".join("null" if kind is types.NoneType else kind.__name__ for kind in accepted)
        raise BadInput(f"{source}: key {key} is {value!r}, expected {names}")
    if key in CHOICES and value not in CHOICES[key]:
        raise BadInput(f"{source}: key {key} is {value!r}, expected one of {', '.join(CHOICES[key])}")
    in_range = type(value) not in (int, float) or value > 0 or (value == 0 and key in NON_NEGATIVE)
    if not in_range or (type(value) is float and not math.isfinite(value)):
        raise BadInput(
            f"{source}: key {key} is {value!r}, expected a {'number >= 0' if key in NON_NEGATIVE else 'number > 0'}"
        )
    return value


def _accepted(expected) -> tuple[type, ...]:
    return expected.__args__ if isinstance(expected, types.UnionType) else (expected,)


def _check_consistency(config: Config, source: str) -> None:
    model = config.model
    if model.image_size % model.patch_size:
        raise BadInput(
            f"{source}: model.image_size {model.image_size} is not a multiple of model.patch_size {model.patch_size}"
        )
    if model.action_dim != 7:
        raise BadInput(f"{source}: model.action_dim is {model.action_dim}, expected 7 (6 pose deltas + gripper)")
    if model.robot_state_dim != 9:
        raise BadInput(f"{source}: model.robot_state_dim is {model.robot_state_dim}, expected 9 (7 joints + 2 fingers)")
    if not config.data.train_split < 1:
        raise BadInput(f"{source}: data.train_split is {config.data.train_split}, expected between 0 and 1")
    shares = {
        "training.ema_momentum": config.training.ema_momentum,
        "training.phase1.proprioception_masking": config.training.phase1.proprioception_masking,
    }
    for key, share in shares.items():
        if not share <= 1:
            raise BadInput(f"{source}: {key} is {share}, expected at most 1")


def _leaves(tree: dict, prefix: str = "") -> list[str]:
    keys = []
    for key, value in tree.items():
        keys += _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [f"{prefix}{key}"]
    return keys


def _suggestion(key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    return f"; did you mean {close[0]}?" if close else f"; known are {', '.join(known)}"
