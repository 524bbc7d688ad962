"""The real openpi-client, in an environment of its own, against serve_policy.py with the policy in the tree."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from statevla_model import load_checkpoint

ROOT = Path(__file__).parent.parent.parent
CHECKPOINT = ROOT / "checkpoints/pretrained/libero_object_cpu"
CLIENT = Path(__file__).parent / "with_openpi_client.py"
KEY = "a key"
PROMPT = "pick up the butter and place it in the basket"


@pytest.fixture(scope="module")
def said(tmp_path_factory) -> dict:
    """What the client found and what it had sent, and how the server ended."""
    sent = tmp_path_factory.mktemp("sent") / "observation.npz"
    client = Path(os.environ["INTEROP"]) / "interop-openpi/bin/python"
    command = [sys.executable, "serve_policy.py", "--checkpoint", str(CHECKPOINT), "--port", "0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "STATEVLA_API_KEY": KEY}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as server:
        try:
            port = next(match[1] for line in server.stdout if (match := re.search(r"ws://127.0.0.1:(\d+)", line)))
            done, wrong = (
                subprocess.run([client, CLIENT, "127.0.0.1", port, key, sent], capture_output=True, text=True)
                for key in (KEY, "another")
            )
        finally:
            server.send_signal(signal.SIGTERM)
            server.communicate(timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout) | {
        "sent": dict(np.load(sent)),
        "exit_code": server.returncode,
        "with_another_key": wrong.stderr,
    }


def test_the_real_client_gets_chunks_that_its_broker_hands_out_one_by_one(said):
    actions = np.array(said["actions"])
    assert actions.shape == (10, 7) and said["dtype"] == "float64" and set(actions[:, 6]) <= {-1, 1}
    assert said["repeats"] and said["differs"]
    np.testing.assert_array_equal(said["performed"], actions[:5])
    assert said["timing"].keys() == {"infer_ms", "prev_total_ms"}
    assert said["metadata"]["image_size"] == 128 and said["metadata"]["control_hz"] == 20


def test_the_real_client_reads_what_is_wrong_and_goes_on(said):
    assert said["refused"].endswith("the message lacks the key observation/image")
    assert "HTTP 401" in said["with_another_key"]


def test_the_server_of_the_real_client_ends_with_code_0(said):
    assert said["exit_code"] == 0


def test_the_real_clients_pictures_are_turned_back(said):
    """With the same pictures, state and noise the model decides the same without a server."""
    sent = said["sent"]
    obs = {
        "agentview_rgb": sent["observation/image"][::-1, ::-1],
        "eye_in_hand_rgb": sent["observation/wrist_image"][::-1, ::-1],
        "joint_states": sent["observation/joint_position"].astype(np.float32),
        "gripper_states": sent["observation/state"][6:].astype(np.float32),
    }
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    expected = load_checkpoint(CHECKPOINT).decide(obs, PROMPT, generator=generator)
    np.testing.assert_allclose(said["actions"], expected, atol=1e-5)
