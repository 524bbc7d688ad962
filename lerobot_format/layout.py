"""What a LeRobot dataset v3.0 of ours looks like: which feature comes from which HDF5 key, where files lie, info.json.

    meta/info.json  meta/stats.json  meta/tasks.parquet  meta/episodes/chunk-000/file-000.parquet
    data/chunk-000/file-000.parquet                      a row a frame, a row group an episode
    videos/<feature>/chunk-000/file-000.mp4              with --pictures video, the episodes one after another

obs[t] stands beside the action that was taken at obs[t], and pictures are turned by 180 degrees against LIBERO's raw
rows, both as in the LIBERO datasets of the hub.

Letters: H, W picture height and width.
"""

from collections.abc import Sequence
from typing import Any

from observation import CAMERAS

VERSION = "v3.0"
FPS = 20  # Hz, LIBERO's control rate
CHUNK_FILES = 1000  # files of a folder
DATA_MB, VIDEO_MB = 100, 200  # LeRobot's own limits of a file

PLACE = "chunk-{chunk_index:03d}/file-{file_index:03d}"
DATA_PATH = f"data/{PLACE}.parquet"
VIDEO_PATH = f"videos/{{video_key}}/{PLACE}.mp4"
EPISODES_PATH = f"meta/episodes/{PLACE}.parquet"
INFO, STATS, TASKS = "meta/info.json", "meta/stats.json", "meta/tasks.parquet"

PICTURES = dict(zip(CAMERAS, ("observation.images.image", "observation.images.image2"), strict=True))
STATE, JOINTS, FINGERS = "observation.state", "observation.states.joint_state", "observation.states.gripper_state"
LANGUAGE, ACTION = "observation.environment_state", "action"
# Feature -> the HDF5 keys of `obs` that it is made of, end to end.
VECTORS = {
    STATE: ("ee_pos", "ee_ori", "gripper_states"),  # metres, axis-angle in rad, metres: the hub's 8 numbers
    JOINTS: ("joint_states",),  # rad
    FINGERS: ("gripper_states",),  # metres
}
NAMES = {
    STATE: ["x", "y", "z", "axis_angle_x", "axis_angle_y", "axis_angle_z", "finger_left", "finger_right"],
    JOINTS: [f"joint_{number}" for number in range(1, 8)],
    FINGERS: ["finger_left", "finger_right"],
    ACTION: ["x", "y", "z", "roll", "pitch", "yaw", "gripper"],
}
INDICES = ("frame_index", "episode_index", "index", "task_index")  # int64, and one float32, the timestamp in seconds
TIMESTAMP = "timestamp"
OWN = "statevla"  # key of info.json that only this project reads
KEPT_ATTRIBUTES = ("problem_info", "bddl_file_name")  # of an HDF5 file's `data`, kept there


def place_of(file: int) -> dict[str, int]:
    """Chunk and file number of the dataset's file number `file`."""
    return {"chunk_index": file // CHUNK_FILES, "file_index": file % CHUNK_FILES}


def features_of(image_size: int, pictures: str, widths: dict[str, int]) -> dict[str, dict[str, Any]]:
    """info.json's table of features: square pictures of `image_size` as "image" or "video", vectors of these widths."""
    features: dict[str, dict[str, Any]] = {}
    for feature in PICTURES.values():
        names = ["height", "width", "channel"]
        features[feature] = {"dtype": pictures, "shape": [image_size, image_size, 3], "names": names}
        if pictures == "video":
            features[feature]["info"] = {
                "video.height": image_size,
                "video.width": image_size,
                "video.codec": "h264",
                "video.pix_fmt": "yuv420p",
                "video.is_depth_map": False,
                "video.fps": FPS,
                "video.channels": 3,
                "has_audio": False,
            }
    for feature, width in widths.items():
        features[feature] = {"dtype": "float32", "shape": [width], "names": NAMES.get(feature)}
    features[TIMESTAMP] = {"dtype": "float32", "shape": [1], "names": None}
    features |= {name: {"dtype": "int64", "shape": [1], "names": None} for name in INDICES}
    return features


def info_of(features: dict, lengths: Sequence[int], num_tasks: int, own: dict) -> dict[str, Any]:
    """info.json of a dataset whose episodes have these lengths."""
    has_videos = any(feature["dtype"] == "video" for feature in features.values())
    return {
        "codebase_version": VERSION,
        "robot_type": "panda",
        "total_episodes": len(lengths),
        "total_frames": sum(lengths),
        "total_tasks": num_tasks,
        "chunks_size": CHUNK_FILES,
        "data_files_size_in_mb": DATA_MB,
        "video_files_size_in_mb": VIDEO_MB,
        "fps": FPS,
        "splits": {"train": f"0:{len(lengths)}"},
        "data_path": DATA_PATH,
        "video_path": VIDEO_PATH if has_videos else None,
        "features": features,
        OWN: own,
    }
