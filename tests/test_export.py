"""A policy that is handed on: its folder gives what the checkpoint gave, on disk and from a hub."""

import hashlib
import http.server
import json
import math
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers import ROOT, one_sentence, run, settings
from huggingface_hub import constants

import export_policy
import run_libero_eval
from errors import BadInput
from files import Lock
from published import CARD, FACTS, WEIGHTS
from published.card import card_of, command_of, evaluations_of
from published.folder import portable, weights_sha256
from published.hub import downloaded
from rollouts.episodes import Task
from rollouts.policies import make_policy
from rollouts.statistics import read_results
from statevla_model import load_checkpoint
from training.checkpoint import read_checkpoint, save_checkpoint

FIXTURE = ROOT / "tests/checkpoints/da2dd2b.pt"  # a tiny checkpoint of phase 2, an observation and what was made of it
PLAYED = ROOT / "experiments/results/libero_object_cpu_500.json"


def export(monkeypatch, *flags: object) -> None:
    monkeypatch.setattr(sys, "argv", ["export_policy.py", *map(str, flags)])
    export_policy.main()


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    saved = torch.load(FIXTURE, weights_only=True)["checkpoint"]
    saved["config"]["data"] |= {"data_directory": "/home/somebody/demos", "cache_directory": "/home/somebody/cache"}
    saved["optimizer_state_dict"] = {"state": {0: torch.ones(3)}, "param_groups": []}
    path = tmp_path / "checkpoint_best.pt"
    save_checkpoint(saved | {"code": "c0ffee"}, path)
    return path


@pytest.fixture
def folder(checkpoint, tmp_path, monkeypatch) -> Path:
    export(monkeypatch, "--checkpoint", checkpoint, "--output_dir", tmp_path / "policy")
    return tmp_path / "policy"


def results_of(checkpoint: Path, path: Path, **changes) -> Path:
    """A real results.json as if these weights had played it, with some of its settings changed."""
    results = json.loads(PLAYED.read_text())
    played = {"weights_sha256": weights_sha256(read_checkpoint(checkpoint)["model_state_dict"])}
    results["settings"] |= played | changes
    path.write_text(json.dumps(results))
    return path


# ------------------------------------------------------------------------------------------------------ the folder


def test_a_folder_gives_the_weights_and_facts_of_its_checkpoint_bit_for_bit(checkpoint, folder):
    before, after = read_checkpoint(checkpoint), read_checkpoint(folder, phase=2)
    assert before["model_state_dict"].keys() == after["model_state_dict"].keys()
    for name, value in before["model_state_dict"].items():
        assert value.dtype == after["model_state_dict"][name].dtype
        assert torch.equal(value, after["model_state_dict"][name]), name
    known, kept = (one["language"]["embeddings"] for one in (before, after))
    assert list(known) == list(kept) and all(torch.equal(known[text], kept[text]) for text in known)
    apart = {"model_state_dict", "optimizer_state_dict", "language", "config"}
    assert {key: before[key] for key in before.keys() - apart} == {key: after[key] for key in after.keys() - apart}
    assert all(before["config"][section] == after["config"][section] for section in ("model", "wandb"))


def test_an_exported_policy_decides_as_it_did(folder):
    found, model = torch.load(FIXTURE, weights_only=True), load_checkpoint(folder)
    torch.testing.assert_close(model.predict(found["obs"], 4, "zero"), found["actions"], rtol=0, atol=1e-6)


def test_an_evaluation_has_the_same_settings_whichever_form_it_was_started_with(checkpoint, folder, monkeypatch):
    found = []
    for place in (checkpoint, folder):
        saved = read_checkpoint(place)
        tasks = {6: Task("", next(iter(saved["language"]["embeddings"])), True, np.zeros((1, 20)))}
        monkeypatch.setattr(sys, "argv", ["run_libero_eval.py", "--checkpoint", str(place)])
        evaluation = run_libero_eval.evaluation_of(run_libero_eval.parse_arguments())
        found.append(make_policy(evaluation, saved, tasks)[1])
    assert found[0] == found[1] and len(found[0]["weights_sha256"]) == 64


def test_an_instruction_that_is_known_but_was_not_trained_on_is_new_to_a_policy(checkpoint, monkeypatch):
    saved = read_checkpoint(checkpoint)
    embeddings = saved["language"]["embeddings"]
    saved["instructions"] = trained = list(embeddings)
    embeddings["open the drawer"] = torch.nn.functional.normalize(torch.ones_like(embeddings[trained[0]]), dim=0)
    monkeypatch.setattr(sys, "argv", ["run_libero_eval.py", "--checkpoint", str(checkpoint)])
    evaluation = run_libero_eval.evaluation_of(run_libero_eval.parse_arguments())
    for instruction, new in (("open the drawer", ["open the drawer"]), (trained[0], [])):
        tasks = {6: Task("", instruction, True, np.zeros((1, 20)))}
        assert make_policy(evaluation, saved, tasks)[1]["new_instructions"] == new


def test_a_folder_names_no_place_of_the_machine_that_made_it(folder):
    assert {path.name for path in folder.iterdir()} == {CARD, FACTS, WEIGHTS}
    for path in folder.iterdir():
        assert b"somebody" not in path.read_bytes()
    facts = json.loads((folder / FACTS).read_text())
    assert facts["config"]["data"]["data_directory"] == "data/demos"
    facts["config"]["data"]["cache_directory"] = "/home/victim/.ssh"  # nor is one followed that somebody wrote into it
    (folder / FACTS).write_text(json.dumps(facts))
    assert read_checkpoint(folder)["config"]["data"]["cache_directory"] is None


@pytest.mark.parametrize(
    "folders, expected",
    [
        (["/mnt/a/train", "/mnt/b/train"], ["data/a/train", "data/b/train"]),
        (["/mnt/a", "own/train"], ["data/a", "own/train"]),
        (["../x/train", "~/y/train"], ["data/x/train", "data/y/train"]),
        (["/data/train", "../train"], ["data/data/train", "data/train"]),
        (["/train", "../train"], ["data/0", "data/1"]),
        (["data/train", "/train"], ["data/train", "data/1"]),
        (["/a/1/2/3/4/5", "/b/1/2/3/4/5"], ["data/0", "data/1"]),
        (".", "."),
        ("/home/somebody/demos", "data/demos"),
    ],
)
def test_folders_that_only_one_machine_has_are_told_apart_on_the_next(folders, expected):
    data = {"data_directory": folders, "scenes": "/home/somebody/scenes"}
    found = portable({"data": data, "training": {}})["data"]
    assert (found["data_directory"], found["scenes"]) == (expected, "data/scenes")


def test_a_checkpoint_from_within_an_epoch_is_handed_on_in_json_that_any_program_reads(
    checkpoint, tmp_path, monkeypatch
):
    within = torch.load(checkpoint, weights_only=True) | {"loss": math.nan, "best_loss": math.inf}
    save_checkpoint(within, tmp_path / "latest.pt")
    export(monkeypatch, "--checkpoint", tmp_path / "latest.pt", "--output_dir", tmp_path / "within")

    def refuse(constant: str) -> None:
        raise ValueError(f"no JSON: {constant}")

    facts = json.loads((tmp_path / "within" / FACTS).read_text(), parse_constant=refuse)
    assert facts["loss"] is None and facts["best_loss"] is None
    read = read_checkpoint(tmp_path / "within")
    assert math.isnan(read["loss"]) and read["best_loss"] == math.inf
    card = (tmp_path / "within" / CARD).read_text()
    assert f"- Saved within epoch {within['epoch'] + 1} of phase 2, and not validated." in card
    assert "nan" not in card.partition("## Limits")[0].partition("## Data")[2]


def test_a_model_starts_its_flow_where_its_checkpoint_says(checkpoint, tmp_path):
    saved = torch.load(checkpoint, weights_only=True)
    saved["config"]["training"]["phase2"]["flow_start"] = "zero"
    save_checkpoint(saved, tmp_path / "zero.pt")
    obs = torch.load(FIXTURE, weights_only=True)["obs"]
    from_zero, from_noise = load_checkpoint(tmp_path / "zero.pt"), load_checkpoint(checkpoint)
    assert torch.equal(from_zero.predict(obs), from_noise.predict(obs, flow_start="zero"))
    assert not torch.equal(from_noise.predict(obs), from_noise.predict(obs))


def test_weights_that_are_one_tensor_are_stored_once(checkpoint, tmp_path, monkeypatch):
    saved = read_checkpoint(checkpoint)
    weights = saved["model_state_dict"]
    encoder = {name: name.replace(".target.", ".") for name in weights if ".target." in name}
    assert len(encoder) > 10
    save_checkpoint(saved | {"model_state_dict": weights | {a: weights[b] for a, b in encoder.items()}}, checkpoint)
    export(monkeypatch, "--checkpoint", checkpoint, "--output_dir", tmp_path / "first")
    export(monkeypatch, "--checkpoint", tmp_path / "first", "--output_dir", tmp_path / "second")
    for name in ("first", "second"):
        found = read_checkpoint(tmp_path / name)["model_state_dict"]
        assert weights_sha256(found) == weights_sha256(read_checkpoint(checkpoint)["model_state_dict"])
        size = sum(value.nbytes for name, value in found.items() if ".target." not in name)
        assert (tmp_path / name / WEIGHTS).stat().st_size < size + 40_000
    assert (tmp_path / "first" / WEIGHTS).read_bytes() == (tmp_path / "second" / WEIGHTS).read_bytes()


def test_training_is_not_resumed_from_a_folder_nor_phase_2_started_from_a_policy(folder):
    said = one_sentence(run("train.py", "--phase", 2, "--checkpoint", folder, *settings(), expect=2))
    assert f"{folder}: holds weights alone" in said
    said = one_sentence(run("train.py", "--phase", 2, "--phase1_checkpoint", folder, *settings(), expect=2))
    assert "key phase is 2, expected a checkpoint of phase 1" in said


def test_an_encoder_can_be_handed_on_too(checkpoint, tmp_path, monkeypatch):
    save_checkpoint(read_checkpoint(checkpoint) | {"phase": 1}, checkpoint)
    export(monkeypatch, "--checkpoint", checkpoint, "--output_dir", tmp_path / "encoder")
    assert read_checkpoint(tmp_path / "encoder", phase=1)["phase"] == 1
    assert "--phase1_checkpoint encoder" in (tmp_path / "encoder" / CARD).read_text()


def test_an_export_is_replaced_and_nothing_else_is(checkpoint, folder, tmp_path, monkeypatch, capsys):
    before = (folder / WEIGHTS).read_bytes()
    results = results_of(checkpoint, tmp_path / "results.json")
    export(monkeypatch, "--checkpoint", checkpoint, "--output_dir", folder, "--evaluation", results)
    assert (folder / WEIGHTS).read_bytes() == before and "450 of 500" in (folder / CARD).read_text()
    (tmp_path / "theirs").mkdir()
    for name, sentence in (("config.json", "config.json of something else"), ("README.md", "files of something else")):
        theirs = tmp_path / "theirs" / name
        theirs.write_text("{}")
        capsys.readouterr()
        with pytest.raises(SystemExit):
            export(monkeypatch, "--checkpoint", checkpoint, "--output_dir", tmp_path / "theirs")
        assert sentence in capsys.readouterr().err and theirs.read_text() == "{}"
        theirs.unlink()
    with Lock(folder / ".lock", "busy"), pytest.raises(SystemExit):
        export(monkeypatch, "--checkpoint", checkpoint, "--output_dir", folder)
    assert "another export is writing into this folder" in capsys.readouterr().err


def damaged(change):
    def do(folder: Path) -> None:
        path = folder / WEIGHTS
        path.write_bytes(change(path.read_bytes()))

    return do


def header_changed(change):
    """Another header of the same weights: a safetensors file is its header's length, the header, the numbers."""

    def do(content: bytes) -> bytes:
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        name = next(name for name in header if name != "__metadata__")
        change(header[name])
        header = json.dumps(header).encode()
        return len(header).to_bytes(8, "little") + header + content[8 + length :]

    return damaged(do)


def facts_changed(**changes):
    def do(folder: Path) -> None:
        facts = json.loads((folder / FACTS).read_text())
        (folder / FACTS).write_text(json.dumps(facts | changes))

    return do


DAMAGED = {  # what was done to the folder -> how, and what the sentence says
    "a lost block": (damaged(lambda old: old[:-4000] + bytes(4000)), "is damaged, or not the one that config.json"),
    "half a file": (damaged(lambda old: old[: len(old) // 2]), "not readable as safetensors"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "cannot be read (No such file"),
    "a Git LFS pointer": (damaged(lambda old: b"version https://git-lfs.github.com/spec/v1\n"), "is a Git LFS pointer"),
    "a pickle as weights": (damaged(lambda old: b"\x80\x02cos\nsystem\n."), "not readable as safetensors"),
    "a header of a petabyte": (damaged(lambda old: (1 << 50).to_bytes(8, "little") + old[8:]), "not readable as safe"),
    "a tensor of a petabyte": (header_changed(lambda one: one.update(shape=[1 << 48])), "not readable as safetensors"),
    "numbers beyond the end": (
        header_changed(lambda one: one.update(data_offsets=[0, 1 << 40], shape=[1 << 38])), "not readable as safetens",
    ),
    "numbers twice": (header_changed(lambda one: one.update(data_offsets=[4, 8])), "not readable as safetensors"),
    "no facts": (lambda folder: (folder / FACTS).unlink(), "no such checkpoint, it has no config.json"),
    "another program's facts": (lambda folder: (folder / FACTS).write_text('{"type": "bert"}'), "it lacks weights"),
    "facts without end": (lambda folder: (folder / FACTS).write_text("[" * 100_000), "not readable as JSON"),
    "an epoch in words": (facts_changed(epoch="last"), "key epoch is not a whole number"),
    "a later version": (facts_changed(schema=99), "was written by a newer version (schema 99"),
    "no epoch": (lambda folder: facts_changed(epoch=None)(folder), "key epoch is not a whole number"),
    "a list as config": (facts_changed(config=[]), "key config is not a section of values"),
    "a config without sections": (facts_changed(config={"model": 3}), "key data is missing"),
    "held-out demos by number": (facts_changed(held_out_demos=[1]), "key held_out_demos is not a list of names"),
    "other instructions": (facts_changed(language={"encoder": "x", "instructions": []}), "not the same instructions"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_folder_is_one_sentence(folder, damage):
    do, sentence = DAMAGED[damage]
    do(folder)
    with pytest.raises(BadInput) as said:
        load_checkpoint(folder)
    assert str(said.value).startswith(str(folder)) and sentence in str(said.value) and "\n" not in str(said.value)


def test_the_folder_of_a_training_is_told_from_an_export(checkpoint):
    with pytest.raises(BadInput, match=rf"no such checkpoint; did you mean {checkpoint}\?"):
        read_checkpoint(checkpoint.parent)


# -------------------------------------------------------------------------------------------------------- the card


def test_the_card_has_the_figures_the_limits_and_the_hubs_header(checkpoint, tmp_path):
    saved = read_checkpoint(checkpoint)
    path = results_of(checkpoint, tmp_path / "results.json")
    evaluations = evaluations_of([path], weights_sha256(saved["model_state_dict"]))
    card = card_of(saved, "my_policy", evaluations)
    _, header, text = card.split("---\n", 2)
    assert yaml.safe_load(header).keys() == {"license", "library_name", "pipeline_tag", "tags"}
    results = json.loads(path.read_text())
    assert f"| {results['title']} | 450 of 500 | 87 to 92% |" in text
    for row in results["tasks"]:
        assert f"| {row['task']} | {row['successes']} of {row['trials']} |" in text
    assert 'load_checkpoint("my_policy")' in text and next(iter(saved["language"]["embeddings"])) in text
    assert "commit c0ffee trained it" in text and "somebody" not in text
    assert "how well it acts is not known" in card_of(saved, "my_policy", {})


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"init_states_played": "10-49", "num_trials": 40}, {"random_resets": 7, "num_trials": 7},
        {"shift_target": 0.05, "seed": 3, "max_steps": 100}, {"execute_steps": 5, "sample_steps": 2},
        {"precision": "bf16"}, {"flow_start": "zero", "visual_mesh_ratio": 0.5},
        {"instructions": {"2": "a", "4": "b", "3": "c"}},
    ],
)  # fmt: skip
def test_the_cards_command_asks_for_what_was_played(checkpoint, tmp_path, monkeypatch, changes):
    saved = read_checkpoint(checkpoint)
    path = results_of(checkpoint, tmp_path / "results.json", **changes)
    (results,) = evaluations_of([path], weights_sha256(saved["model_state_dict"])).values()
    settings = results["settings"]
    monkeypatch.setattr(sys, "argv", command_of(settings, saved, str(checkpoint)).split()[1:])
    asked = run_libero_eval.evaluation_of(run_libero_eval.parse_arguments())
    as_is = ("task_suite", "sample_steps", "precision", "max_steps", "shift_target", "seed", "random_resets")
    assert {name: getattr(asked, name) for name in as_is} == {name: settings[name] for name in as_is}
    assert (asked.execute_steps or 10) == settings["execute_steps"]
    assert (asked.flow_start or saved["config"]["training"]["phase2"]["flow_start"]) == settings["flow_start"]
    ratio = asked.visual_mesh_ratio or saved["observation"]["visual_mesh_ratio"]
    assert ratio == settings["visual_mesh_ratio"]
    assert len(asked.trials(settings["init_states"])) == settings["num_trials"]
    assert asked.init_states_played(settings["init_states"]) == settings["init_states_played"]
    assert asked.tasks == ("2-4" if changes.get("instructions") else None)


def test_the_cards_command_names_a_demonstration_that_was_named(checkpoint, tmp_path):
    replay = {
        "policy": "replay",
        "demos": {"6": "butter_demo.hdf5:demo_3"},
        "instructions": {"6": "pick up the butter"},
    }
    for named, expected in (({}, False), ({"demo_was_named": True}, True)):
        results = read_results(results_of(checkpoint, tmp_path / "results.json", **replay, **named))
        command = command_of(results["settings"], read_checkpoint(checkpoint), "policy")
        assert ("--demo butter_demo.hdf5:demo_3" in command) == expected


def test_figures_of_other_weights_do_not_come_into_the_card(checkpoint, tmp_path):
    other = results_of(checkpoint, tmp_path / "other.json", weights_sha256="f" * 64)
    with pytest.raises(BadInput, match=r"other\.json: was played by the weights ffffffffffff, this checkpoint's are"):
        evaluations_of([other], "0" * 64)
    blind = results_of(checkpoint, tmp_path / "blind.json", policy="zero", weights_sha256=None)
    assert evaluations_of([blind], "0" * 64)
    (tmp_path / "no.json").write_text("{}")
    with pytest.raises(BadInput, match=r"no\.json: not a results\.json"):
        evaluations_of([tmp_path / "no.json"], "0" * 64)


# --------------------------------------------------------------------------------------------------------- the hub


@pytest.fixture
def hub(folder, monkeypatch, tmp_path):
    """A server that answers as the hub does for the repository owner/name, whose files are those of `folder`, and the
    real client set to it. `asked` is what it was asked for."""
    asked, commit = [], hashlib.sha1(b"first").hexdigest()

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(f"{self.command} {self.path}")
            repository, _, rest = self.path.lstrip("/").partition("/resolve/")
            revision, _, name = rest.partition("/")
            path, code, content = folder / name, "", b""
            if repository != "owner/name":
                code = "RepoNotFound"
            elif revision not in ("main", "v1", commit):
                code = "RevisionNotFound"
            elif not path.is_file():
                code = "EntryNotFound"
            else:
                content = path.read_bytes()
            self.send_response(404 if code else 200)
            headers = {"X-Error-Code": code} if code else {"ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
            for key, value in (headers | {"X-Repo-Commit": commit, "Content-Length": str(len(content))}).items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        do_HEAD = do_GET

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.address, server.asked, server.commit = f"http://127.0.0.1:{server.server_port}", asked, commit
    use_hub(monkeypatch, server.address, tmp_path / "cache")
    yield server
    server.shutdown()
    server.server_close()


def use_hub(monkeypatch, address: str, cache: Path) -> None:
    """The hub's client reads its settings when it is imported, which other tests have done."""
    template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    downloaded.cache_clear()


def test_a_policy_is_loaded_from_a_hub_once_and_then_from_the_cache(hub, checkpoint, monkeypatch, tmp_path, capsys):
    expected = weights_sha256(read_checkpoint(checkpoint)["model_state_dict"])
    assert weights_sha256(read_checkpoint("hf://owner/name")["model_state_dict"]) == expected
    assert f"hf://owner/name: commit {hub.commit}" in capsys.readouterr().out
    assert not any(CARD in path for path in hub.asked)
    asked = len(hub.asked)
    assert load_checkpoint("hf://owner/name").language  # this process has asked already
    assert len(hub.asked) == asked
    assert read_checkpoint("hf://owner/name@v1", phase=2)["epoch"] == read_checkpoint(checkpoint)["epoch"]
    assert sum("GET" in path and WEIGHTS in path for path in hub.asked) == 1
    nobody = "http://127.0.0.1:9"
    use_hub(monkeypatch, nobody, tmp_path / "cache")  # the network is gone
    assert weights_sha256(read_checkpoint("hf://owner/name")["model_state_dict"]) == expected
    use_hub(monkeypatch, nobody, tmp_path / "empty")
    with pytest.raises(BadInput, match=f"hf://owner/name: neither in the local cache nor to be had from {nobody}"):
        read_checkpoint("hf://owner/name")


def test_what_a_hub_has_not_is_one_sentence(hub, folder):
    for address, sentence in (
        ("hf://owner/other", f"{hub.address} has no such repository, or it is private"),
        ("hf://owner/name@v2", "has no revision v2"),
        ("hf://name", "expected hf://owner/name, or hf://owner/name@revision"),
        ("hf://owner/../name", "expected hf://owner/name"),
        ("hf://owner/..", "cannot be had from"),
    ):
        with pytest.raises(BadInput) as said:
            read_checkpoint(address)
        assert str(said.value).startswith(address) and sentence in str(said.value) and "\n" not in str(said.value)
    shutil.move(folder / WEIGHTS, folder / "weights.bin")
    with pytest.raises(BadInput, match=r"hf://owner/name: is no folder of export_policy\.py, it lacks"):
        read_checkpoint("hf://owner/name")


def test_without_a_network_a_program_says_one_sentence(tmp_path):
    code = "from errors import exits_on_bad_input\nfrom published.hub import downloaded\n"
    code += "exits_on_bad_input(downloaded)('hf://owner/name')"
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "no_proxy": "127.0.0.1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert one_sentence(done).startswith("error: hf://owner/name: neither in the local cache nor to be had from http")


def test_a_flag_that_takes_several_files_may_be_given_again(monkeypatch):
    words = "export_policy.py --checkpoint c --output_dir d --evaluation one two --evaluation three"
    monkeypatch.setattr(sys, "argv", words.split())
    assert export_policy.parse_arguments().evaluation == ["one", "two", "three"]
