"""The folder of one evaluation: what was asked for, and every finished episode, safe on disk as soon as it is over.

    settings.json     all that decides an episode, written first
    episodes.jsonl    one line a finished episode
    episodes/         videos and last frames

A killed evaluation leaves whole lines and at most one torn one, and goes on from there.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from errors import BadInput
from files import Lock, unwritable_named, written_whole

PICTURES = "episodes"
SIDE_BY_SIDE = "side_by_side.json"  # in the folder above those of --side_by_side
EPISODE_KEYS = {"suite", "task_id", "trial", "seed", "crashed", "success", "steps", "decision_ms", "tries", "error"}
SETTINGS_KEYS = {"policy", "task_suite", "instructions", "num_trials", "seed", "max_steps", "shard"}


class EvaluationFolder:
    """Opened by one evaluation at a time, until `close()` or the process's end. Usable as a context manager.

    Raises BadInput where the folder can't be written, is in use, or holds an evaluation with other settings.
    """

    def __init__(self, directory: Path, settings: dict):
        self.directory, self.episodes_file = directory, directory / "episodes.jsonl"
        self.pictures = directory / PICTURES
        settings_file, where = directory / "settings.json", f"--output_dir {directory}"
        try:
            if (directory / "results.json").exists() and not settings_file.exists():
                raise BadInput(f"{where}: already holds another program's results.json; choose another")
            if (directory / SIDE_BY_SIDE).exists():
                raise BadInput(f"{where}: holds the table of --side_by_side; choose another")
            self.pictures.mkdir(parents=True, exist_ok=True)
            self._lock = Lock(directory / ".lock", f"{where}: another evaluation is writing into this folder")
        except OSError as problem:
            raise BadInput(f"{where}: not writable ({problem.strerror})") from None
        try:
            if settings_file.exists():
                check_same(read_settings(directory), completed(settings), where, "; choose another folder")
            else:
                write_whole(settings_file, json.dumps(settings, indent=2) + "\n")
            self.episodes = read_episodes(directory)
            self._forget_torn_line()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._lock.release()

    def __enter__(self) -> "EvaluationFolder":
        return self

    def __exit__(self, *problem) -> None:
        self.close()

    def append(self, episode: dict) -> None:
        """Returns when the episode is on the disk."""
        kept = f"{len(self.episodes)} finished episodes are kept"
        advice = f"; {kept}, and the same command with the same --output_dir continues"
        with unwritable_named(self.episodes_file, advice), self.episodes_file.open("a") as file:
            file.write(json.dumps(episode) + "\n")
            file.flush()
            os.fsync(file.fileno())
        key = episode["task_id"], episode["trial"]
        self.episodes = [one for one in self.episodes if (one["task_id"], one["trial"]) != key] + [episode]

    def _forget_torn_line(self) -> None:
        if self.episodes_file.exists():
            whole, newline, torn = self.episodes_file.read_bytes().rpartition(b"\n")
            if torn:
                with unwritable_named(self.episodes_file):
                    os.truncate(self.episodes_file, len(whole + newline))


def video_of(directory: Path, episode: dict) -> Path | None:
    """Where one was kept."""
    outcome = "success" if episode["success"] else "failure"
    return _picture(directory, episode, f"{outcome}.mp4")


def last_frame_of(directory: Path, episode: dict) -> Path | None:
    """Where one was kept."""
    return _picture(directory, episode, "last.png")


def _picture(directory: Path, episode: dict, which: str) -> Path | None:
    path = directory / PICTURES / f"task{episode['task_id']}_trial{episode['trial']}_{which}"
    return path if path.exists() else None


def read_settings(directory: Path) -> dict:
    path = directory / "settings.json"
    try:
        settings = json.loads(path.read_text())
    except OSError as problem:
        raise BadInput(f"{path}: cannot be read ({problem.strerror}); is {directory} an evaluation's folder?") from None
    except ValueError:
        raise BadInput(f"{path}: not readable as JSON") from None
    if not isinstance(settings, dict) or not settings.keys() >= SETTINGS_KEYS:
        raise BadInput(f"{path}: is not of run_libero_eval.py; expected the keys {', '.join(sorted(SETTINGS_KEYS))}")
    return completed(settings)


def completed(settings: dict) -> dict:
    """The settings of an evaluation with those that it had no choice of when it was made."""
    of_policy = {"precision": "fp32"} if settings["policy"] == "checkpoint" else {}
    usual = {"init_states_played": None, "random_resets": None, "layouts": None, "decision_delay_steps": 0}
    return usual | of_policy | settings


def read_episodes(directory: Path) -> list[dict]:
    """The episodes that are over; a last line without its end is not one. One that crashed and was played again later
    is what it was the last time."""
    path = directory / "episodes.jsonl"
    try:
        *lines, _ = path.read_text(errors="replace").split("\n")
    except FileNotFoundError:
        return []
    except OSError as problem:
        raise BadInput(f"{path}: cannot be read ({problem.strerror})") from None
    episodes = {}
    for number, line in enumerate(lines, start=1):
        try:
            episode = json.loads(line)
        except ValueError:
            raise BadInput(f"{path}: line {number} is not readable as JSON") from None
        if not isinstance(episode, dict) or not episode.keys() >= EPISODE_KEYS:
            raise BadInput(f"{path}: line {number} is no episode; expected the keys {', '.join(sorted(EPISODE_KEYS))}")
        for key in ("task_id", "trial"):  # pictures are named after them
            if type(episode[key]) is not int:
                raise BadInput(f"{path}: line {number} is no episode; {key} is not a whole number")
        episodes[episode["task_id"], episode["trial"]] = episode
    return list(episodes.values())


def check_same(found: dict, wanted: dict, where: str, advice: str = "") -> None:
    """Raises BadInput that names the first difference between two evaluations' settings."""
    for name in [*wanted, *(found.keys() - wanted.keys())]:
        a, b = found.get(name), wanted.get(name)
        if a != b:
            raise BadInput(f"{where}: was evaluated with {name} {_short(a)}, not {_short(b)}{advice}")


def _short(value) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def merge(parts: Sequence[Path], directory: Path) -> EvaluationFolder:
    """Joins the shards of one evaluation in a new folder, pictures included. Episodes come in the order of the suite.

    Raises BadInput for parts of different evaluations and for an episode that two of them have.
    """
    merged_settings = read_settings(parts[0]) | {"shard": None}
    where: dict[tuple[int, int], Path] = {}
    episodes = []
    for part in parts:
        settings = read_settings(part) | {"shard": None}
        check_same(settings, merged_settings, f"{part} and {parts[0]} cannot be merged: {part}")
        for episode in read_episodes(part):
            key = episode["task_id"], episode["trial"]
            if key in where:
                raise BadInput(f"task {key[0]}, init state {key[1]} is in both {where[key]} and {part}")
            where[key] = part
            episodes.append(episode)
    if (directory / "settings.json").exists():
        raise BadInput(f"--output_dir {directory}: already holds an evaluation; merge into a new folder")
    folder = EvaluationFolder(directory, merged_settings)
    try:
        for episode in sorted(episodes, key=lambda episode: (episode["task_id"], episode["trial"])):
            folder.append(episode)
        for part in parts:
            for picture in sorted((part / PICTURES).glob("task*")):
                if picture.suffix in (".mp4", ".png"):  # a killed worker may have left a part of one
                    write_whole(folder.pictures / picture.name, _read_bytes(picture))
    except BaseException:
        folder.close()
        raise
    return folder


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as problem:
        raise BadInput(f"{path}: cannot be read ({problem.strerror})") from None


def write_whole(path: Path, content: str | bytes) -> None:
    """`written_whole`. Raises BadInput on a full disk."""
    with unwritable_named(path), written_whole(path) as stream:
        stream.write(content.encode() if isinstance(content, str) else content)
