"""Settings are read strictly: every mistake stops the program and names the key."""

import re
from pathlib import Path

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


@pytest.mark.parametrize("path", sorted(Path("conf").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_config_is_valid_alone_and_with_the_plain_recipe(path):
    assert load_config(path).wandb.mode == "disabled"
    plain = load_config([path, "conf/plain.yaml"])
    assert plain.training.phase1.foresight_weight == plain.training.phase2.state_noise == 0
    assert plain.training.phase2.gripper_noise is None
    assert plain.model.embed_dim == load_config(path).model.embed_dim


def test_the_guides_own_block_is_a_config_file(tmp_path):
    """As it stands in the guide, with the other keys missing."""
    block = tmp_path / "guide.yaml"
    data = {"data_directory": "/path/to/libero_object"} | GUIDE_VALUES["data"]
    training = GUIDE_VALUES["training"] | GUIDE_PHASES
    block.write_text(yaml.safe_dump(GUIDE_VALUES | {"data": data, "training": training}))
    assert load_config(block) == load_config()
    assert load_config(["conf/quickstart.yaml", block]).model.embed_dim == 256  # the later file wins
    assert load_config(["conf/plain.yaml", "conf/config.yaml"]) == load_config()


def test_a_config_file_lists_what_it_changes(tmp_path):
    (tmp_path / "mine.yaml").write_text("training:\n  phase1:\n    num_epochs: 7\n")
    found = load_config(tmp_path / "mine.yaml").to_dict()
    assert found["training"]["phase1"].pop("num_epochs") == 7
    expected = load_config("conf/config.yaml").to_dict()
    del expected["training"]["phase1"]["num_epochs"]
    assert found == expected
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert load_config(tmp_path / "empty.yaml") == load_config()


@pytest.mark.parametrize(
    "text, sentence",
    [
        (
            "training:\n  phase1:\n    num_epoch: 7\n",
            r"unknown key training\.phase1\.num_epoch; did you mean num_epochs",
        ),
        ("training: 3\n", "training must be a section of keys, found 3"),
        ("wandb:\n", "wandb must be a section of keys, found None"),
        ("training:\n  batch_size:\n    of: 3\n", r"key training\.batch_size is .*, expected int"),
        ("- 1\n", "the file must be a section of keys"),
        ("model:\n  d_state: 8\ndata:\n  train_split: 0.5\nmodel:\n  d_conv: 4\n", "the key model stands twice"),
        ("model: {d_state: 8, d_state: 9}\n", "the key d_state stands twice"),
        ("model: [\n", "not readable as YAML"),
        ("training: {seed: 2024-13-45}\n", "not readable as YAML .*month"),
        ("training: {seed: !!timestamp 3}\n", "not readable as YAML"),
        ("training: {seed: !!int ''}\n", "not readable as YAML"),
        ("training: {seed: !!bool perhaps}\n", "not readable as YAML"),
        ("training: " + 500 * "[", "not readable as YAML"),
        ("? 'a\n\n  b'\n: 1\n", r"unknown key a\\nb"),
        ("training: {seed: " + 5000 * "9" + "}\n", "not readable as YAML"),
        ("training: {learning_rate: 1" + 400 * "0" + "}\n", "expected at most"),
    ],
)
def test_a_wrong_config_file_is_one_sentence_with_its_name(tmp_path, text, sentence):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(BadInput, match=rf"mine\.yaml: .*{sentence}"):
        load_config(tmp_path / "mine.yaml")


@pytest.mark.parametrize(
    "typed, value",
    [
        ("demos #1 of 2", "demos #1 of 2"),
        ("a: b", "a: b"),
        ("'quoted'", "quoted"),
        ("50", "50"),
        ("[x", "[x"),
        ("~/demos", "HOME/demos"),
        ("~", "HOME"),
    ],
)
def test_a_text_that_is_set_stays_as_it_was_typed(typed, value, monkeypatch):
    monkeypatch.setenv("HOME", "HOME")
    assert load_config((), [f"data.data_directory={typed}"]).data.data_directory == value


def test_several_folders_are_a_list(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "HOME")
    typed = load_config((), ["data.data_directory=[~/a, 'b: c']"])
    (tmp_path / "mine.yaml").write_text("data:\n  data_directory:\n  - ~/a\n  - 'b: c'\n")
    assert typed == load_config(tmp_path / "mine.yaml") == parse_config(typed.to_dict(), "checkpoint.pt")
    assert typed.data.folders == [Path("HOME/a"), Path("b: c")]
    assert load_config((), ["data.data_directory='[a]'"]).data.folders == [Path("[a]")]


def test_the_width_of_the_robot_state_follows_unless_it_is_set_too(tmp_path):
    end_effector = "data.robot_state=end_effector"
    assert load_config((), [end_effector]).model.robot_state_dim == 8
    assert load_config((), [end_effector, "model.robot_state_dim=8"]) == load_config((), [end_effector])
    for overrides in ([end_effector, "model.robot_state_dim=9"], ["model.robot_state_dim=9", end_effector]):
        with pytest.raises(BadInput, match=r"robot_state_dim is 9, expected 8, since data\.robot_state is end_"):
            load_config((), overrides)
    mine, guides = tmp_path / "mine.yaml", tmp_path / "guides.yaml"
    mine.write_text("data: {robot_state: end_effector}\n")
    guides.write_text("model: {robot_state_dim: 9}\n")
    assert load_config([guides, mine]).model.robot_state_dim == 8
    assert load_config(mine, ["data.robot_state=joints"]) == load_config()
    with pytest.raises(BadInput, match=r"guides\.yaml: model\.robot_state_dim is 9, expected 8"):
        load_config([mine, guides])


def test_null_can_be_set_where_it_means_something():
    assert load_config("conf/config.yaml", ["data.cache_directory=null"]).data.cache_directory is None
    assert load_config("conf/config.yaml", ["training.phase1.learning_rate=null"]).training.phase1.learning_rate is None


def test_a_home_is_found_in_every_path_of_a_config(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.yaml").write_text(
        "data: {data_directory: ~/a, cache_directory: ~/b, language_embeddings: ~/c.npz}\n"
        "training: {checkpoint_directory: ~/d}\n"
    )
    config = load_config(tmp_path / "mine.yaml")
    found = config.data.data_directory, config.data.cache_directory, config.data.language_embeddings
    assert found == tuple(str(tmp_path / name) for name in ("a", "b", "c.npz"))
    assert config.training.checkpoint_directory == str(tmp_path / "d")


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
        ("model.robot_state_dim=8", "expected 9, since data.robot_state is joints (7 joint_states + 2 gripper_states)"),
        ("data.robot_state=cartesian", "data.robot_state is 'cartesian', expected one of joints, end_effector"),
        ("data.data_directory=[]", "data.data_directory is an empty list"),
        ("data.data_directory=[a, 3]", "data.data_directory[1] is 3, expected str"),
        ("data.data_directory=[a, '']", "data.data_directory[1] is empty, expected a path"),
        ("data.data_directory=[a, b: {]", "not readable as YAML"),
        ("model.image_size=100", "not a multiple of model.patch_size"),
        ("data.train_split=1.0", "expected between 0 and 1"),
        ("data.cache_directory=", "key data.cache_directory is empty, expected a path"),
        ("training.learning_rate=nan", "expected a number > 0"),
        ("training.seed=2025-13-01", "not readable as YAML"),
        ("training.seed=" + 500 * "[", "not readable as YAML"),
        ("data.data_directory=a\0b", r"a\x00b: no path has a null character in it"),
        ("model.embed_dim=9223372036854775808", "model.embed_dim is 9223372036854775808, expected at most"),
        ("training.seed=9223372036854775808", "training.seed is 9223372036854775808, expected at most"),
        (
            "training.phase1.vicreg_on=nothing",
            "training.phase1.vicreg_on is 'nothing', expected one of both, state",
        ),
        ("training.phase1.proprioception_masking=1.5", "proprioception_masking is 1.5, expected at most 1"),
    ],
)
def test_wrong_override_is_one_sentence(override, sentence):
    with pytest.raises(BadInput, match=re.escape(sentence)):
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
