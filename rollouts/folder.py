"""The folder of one evaluation: what was asked for, and every finished episode, safe on disk as soon as it is over.

    settings.json     all that decides an episode, written first
    episodes.jsonl    one line a finished episode
    episodes/         videos and last frames

A killed evaluation leaves whole lines and at most one torn one, and goes on from there.
"""

import fcntl
import json
import os
from collections.abc import Sequence
from pathlib import Path

from errors import BadInput
from files import written_whole

PICTURES = "episodes"


class EvaluationFolder:
    """Opened by one evaluation at a time.

    Raises BadInput where the folder can't be written, is in use, or holds an evaluation with other settings.
    """

    def __init__(self, directory: Path, settings: dict):
        self.directory, self.episodes_file = directory, directory / "episodes.jsonl"
        self.pictures = directory / PICTURES
        settings_file = directory / "settings.json"
        if (directory / "results.json").exists() and not settings_file.exists():
            raise BadInput(f"--output_dir {directory}: already holds another program's results.json; choose another")
        try:
            self.pictures.mkdir(parents=True, exist_ok=True)
            self._lock = open(directory / ".lock", "w")  # noqa: SIM115  held until this process ends, however it ends
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadInput(f"--output_dir {directory}: another evaluation is writing into this folder") from None
        except OSError as problem:
            raise BadInput(f"--output_dir {directory}: not writable ({problem.strerror})") from None
        if settings_file.exists():
            check_same(read_settings(directory), settings, f"--output_dir {directory}", "; choose another folder")
        else:
            write_whole(settings_file, json.dumps(settings, indent=2) + "\n")
        self.episodes = read_episodes(directory)
        self._forget_torn_line()

    def append(self, episode: dict) -> None:
        """Returns when the episode is on the disk."""
        try:
            with self.episodes_file.open("a") as file:
                file.write(json.dumps(episode) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as problem:
            raise BadInput(
                f"{self.episodes_file}: cannot be written ({problem.strerror});"
                f" {len(self.episodes)} finished episodes are kept and the same command continues"
            ) from None
        key = episode["task_id"], episode["trial"]
        self.episodes = [one for one in self.episodes if (one["task_id"], one["trial"]) != key] + [episode]

    def _forget_torn_line(self) -> None:
        if self.episodes_file.exists():
            whole, newline, torn = self.episodes_file.read_bytes().rpartition(b"\n")
            if torn:
                os.truncate(self.episodes_file, len(whole + newline))


def read_settings(directory: Path) -> dict:
    path = directory / "settings.json"
    try:
        return json.loads(path.read_text())
    except OSError as problem:
        raise BadInput(f"{path}: cannot be read ({problem.strerror}); is {directory} an evaluation's folder?") from None
    except ValueError:
        raise BadInput(f"{path}: not readable as JSON") from None


def read_episodes(directory: Path) -> list[dict]:
    """The episodes that are over; a last line without its end is not one. One that crashed and was played again later
    is what it was the last time."""
    path = directory / "episodes.jsonl"
    if not path.exists():
        return []
    *lines, _ = path.read_text(errors="replace").split("\n")
    episodes = {}
    for number, line in enumerate(lines, start=1):
        try:
            episode = json.loads(line)
        except ValueError:
            raise BadInput(f"{path}: line {number} is not readable as JSON") from None
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
    merged_settings, where, episodes = None, {}, []
    for part in parts:
        settings = read_settings(part) | {"shard": None}
        merged_settings = merged_settings or settings
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
    for episode in sorted(episodes, key=lambda episode: (episode["task_id"], episode["trial"])):
        folder.append(episode)
    for part in parts:
        for picture in sorted((part / PICTURES).glob("task*")):
            write_whole(folder.pictures / picture.name, picture.read_bytes())
    return folder


def write_whole(path: Path, content: str | bytes) -> None:
    """`written_whole`. Raises BadInput on a full disk."""
    try:
        with written_whole(path) as stream:
            stream.write(content.encode() if isinstance(content, str) else content)
    except OSError as problem:
        raise BadInput(f"{path}: cannot be written ({problem.strerror})") from None
