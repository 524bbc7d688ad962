"""LIBERO's HDF5 files -> a LeRobot dataset v3.0.

Episodes are spread over files before the first is written. A run that was interrupted goes on with the first file that
is missing, and ends with the bytes of a run that was not.

Letters: N frames of an episode, H, W picture height and width.
"""

import itertools
import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from config import DataConfig
from demos.frames import source_of
from demos.hdf5 import Demo, demos_of, find_task_files, load_demos
from demos.hdf5_errors import hdf5_problems_named, object_in, open_dataset, open_hdf5, text_attribute
from demos.language import EMBEDDINGS_FILE, load_language
from errors import BadInput
from files import replaced_whole
from lerobot_format.layout import (
    ACTION,
    DATA_MB,
    DATA_PATH,
    EPISODES_PATH,
    FPS,
    INDICES,
    INFO,
    JOINTS,
    KEPT_ATTRIBUTES,
    LANGUAGE,
    PICTURES,
    STATE,
    STATS,
    TASKS,
    TIMESTAMP,
    VECTORS,
    VIDEO_PATH,
    features_of,
    info_of,
    place_of,
)
from lerobot_format.pictures import png_of, resized, turned, written_video
from lerobot_format.statistics import picture_counts, picture_statistics, vector_statistics
from lerobot_format.unfinished import RESULT, becomes_whole, write_json
from observation import CAMERAS, ORIENTATION
from provenance import code_version

LANGUAGE_WIDTH = 512
PICTURE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@dataclass(frozen=True)
class Episode:
    """One demo as an episode: obs[t] of the demo is frame t, as long as an action follows it."""

    number: int
    demo: Demo
    first_frame: int  # of all the dataset's frames
    task_index: int

    def __len__(self) -> int:
        return len(self.demo) - self.demo.lag


class Export:
    """Everything that decides the dataset, and how it is written."""

    def __init__(self, data: DataConfig, pictures: str, with_language: bool, image_size: int | None = None):
        """`pictures` is "image" or "video". With an `image_size` they are made that small.

        Raises BadInput where `load_demos` does, where end-effector poses or embeddings are missing, for pictures that
        would have to grow, and for videos of an odd size, which h264 does not take."""
        demos, self.description = load_demos(_with_what_is_there(data), min_actions=1)
        if thin := next((demo for demo in demos if demo.draw_every > 1), None):
            raise BadInput(
                f"{thin.path}: {thin.key}: has a picture every {thin.draw_every} steps, expected one of each: an "
                "episode of LeRobot has no step without"
            )
        recorded = self.description["image_size"]
        self.pictures, self.image_size = pictures, image_size or recorded
        if not 1 <= self.image_size <= recorded:
            raise BadInput(f"--image_size {image_size}: expected 1 to {recorded}, the pictures' own size")
        if self.description["image_orientation"] != ORIENTATION:
            raise BadInput(
                f"{data.data_directory}: its pictures are said to be {self.description['image_orientation']}, expected "
                f"{ORIENTATION}"
            )
        if pictures == "video" and self.image_size % 2:
            raise BadInput(f"--pictures video: the pictures are {self.image_size} px, expected an even number")
        self.tasks = list(dict.fromkeys(demo.task for demo in demos))
        embeddings = data.folders[0] / EMBEDDINGS_FILE
        self.language = load_language(embeddings, self.tasks, LANGUAGE_WIDTH) if with_language else None
        firsts = itertools.accumulate((len(demo) - demo.lag for demo in demos), initial=0)
        self.episodes = [
            Episode(number, demo, first, self.tasks.index(demo.task))
            for number, (demo, first) in enumerate(zip(demos, firsts, strict=False))
        ]
        self.widths = self._widths()
        self.features = features_of(self.image_size, pictures, self.widths)
        self.shards = self._shards()

    @property
    def num_frames(self) -> int:
        return sum(len(episode) for episode in self.episodes)

    def plan(self) -> dict[str, Any]:
        """What the dataset is made of; a conversion goes on only where it has not changed."""
        return {
            "pictures": self.pictures,
            "language": self.language.encoder if self.language else None,
            "features": self.features,
            "source": [source_of(path, list(of_file)) for path, of_file in self._files()],
            "episodes": [[episode.demo.name, len(episode)] for episode in self.episodes],
        }

    def own_info(self) -> dict[str, Any]:
        """What LeRobot's format has no place for, and an import of this dataset puts back."""
        firsts = itertools.accumulate((len(list(of_file)) for _, of_file in self._files()), initial=0)
        return {
            "pictures": "turned by 180 degrees against the simulator's raw OpenGL rows",
            "action": "pose deltas in [-1, 1] and gripper -1 open, 1 close; taken at the observation beside it",
            "state": "end effector's position in metres and axis-angle in rad, two finger positions in metres",
            "visual_mesh_ratio": self.description["visual_mesh_ratio"],
            "language_encoder": self.language.encoder if self.language else None,
            "code": code_version(),
            "files": [
                {"name": path.name, "first_episode": first, "attributes": _kept_attributes(path)}
                for (path, _), first in zip(self._files(), firsts, strict=False)
            ],
        }

    def write_shard(self, shard: int, folder: Path) -> dict[str, Any]:
        """Writes file number `shard`, and each camera's mp4. Returns its episodes' rows of the table of episodes and
        how often each value occurs in its pictures."""
        place, episodes = place_of(shard), self.shards[shard]
        counts = {feature: np.zeros((3, 256), np.int64) for feature in PICTURES.values()}
        rows = []
        with ExitStack() as open_files:
            videos = {}
            for feature in PICTURES.values() if self.pictures == "video" else ():
                part = open_files.enter_context(
                    replaced_whole(made(folder / VIDEO_PATH.format(video_key=feature, **place)))
                )
                videos[feature] = open_files.enter_context(written_video(part, self.image_size, FPS))
            part = open_files.enter_context(replaced_whole(made(folder / DATA_PATH.format(**place))))
            table = open_files.enter_context(
                pq.ParquetWriter(part, self._schema(), compression="snappy", use_dictionary=self._repeated())
            )
            for episode in episodes:
                vectors, films = self._read(episode)
                columns, statistics = self._columns(episode, vectors)
                for feature, film in films.items():
                    of_episode = picture_counts(film)
                    counts[feature] += of_episode
                    statistics[feature] = picture_statistics(of_episode, len(film))
                    if videos:
                        for picture in film:
                            videos[feature].add(picture)
                    else:
                        columns[feature] = pa.array(
                            [
                                {"bytes": png_of(picture), "path": f"frame-{t:06d}.png"}
                                for t, picture in enumerate(film)
                            ],
                            PICTURE,
                        )
                schema = self._schema()
                table.write_table(pa.table([columns[name] for name in schema.names], schema=schema))
                rows.append(self._row(episode, place, episodes[0].first_frame, statistics))
        return {"episodes": rows, "counts": {feature: of_feature.tolist() for feature, of_feature in counts.items()}}

    def write_meta(self, folder: Path, shards: list[dict[str, Any]]) -> None:
        """All of meta/, from what `write_shard` returned for each file."""
        rows = [row for shard in shards for row in shard["episodes"]]
        pq.write_table(pa.Table.from_pylist(rows), made(folder / EPISODES_PATH.format(**place_of(0))))
        pq.write_table(tasks_table(self.tasks), made(folder / TASKS))
        statistics = {
            feature: picture_statistics(np.sum([shard["counts"][feature] for shard in shards], axis=0), self.num_frames)
            for feature in PICTURES.values()
        }
        files = [folder / DATA_PATH.format(**place_of(shard)) for shard in range(len(shards))]
        for feature in (*self.widths, TIMESTAMP, *INDICES):
            columns = [pq.read_table(file, columns=[feature])[feature] for file in files]
            values = np.concatenate([plain_values(column) for column in columns])
            statistics[feature] = vector_statistics(values.reshape(self.num_frames, -1))
        write_json(folder / STATS, statistics)
        lengths = [len(episode) for episode in self.episodes]
        write_json(folder / INFO, info_of(self.features, lengths, len(self.tasks), self.own_info()))

    # ------------------------------------------------------------------------------------------------- what it is of

    def _files(self):
        """The HDF5 files in order, each with an iterator over its demos."""
        return itertools.groupby((episode.demo for episode in self.episodes), key=lambda demo: demo.path)

    def _widths(self) -> dict[str, int]:
        demo = self.episodes[0].demo
        with open_hdf5(demo.path) as file:
            has_joints = "joint_states" in file["data"][demo.key]["obs"]
        widths = {STATE: 8} | ({JOINTS: 7} if has_joints else {})
        widths |= {feature: 2 for feature in VECTORS if feature not in (STATE, JOINTS)} | {ACTION: 7}
        return widths | ({LANGUAGE: LANGUAGE_WIDTH} if self.language else {})

    def _shards(self) -> list[list[Episode]]:
        """Episodes in order, as many to a file as keep its pictures below DATA_MB before they are compressed."""
        frames_of_file = DATA_MB * 2**20 // (len(CAMERAS) * self.image_size**2 * 3)
        shards: list[list[Episode]] = []
        for episode in self.episodes:
            if not shards or sum(map(len, shards[-1])) + len(episode) > frames_of_file:
                shards.append([])
            shards[-1].append(episode)
        return shards

    def _schema(self) -> pa.Schema:
        fields = [(feature, PICTURE) for feature in PICTURES.values()] if self.pictures == "image" else []
        fields += [(feature, pa.list_(pa.float32(), width)) for feature, width in self.widths.items()]
        return pa.schema([*fields, (TIMESTAMP, pa.float32()), *((name, pa.int64()) for name in INDICES)])

    def _repeated(self) -> list[str]:
        """Columns that hold the same again and again, by their names inside the file."""
        return [f"{LANGUAGE}.list.element", *INDICES]

    # ------------------------------------------------------------------------------------------------------ episodes

    def _read(self, episode: Episode) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """The episode's vectors (N, D) float32 and its pictures (N, H, W, 3) as LeRobot has them, both by feature."""
        demo, steps = episode.demo, len(episode)
        with open_hdf5(demo.path) as file, hdf5_problems_named(demo.path, demo.key):
            group = file["data"][demo.key]
            vectors = {
                feature: np.concatenate([_values(demo, group, f"obs/{key}") for key in VECTORS[feature]], axis=1)[
                    :steps
                ]
                for feature in self.widths
                if feature in VECTORS
            }
            films = {
                feature: turned(resized(group["obs"][camera][:steps], self.image_size))
                for camera, feature in PICTURES.items()
            }
        vectors[ACTION] = demo.actions.numpy()[demo.lag :]
        if self.language:
            vectors[LANGUAGE] = np.tile(self.language[demo.task].numpy(), (steps, 1))
        for feature, values in vectors.items():
            if values.shape != (steps, self.widths[feature]):
                raise BadInput(
                    f"{demo.path}: {demo.key}: {feature} has shape {values.shape} from its keys "
                    f"{', '.join(VECTORS[feature])}, expected {(steps, self.widths[feature])}"
                )
        return vectors, films

    def _columns(self, episode: Episode, vectors: dict[str, np.ndarray]) -> tuple[dict[str, pa.Array], dict[str, dict]]:
        """The episode's columns but for pictures, and the statistics of each."""
        frames = np.arange(len(episode))
        scalars: dict[str, np.ndarray] = {
            TIMESTAMP: (frames / FPS).astype(np.float32),
            "frame_index": frames,
            "episode_index": np.full(len(episode), episode.number),
            "index": episode.first_frame + frames,
            "task_index": np.full(len(episode), episode.task_index),
        }
        columns = {name: pa.array(values) for name, values in scalars.items()}
        for feature, values in vectors.items():
            flat = pa.array(np.ascontiguousarray(values).reshape(-1))
            columns[feature] = pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
        statistics = {name: vector_statistics(values) for name, values in vectors.items()}
        statistics |= {name: vector_statistics(values[:, None]) for name, values in scalars.items()}
        return columns, statistics

    def _row(self, episode: Episode, place: dict[str, int], first_of_file: int, statistics: dict) -> dict[str, Any]:
        """The episode's row of meta/episodes."""
        begin, end = episode.first_frame, episode.first_frame + len(episode)
        row: dict[str, Any] = {
            "episode_index": episode.number,
            "tasks": [episode.demo.task],
            "length": len(episode),
            "dataset_from_index": begin,
            "dataset_to_index": end,
        }
        row |= {f"data/{name}": number for name, number in place.items()}
        row |= {f"meta/episodes/{name}": number for name, number in place_of(0).items()}
        for feature in PICTURES.values() if self.pictures == "video" else ():
            row |= {f"videos/{feature}/{name}": number for name, number in place.items()}
            row[f"videos/{feature}/from_timestamp"] = (begin - first_of_file) / FPS
            row[f"videos/{feature}/to_timestamp"] = (end - first_of_file) / FPS
        for feature, of_feature in statistics.items():
            row |= {f"stats/{feature}/{name}": value for name, value in of_feature.items()}
        return row


def export(data: DataConfig, out: Path, pictures: str, with_language: bool, image_size: int | None = None) -> Export:
    """Writes the dataset `out` from a data directory and returns what it is of. Raises BadInput as `Export` and
    `becomes_whole` do."""
    work = Export(data, pictures, with_language, image_size)
    with becomes_whole(out, work.plan()) as folder, tqdm(total=work.num_frames, unit="frame", desc="exporting") as bar:
        (folder / "finished").mkdir(exist_ok=True)
        shards = []
        for number, episodes in enumerate(work.shards):
            finished = folder / f"finished/{number:05d}.json"
            if not finished.exists():
                write_json(finished, work.write_shard(number, folder / RESULT))
            shards.append(json.loads(finished.read_text()))
            bar.update(sum(map(len, episodes)))
        work.write_meta(folder / RESULT, shards)
    return work


def _with_what_is_there(data: DataConfig) -> DataConfig:
    """Files without joint angles, as an import may have made them, are read as those of the end effector."""
    path = find_task_files(data.folders[0])[0]
    with open_hdf5(path) as file:
        group, keys = demos_of(path, file)
        obs = object_in(path, keys[0], group, keys[0], h5py.Group).get("obs", {})
        return data if "joint_states" in obs else replace(data, robot_state="end_effector")


def _values(demo: Demo, group: h5py.Group, name: str) -> np.ndarray:
    """A demo's dataset as (T, D) float32."""
    values = open_dataset(demo.path, demo.key, group, name)[()].astype(np.float32)
    if values.ndim != 2 or not np.isfinite(values).all():
        raise BadInput(f"{demo.path}: {demo.key}: key {name} is {values.shape} or not finite, expected finite (T, D)")
    return values


def _kept_attributes(path: Path) -> dict[str, str]:
    with open_hdf5(path) as file:
        found = {name: text_attribute(file["data"].attrs, name, path) for name in KEPT_ATTRIBUTES}
    return {name: text for name, text in found.items() if text}


def made(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def plain_values(column: pa.ChunkedArray) -> np.ndarray:
    """A column of numbers, or of lists of them, end to end."""
    array = column.combine_chunks()
    return array.to_numpy() if pa.types.is_primitive(array.type) else array.flatten().to_numpy()


def tasks_table(tasks: Sequence[str]) -> pa.Table:
    """meta/tasks.parquet. LeRobot reads the task from pandas' index, a column that pandas' own metadata names."""
    kinds = {"task_index": ("int64", "int64"), "task": ("unicode", "object")}
    columns = [
        {"name": name, "field_name": name, "pandas_type": of_pandas, "numpy_type": of_numpy, "metadata": None}
        for name, (of_pandas, of_numpy) in kinds.items()
    ]
    pandas = {"index_columns": ["task"], "column_indexes": [], "columns": columns, "pandas_version": "2.2.0"}
    table = pa.table({"task_index": pa.array(range(len(tasks)), pa.int64()), "task": pa.array(tasks, pa.string())})
    return table.replace_schema_metadata({b"pandas": json.dumps(pandas).encode()})
