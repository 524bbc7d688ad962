"""Settings are read strictly: every mistake stops the program and names the key."""

import pytest
import yaml

from config import load_config, parse_config
from errors import BadInput

GUIDE_VALUES = {  # the configuration block of the training guide
    "data": {"demos_per_task": 50, "max_len_data": 260, "train_split": 0.9},
    "model": {
        "image_size": 224, "patch_size": 16, "embed_dim": 256, "lang_emb_dim": 512, "robot_state_dim": 9,
        "encoder_depth": 12, "d_state": 16, "d_conv": 4, "expand": 2, "state_dim": 256, "action_dim": 7,
        "action_seq_len": 10, "policy_layers": 3, "policy_embed_dim": 256,
    },
    "training": {
        "batch_size": 64, "learning_rate": 1e-4, "weight_decay": 0.05, "gradient_clip": 1.0, "ema_momentum": 0.996,
        "ema_momentum_schedule": "cosine", "save_interval": 100, "log_interval": 10,
    },
}  # fmt: skip
GUIDE_PHASES = {
    "phase1": {"num_epochs": 1000, "learning_rate": 1e-4, "temporal_predictor_hidden_dim": 512},
    "phase2": {"num_epochs": 1000, "learning_rate": 5e-5},
}


def as_tree(path="conf/config.yaml") -> dict:
    with open(path) as stream:
        return yaml.safe_load(stream)


def test_config_yaml_has_the_guides_keys_and_values():
    config = load_config("conf/config.yaml").to_dict()
    for section, values in GUIDE_VALUES.items():
        assert values.items() <= config[section].items()
    for phase, values in GUIDE_PHASES.items():
        assert values.items() <= config["training"][phase].items()
    assert config["training"]["phase1"]["variance_weight"] == 1.0
    assert config["training"]["phase1"]["covariance_weight"] == 0.04


def test_every_shipped_config_is_valid():
    load_config("conf/quickstart.yaml")


def test_misspelt_config_key_is_named():
    tree = as_tree()
    tree["model"]["encoder_dept"] = tree["model"].pop("encoder_depth")
    with pytest.raises(BadInput, match=r"unknown key model\.encoder_dept; did you mean encoder_depth"):
        parse_config(tree, "mine.yaml")


@pytest.mark.parametrize("section, key", [("training", "gradient_clip"), ("data", "train_split"), ("model", "d_state")])
def test_missing_config_key_is_named(section, key):
    tree = as_tree()
    del tree[section][key]
    with pytest.raises(BadInput, match=rf"mine\.yaml: key {section}\.{key} is missing"):
        parse_config(tree, "mine.yaml")


@pytest.mark.parametrize(
    "override, sentence",
    [
        ("training.batch_size=sixty", "training.batch_size is 'sixty', expected int"),
        ("training.batch_size=0", "training.batch_size is 0, expected a number > 0"),
        ("training.phase1.num_epoch=5", "no such key; did you mean training.phase1.num_epochs"),
        ("training.phase1=5", "no such key"),
        ("training.batch_size", "expected section.key=value"),
        ("training.device=gpu", "expected one of auto, cuda, mps, cpu"),
        ("model.action_dim=8", "expected 7"),
        ("model.robot_state_dim=8", "expected 9"),
        ("model.image_size=100", "not a multiple of model.patch_size"),
        ("data.train_split=1.0", "expected between 0 and 1"),
        ("training.learning_rate=nan", "expected a number > 0"),
        (
            "training.phase1.vicreg_on=nothing",
            "training.phase1.vicreg_on is 'nothing', expected one of both, state, pred",
        ),
        ("training.phase1.proprioception_masking=1.5", "proprioception_masking is 1.5, expected at most 1"),
        ("training.phase1.rollout_length=0", "training.phase1.rollout_length is 0, expected a number > 0"),
    ],
)
def test_wrong_override_is_one_sentence(override, sentence):
    with pytest.raises(BadInput, match=sentence.replace(".", r"\.")):
        load_config("conf/config.yaml", [override])


def test_overrides_change_exactly_their_key():
    before = load_config("conf/config.yaml").to_dict()
    after = load_config("conf/config.yaml", ["training.phase1.num_epochs=5", "training.learning_rate=1e-3"]).to_dict()
    assert after["training"]["phase1"].pop("num_epochs") == 5
    assert after["training"].pop("learning_rate") == 1e-3
    before["training"]["phase1"].pop("num_epochs"), before["training"].pop("learning_rate")
    assert after == before


def test_a_checkpoints_config_reads_back_as_the_same_config():
    config = load_config("conf/quickstart.yaml")
    assert parse_config(config.to_dict(), "checkpoint.pt") == config
