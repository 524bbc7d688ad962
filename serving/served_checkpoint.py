"""A checkpoint as a PolicyServer's policy: its decisions, the requests that it reads, and what it says of itself."""

from collections.abc import Callable

import numpy as np
import torch

from demos.language import LanguageTable
from provenance import code_version
from rollouts.policies import CheckpointPolicy
from rollouts.video import CONTROL_HZ
from serving.libero_message import DECISION, SEED, Request, RequestReader


class Noise:
    """One connection's noise. That of a request with a seed is a function of seed and number of the decision."""

    def __init__(self, policy: CheckpointPolicy):
        self.policy = policy
        self.unseeded = torch.Generator()
        self.unseeded.seed()
        self.seeded, self.at = torch.Generator(), (-1, 0)  # at: seed, and number of the decision that comes next

    def generator(self, seed: int | None, decision: int) -> torch.Generator:
        """Draws this decision's noise next."""
        if seed is None:
            return self.unseeded
        if self.at != (seed, decision):
            self.seeded.manual_seed(seed)
            for _ in range(decision):
                self.policy.start_of_flow(self.seeded)
        self.at = seed, decision + 1
        return self.seeded


def begin(policy: CheckpointPolicy, language: LanguageTable) -> Callable[[Request], np.ndarray]:
    """What decides for a new connection: request -> chunk (H, 7) float64."""
    noise = Noise(policy)

    def decide(request: Request) -> np.ndarray:
        generator = noise.generator(request.seed, request.decision)
        [chunk] = policy.decide_for([request.obs], [language[request.instruction]], [generator])
        return chunk

    return decide


def reader_of(checkpoint: dict, image_size: int, language: LanguageTable) -> RequestReader:
    """image_size: the model's own."""
    observation = checkpoint["observation"]
    return RequestReader(observation["robot_state"], observation["image_size"], image_size, list(language.embeddings))


def metadata_of(checkpoint: dict, of_policy: dict, chunk_length: int, reader: RequestReader) -> dict:
    """What a client is told on connecting. of_policy: what settings.json of an evaluation says of the same policy."""
    return {
        "name": "StateVLA",
        "keys": reader.keys(),
        "optional_keys": {
            SEED: "seed of this decision's noise; without it noise that cannot be repeated",
            DECISION: "number of the episode's decisions before this one (0)",
        },
        "image_size": reader.image_size,
        "actions": {
            "shape": [chunk_length, 7],
            "dtype": "float64",
            "unit": "six pose deltas in robot units, -1 to 1, and the gripper, -1 open, +1 close",
        },
        "chunk_length": chunk_length,
        "control_hz": CONTROL_HZ,
        "visual_mesh_ratio": checkpoint["observation"]["visual_mesh_ratio"],
        **of_policy,
        "instructions": sorted(reader.instructions),
        "checkpoint_epoch": checkpoint["epoch"],
        "code_of_checkpoint": checkpoint.get("code", "unknown"),
        "code": code_version(),
    }
