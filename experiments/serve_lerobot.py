"""Serves a policy that LeRobot has trained on exported demonstrations, for `run_libero_eval.py --policy ws://...`.

    python -m experiments.serve_lerobot --policy outputs/act/checkpoints/last/pretrained_model \\
        --language data/libero_object_cpu/language_embeddings.npz

It runs in LeRobot's own environment, which has another numpy than the simulator's (docs/peers.md). What the policy is
told are the embeddings of the instructions, as `observation.environment_state`: the demonstrations were exported with
`convert_lerobot.py export --language`. Pictures are asked for as the demonstrations were drawn, and resized as the
export did.
"""

import argparse
import asyncio
import hashlib
from pathlib import Path

import numpy as np
import torch

from demos.language import LanguageTable, load_language
from errors import exits_on_bad_input
from files import expanded
from jepa.tokenizer import resize_images
from serving.libero_message import Request, RequestReader
from serving.policy_server import PolicyServer

ROBOT_STATE = ("ee_pos", "ee_ori", "gripper_states")  # LIBERO's 8-D observation.state
CAMERAS = {"agentview_rgb": "observation.images.image", "eye_in_hand_rgb": "observation.images.image2"}
LANG_EMB_DIM = 512


class LeRobotPolicy:
    """LeRobot's policy with its own normalisation before and after it, on one thread of the CPU."""

    def __init__(self, directory: Path, language: LanguageTable):
        from lerobot.configs.policies import PreTrainedConfig  # of another environment: --help needs none
        from lerobot.policies.factory import get_policy_class, make_pre_post_processors

        config = PreTrainedConfig.from_pretrained(directory)
        config.device = "cpu"
        self.policy = get_policy_class(config.type).from_pretrained(directory, config=config).eval()
        self.before, self.after = make_pre_post_processors(
            config, str(directory), preprocessor_overrides={"device_processor": {"device": "cpu"}}
        )
        self.language, self.config = language, config
        *_, self.image_size = config.image_features[next(iter(CAMERAS.values()))].shape
        torch.set_num_threads(1)

    @torch.no_grad()
    def decide(self, request: Request) -> np.ndarray:
        """-> the chunk (chunk_size, 7) float64 in robot units."""
        if request.seed is not None:  # of a policy that samples
            torch.manual_seed(request.seed + request.decision)
        frame = {}
        for camera, key in CAMERAS.items():
            picture = resize_images(torch.from_numpy(request.obs[camera]).unsqueeze(0), self.image_size).squeeze(0)
            frame[key] = picture.flip(1, 2).float() / 255  # (3, S, S), upright as the exported ones
        frame["observation.state"] = torch.from_numpy(np.concatenate([request.obs[name] for name in ROBOT_STATE]))
        frame["observation.environment_state"] = self.language[request.instruction]
        actions = self.policy.predict_action_chunk(self.before(frame))  # (1, chunk_size, 7) normalised
        return self.after(actions).squeeze(0).double().numpy()


@exits_on_bad_input
def main() -> None:
    parser = argparse.ArgumentParser(description="Serves a policy that LeRobot has trained on exported demonstrations.")
    # fmt: off
    parser.add_argument("--policy", type=expanded, required=True, help="folder of LeRobot's pretrained_model")
    parser.add_argument("--language", type=expanded, required=True, help="file that embed_language.py wrote")
    parser.add_argument("--image_size", type=int, default=128,
        help="of the demonstrations before the export (default: %(default)s)")
    parser.add_argument("--visual_mesh_ratio", type=float, default=1.0, help="of the demonstrations (default: 1)")
    parser.add_argument("--port", type=int, default=8000, help="default: %(default)s")
    # fmt: on
    arguments = parser.parse_args()
    language = load_language(Path(arguments.language), [], LANG_EMB_DIM)
    policy = LeRobotPolicy(Path(arguments.policy), language)
    reader = RequestReader(ROBOT_STATE, arguments.image_size, arguments.image_size, list(language.embeddings))
    weights = Path(arguments.policy) / "model.safetensors"
    metadata = {
        "name": f"LeRobot {policy.config.type}",
        "keys": reader.keys(),
        "image_size": arguments.image_size,
        "visual_mesh_ratio": arguments.visual_mesh_ratio,
        "chunk_length": policy.config.chunk_size,
        "parameters": sum(parameter.numel() for parameter in policy.policy.parameters()),
        "weights_sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "instructions": sorted(language.embeddings),
    }
    server = PolicyServer(lambda: policy.decide, reader, metadata, "127.0.0.1", arguments.port)
    asyncio.run(listen(server))


async def listen(server: PolicyServer) -> None:
    async with server:
        print(f"listening on {server.address}", flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    main()
