"""What does a server add to a decision: the wire, and the time until a health check is answered?

    python benchmarks/wire.py

One client on this machine asks a server of this machine, batch 1, from a simulator's 128-pixel pictures. The wire is
what the client waits beyond the time that the server spends on the decision itself. It is measured with a policy that
decides nothing, which is the wire alone, and with a small model. Health checks are asked while decisions are made.
"""

import threading
import time
import urllib.request

import numpy as np
import torch
from measure import REPO, arguments, print_table, spread, write_results
from websockets.sync.client import connect

from config import load_config
from observation import CAMERAS, ROBOT_STATES, STATE_WIDTHS
from rollouts.policies import CheckpointPolicy
from serving.libero_message import RequestReader, message_of
from serving.messages import packed, unpacked
from serving.policy_server import PolicyServer, in_background
from serving.served_checkpoint import begin
from statevla_model import build_trainer

SIZE, CHUNK, INSTRUCTION = 128, 10, "pick up the milk"
SMALL = ["model.image_size=64", "model.embed_dim=128", "model.encoder_depth=4", "model.policy_embed_dim=128"]


def main() -> None:
    settings = arguments(__doc__)
    rounds = 10 if settings.quick else 1000
    rows = []
    for name, begins in {"nothing": lambda: nothing, "a small model": small_model()}.items():
        with in_background(server_of(begins)) as server:
            rows.append({"decides": name, **asked(server.port, rounds)})
    print_table(
        "One request over this machine's own network, ms: median (quartiles)",
        ["decides", "whole", "decision", "wire", "health check"],
        [[row["decides"], *(text(row[part]) for part in ("whole", "decision", "wire", "health"))] for row in rows],
    )
    notes = ["wire: what a client waits beyond the decision, in ms; health: GET /healthz while decisions are made"]
    write_results("wire", rows, notes, settings.quick)


def nothing(_request) -> np.ndarray:
    return np.zeros((CHUNK, 7))


def small_model():
    """What decides for a connection, with a model of the size of the policy in the tree."""
    torch.manual_seed(0)
    model = build_trainer(load_config(REPO / "conf/config.yaml", SMALL), phase=2).model.eval()
    model.state_scaling.fit(torch.randn(64, model.config.state_dim))
    model.policy.normalizer.fit(torch.rand(64, 6) * 2 - 1)
    policy = CheckpointPolicy(model, {}, torch.device("cpu"), CHUNK, 4, "noise")
    language = {INSTRUCTION: torch.randn(model.config.lang_emb_dim)}
    return lambda: begin(policy, language)


def server_of(begins) -> PolicyServer:
    reader = RequestReader(list(ROBOT_STATES["joints"]), SIZE, SIZE, [INSTRUCTION])
    return PolicyServer(begins, reader, {"name": "benchmark"}, "127.0.0.1", 0)


def asked(port: int, rounds: int) -> dict:
    """whole, decision, wire and health, each with median and quartiles in ms."""
    rng = np.random.default_rng(0)
    obs = {camera: rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8) for camera in CAMERAS}
    obs |= {part: np.zeros(width, np.float32) for part, width in STATE_WIDTHS.items()}
    whole, decision, health = [], [], []
    health_checks = threading.Thread(target=check_health, args=(port, min(rounds, 50), health))
    with connect(f"ws://127.0.0.1:{port}", compression=None, proxy=None) as connection:
        connection.recv()
        for number in range(rounds + 5):
            if number == 5:  # the first ones warm up
                whole.clear(), decision.clear()
            start = time.perf_counter()
            connection.send(packed(message_of(obs, INSTRUCTION, 0, 0)))
            answer = unpacked(connection.recv())
            whole.append(1000 * (time.perf_counter() - start))
            decision.append(answer["server_timing"]["infer_ms"])
        health_checks.start()
        while health_checks.is_alive():
            connection.send(packed(message_of(obs, INSTRUCTION, 0, 0)))
            connection.recv()
    wire = [all_of_it - part for all_of_it, part in zip(whole, decision, strict=True)]
    found = {"whole": whole, "decision": decision, "wire": wire, "health": health}
    return {name: spread(times) | {"least": min(times)} for name, times in found.items()}


def check_health(port: int, times: int, found: list[float]) -> None:
    for _ in range(times):
        start = time.perf_counter()
        urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"http://127.0.0.1:{port}/healthz").close()
        found.append(1000 * (time.perf_counter() - start))


def text(found: dict[str, float]) -> str:
    return f"{found['median']:.2f} ({found['q1']:.2f} to {found['q3']:.2f}), least {found['least']:.2f}"


if __name__ == "__main__":
    main()
