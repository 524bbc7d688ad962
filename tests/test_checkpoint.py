"""Checkpoint files: those of earlier versions load and give the same actions, those of later ones are refused.

tests/checkpoints/<commit>.pt holds a tiny phase-2 checkpoint as that commit wrote it (but for the optimizer), an
observation, and z and actions as that commit's own code computed them from it.
"""

import itertools
import resource
import signal
from pathlib import Path

import pytest
import torch

from config import load_config, parse_config
from errors import BadInput
from statevla_model import load_checkpoint
from training import checkpoint as checkpoints
from training.checkpoint import (
    NO_SCORE,
    SCHEMA,
    Score,
    best_of_run,
    check_same_run,
    epoch_and_score,
    read_checkpoint,
    save_checkpoint,
)

EARLIER = sorted(Path(__file__).with_name("checkpoints").glob("*.pt"))


def unpacked(fixture: Path, directory: Path) -> tuple[Path, dict]:
    """The checkpoint as a file of its own, and everything in the fixture."""
    found = torch.load(fixture, weights_only=True)
    path = directory / "checkpoint_latest.pt"
    torch.save(found["checkpoint"], path)
    return path, found


@pytest.mark.parametrize("fixture", EARLIER, ids=lambda path: path.stem)
def test_a_checkpoint_of_every_earlier_version_gives_the_actions_that_it_gave_then(fixture, tmp_path):
    path, found = unpacked(fixture, tmp_path)
    model = load_checkpoint(path)
    torch.testing.assert_close(model.encode(found["obs"]), found["z"], rtol=0, atol=1e-6)
    torch.testing.assert_close(model.predict(found["obs"], 4, "zero"), found["actions"], rtol=0, atol=1e-6)


def test_every_version_of_the_config_is_among_them():
    """A key that is new in the config wants a checkpoint from before it in the folder, and its value of then."""
    assert len(EARLIER) >= 5
    known = set(leaves(load_config().to_dict()))
    for path in EARLIER:
        of_then = set(leaves(torch.load(path, weights_only=True)["checkpoint"]["config"]))
        assert known - of_then <= checkpoints.CAME_LATER.keys(), path.stem
        assert of_then - known <= checkpoints.REMOVED.keys() | checkpoints.MOVED.keys(), path.stem


def leaves(tree: dict, prefix: str = ""):
    for key, value in tree.items():
        yield from leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [f"{prefix}{key}"]


def test_a_moved_key_is_read_in_its_new_places(tmp_path):
    of_then = Path(__file__).with_name("checkpoints") / "aade154.pt"  # image_shift of both phases was one key
    path, found = unpacked(of_then, tmp_path)
    found["checkpoint"]["config"]["training"]["image_shift"] = 3
    torch.save(found["checkpoint"], path)
    training = parse_config(read_checkpoint(path)["config"], str(path)).training
    assert (training.phase1.image_shift, training.phase2.image_shift) == (3, 3)


def test_a_removed_key_is_no_obstacle_where_it_holds_what_stayed(tmp_path, monkeypatch):
    path, found = unpacked(EARLIER[-1], tmp_path)
    monkeypatch.setitem(checkpoints.REMOVED, "training.phase1.lookahead", 1)
    found["checkpoint"]["config"]["training"]["phase1"]["lookahead"] = 1
    torch.save(found["checkpoint"], path)
    assert "lookahead" not in read_checkpoint(path)["config"]["training"]["phase1"]
    found["checkpoint"]["config"]["training"]["phase1"]["lookahead"] = 4
    torch.save(found["checkpoint"], path)
    with pytest.raises(BadInput, match=r"was trained with training\.phase1\.lookahead 4, which this version no longer"):
        read_checkpoint(path)


def test_a_key_that_nobody_knows_is_named(tmp_path):
    path, found = unpacked(EARLIER[-1], tmp_path)
    found["checkpoint"]["config"]["training"]["phase3"] = {"num_epochs": 1}
    torch.save(found["checkpoint"], path)
    with pytest.raises(BadInput, match=r"checkpoint_latest\.pt: unknown key training\.phase3"):
        load_checkpoint(path)


def test_a_checkpoint_of_a_later_version_is_refused_with_its_commit(tmp_path):
    path, found = unpacked(EARLIER[-1], tmp_path)
    torch.save(found["checkpoint"] | {"schema": SCHEMA + 1, "code": "abc123"}, path)
    with pytest.raises(BadInput, match=rf"newer version \(schema {SCHEMA + 1}, .* up to {SCHEMA}\).*abc123"):
        read_checkpoint(path)


def test_what_is_no_checkpoint_is_told_apart(tmp_path):
    whole = unpacked(EARLIER[-1], tmp_path)[0].read_bytes()
    for name, content, sentence in (
        ("cut.pt", whole[: len(whole) // 2], "is it truncated"),
        ("empty.pt", b"", "it is empty"),
        ("text.pt", b"hello", "it is no file of torch.save"),
        ("pointer.pt", b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\n", "a Git LFS pointer"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BadInput, match=f"{name}: not readable as a checkpoint .*{sentence}"):
            read_checkpoint(tmp_path / name)
    (tmp_path / "folder.pt").mkdir()
    with pytest.raises(BadInput, match="no such checkpoint"):
        read_checkpoint(tmp_path / "folder.pt")


def test_a_checkpoint_with_a_damaged_block_is_refused(tmp_path):
    path, found = unpacked(EARLIER[-1], tmp_path)
    torch.save(found["checkpoint"], path)
    whole = path.read_bytes()
    weight = found["checkpoint"]["model_state_dict"]["model.state_encoder.tokenizer.cls"].numpy().tobytes()
    places = {"lost": (whole.index(weight), len(weight)), "name": (whole.rindex(b"data.pkl"), 4)}
    for name, (place, length) in places.items():  # in the weights, and in the table of contents
        damaged = tmp_path / f"{name}.pt"
        damaged.write_bytes(whole[:place] + bytes([0xE9]) * length + whole[place + length :])
        with pytest.raises(BadInput, match=f"{name}.pt: not readable as a checkpoint of train.py"):
            read_checkpoint(damaged)
        assert epoch_and_score(damaged) == (0, NO_SCORE)
    assert epoch_and_score(path)[1].loss == found["checkpoint"]["loss"]


@pytest.mark.parametrize("room", [4096, 250_000, 399_000])
def test_a_disk_that_gets_full_while_a_checkpoint_is_written_is_one_sentence(tmp_path, room):
    """torch raises the system's error or one of its own, depending on where in its archive the room ends."""
    path, limits = tmp_path / "checkpoint_latest.pt", resource.getrlimit(resource.RLIMIT_FSIZE)
    path.write_bytes(b"the one before")
    signal_before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        with pytest.raises(BadInput, match=rf"{path}: cannot be written \(File too large\); what was there before"):
            save_checkpoint({"weights": [torch.zeros(100_000)]}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, signal_before)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"the one before"]


@pytest.fixture
def run(tmp_path) -> tuple[dict, Path]:
    """A resumed run after three epochs, the second of which was the best."""
    for epoch, loss in ((1, 3.0), (2, 1.0), (3, 2.0)):
        torch.save({"epoch": epoch, "loss": loss}, tmp_path / f"checkpoint_epoch_{epoch}.pt")
    torch.save({"epoch": 2, "loss": 1.0}, tmp_path / "checkpoint_best.pt")
    torch.save({"epoch": 3, "loss": 2.0}, tmp_path / "checkpoint_latest.pt")
    return {"epoch": 3, "best_loss": 1.0, "loss": 2.0}, tmp_path / "checkpoint_latest.pt"


def test_the_best_of_a_run_is_found_beside_the_checkpoint_it_goes_on_from(run):
    resumed, path = run
    assert best_of_run(resumed, path).name == "checkpoint_best.pt"
    path.with_name("checkpoint_best.pt").write_bytes(b"damaged")
    assert best_of_run(resumed, path).name == "checkpoint_epoch_2.pt"
    path.with_name("checkpoint_epoch_2.pt").unlink()
    assert best_of_run(resumed, path) is None
    assert best_of_run(resumed | {"best_loss": 2.0}, path) == path


def test_success_comes_before_loss():
    in_order = [NO_SCORE, Score(-1.0, 0.9), Score(-1.0, 0.1), Score(0.0, 0.5), Score(0.5, 0.9), Score(0.5, 0.2)]
    for worse, better in itertools.combinations(in_order, 2):
        assert better.beats(worse) and not worse.beats(better)
    assert not any(score.beats(score) for score in in_order)


def test_a_resumed_run_is_told_which_settings_have_changed(tmp_path):
    path, _ = unpacked(EARLIER[-1], tmp_path)
    earlier = read_checkpoint(path)
    config, held_out = parse_config(earlier["config"], str(path)).to_dict(), set(earlier["held_out_demos"])
    config["training"]["phase2"]["state_noise"] = 0.5
    config["training"]["seed"] = 7
    config["training"]["device"] = "auto"
    notes = check_same_run(earlier, str(path), config, earlier["observation"], held_out, resumes=True)
    assert notes == ["training.phase2.state_noise was 0.4 and is now 0.5", "training.seed was 0 and is now 7"]
    with pytest.raises(BadInput, match="it held out 1 demos, of which this run finds 0"):
        check_same_run(earlier, str(path), config, earlier["observation"], set(), resumes=True)
