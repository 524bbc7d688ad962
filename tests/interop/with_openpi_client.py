"""What the real openpi-client does with a server, as JSON. test_openpi_client.py runs it with a Python that has it."""

import json
import sys

import numpy as np
from openpi_client import image_tools
from openpi_client.action_chunk_broker import ActionChunkBroker
from openpi_client.websocket_client_policy import WebsocketClientPolicy

IMAGE_SIZE = 224  # openpi's LIBERO client sends this size, whatever the server's
PROMPT = "pick up the butter and place it in the basket"


def observation(seed: int) -> dict:
    rng = np.random.default_rng(seed)
    drawn = [rng.integers(0, 256, (256, 256, 3), dtype=np.uint8) for _ in range(2)]
    image, wrist_image = (image_tools.resize_with_pad(picture, IMAGE_SIZE, IMAGE_SIZE) for picture in drawn)
    return {
        "observation/image": image_tools.convert_to_uint8(image),
        "observation/wrist_image": image_tools.convert_to_uint8(wrist_image),
        "observation/state": rng.normal(size=8),
        "observation/joint_position": rng.normal(size=7),
        "observation/sampling_seed": seed,
        "prompt": PROMPT,
    }


def main() -> None:
    host, port, api_key, sent = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
    client = WebsocketClientPolicy(host, port, api_key=api_key)
    np.savez(sent, **{key: value for key, value in observation(0).items() if isinstance(value, np.ndarray)})
    first, second, again = (client.infer(observation(seed)) for seed in (0, 1, 0))
    try:
        client.infer({"prompt": PROMPT})
        refused = None
    except RuntimeError as problem:
        refused = str(problem)
    broker = ActionChunkBroker(client, action_horizon=5)
    performed = [broker.infer(observation(0))["actions"] for _ in range(5)]
    print(
        json.dumps(
            {
                "metadata": client.get_server_metadata(),
                "actions": first["actions"].tolist(),
                "dtype": str(first["actions"].dtype),
                "repeats": bool(np.array_equal(first["actions"], again["actions"])),
                "differs": not np.array_equal(first["actions"], second["actions"]),
                "timing": second["server_timing"],
                "refused": refused,
                "performed": np.array(performed).tolist(),
            }
        )
    )


if __name__ == "__main__":
    main()
