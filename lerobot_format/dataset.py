"""A LeRobot dataset v3.0 or v2.1 on disk, read without LeRobot: what it says about itself is checked before it is used.

v3.0 keeps many episodes in a file and says in meta/episodes where each begins; v2.1 has a file an episode, named by its
number, and meta/episodes.jsonl. Paths come from info.json's templates. They may only fill in the numbers and the
video's name, and they may not leave the dataset's folder.

Letters: N frames of an episode, D numbers of a feature, H, W picture height and width.
"""

import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from errors import BadInput
from lerobot_format.layout import INFO
from lerobot_format.pictures import LARGEST_SIDE, decoded_png, decoded_video

LARGEST_JSON = 256 * 2**20  # bytes
LONGEST_EPISODE = 100_000  # frames: more than an hour at 20 Hz
PARQUET_ERRORS = (pa.ArrowException, OSError, ValueError)  # pyarrow's own, the system's, and those of bad metadata


@dataclass(frozen=True)
class EpisodePlace:
    """One episode: its task and where its rows and frames are."""

    number: int
    tasks: tuple[str, ...]
    length: int  # N
    data: Path
    first_row: int  # in the file `data`
    videos: dict[str, tuple[Path, float]] = field(default_factory=dict)  # feature -> mp4, where it begins in seconds


class LeRobotDataset:
    """A dataset's metadata, and its episodes' values and pictures."""

    def __init__(self, root: Path):
        """Raises BadInput where `root` is no dataset of these versions or its metadata contradicts itself."""
        self.root = root
        if not (root / INFO).is_file():
            raise BadInput(f"{root}: no LeRobot dataset, expected {INFO} in it")
        self.info = _object(root / INFO, _read_json(root / INFO))
        self.version = str(self._info("codebase_version", str))
        if not self.version.startswith(("v3.", "v2.0", "v2.1")):
            raise BadInput(f"{root / INFO}: codebase_version is {self.version!r}, expected v3.0 or v2.1")
        self.fps = float(self._info("fps", int, float))
        if not 0 < self.fps <= 1000:
            raise BadInput(f"{root / INFO}: fps is {self.fps:g}, expected 0 to 1000")
        self.features = {
            name: _object(f"{root / INFO}: feature {name}", of_feature)
            for name, of_feature in _object(f"{root / INFO}: features", self._info("features", dict)).items()
        }
        self.episodes = self._episodes_v3() if self.version.startswith("v3.") else self._episodes_v2()
        # By columns: what was read last, in which the next episode often is, too.
        self._tables: dict[tuple[str, ...], tuple[Any, pa.Table]] = {}
        if not self.episodes:
            raise BadInput(f"{root}: has no episodes")
        total = self.info.get("total_episodes", len(self.episodes))
        if total != len(self.episodes):
            raise BadInput(f"{root}: {INFO} says {total} episodes, but meta has {len(self.episodes)}")

    def width(self, feature: str) -> int:
        """Numbers of a feature. Raises BadInput for one that the dataset lacks, or that is no vector."""
        shape, dtype = self._feature(feature).get("shape"), self._feature(feature).get("dtype")
        if dtype in ("image", "video", "string") or not isinstance(shape, list) or len(shape) != 1:
            raise BadInput(f"{self.root}: feature {feature} is {dtype} {shape}, expected one vector a frame")
        return int(shape[0])

    def is_picture(self, feature: str) -> bool:
        return self._feature(feature).get("dtype") in ("image", "video")

    def vectors(self, episode: EpisodePlace, features: list[str]) -> dict[str, np.ndarray]:
        """The episode's values of these features, (N, D) float32 each."""
        table = self._rows(episode, [*features, "episode_index"])
        if not np.array_equal(table["episode_index"].to_numpy(), np.full(episode.length, episode.number)):
            raise BadInput(
                f"{episode.data}: rows {episode.first_row} to {episode.first_row + episode.length - 1} are not episode "
                f"{episode.number} alone, as meta says"
            )
        return {feature: self._values(episode, feature, table[feature]) for feature in features}

    def pictures(self, episode: EpisodePlace, feature: str) -> Iterator[np.ndarray]:
        """The episode's N pictures, (H, W, 3) uint8 each, as stored."""
        if self._feature(feature)["dtype"] == "video":
            path, begin = episode.videos[feature]
            yield from decoded_video(path, begin, episode.length, self.fps, f"episode {episode.number}")
            return
        column = self._rows(episode, [feature])[feature].combine_chunks()
        if not pa.types.is_struct(column.type) or column.type.get_field_index("bytes") < 0:
            raise BadInput(f"{episode.data}: column {feature} is {column.type}, expected pictures with their bytes")
        for t, content in enumerate(column.field("bytes")):
            yield decoded_png(content.as_py(), f"{episode.data}: episode {episode.number}: {feature} of frame {t}")

    # ---------------------------------------------------------------------------------------------------------- meta

    def _info(self, key: str, *kinds: type) -> Any:
        value = self.info.get(key)
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise BadInput(f"{self.root / INFO}: {key} is {value!r}, expected {' or '.join(k.__name__ for k in kinds)}")
        return value

    def _feature(self, name: str) -> dict[str, Any]:
        if name not in self.features:
            raise BadInput(f"{self.root}: has no feature {name}; it has {', '.join(self.features)}")
        return self.features[name]

    @property
    def _video_features(self) -> list[str]:
        return [name for name, feature in self.features.items() if feature.get("dtype") == "video"]

    def _episodes_v3(self) -> list[EpisodePlace]:
        files = sorted((self.root / "meta/episodes").glob("*/*.parquet"))
        if not files:
            raise BadInput(f"{self.root}: no meta/episodes/*/*.parquet, which v3.0 has")
        per_video = ("chunk_index", "file_index", "from_timestamp")
        wanted = ["episode_index", "tasks", "length", "dataset_from_index", "data/chunk_index", "data/file_index"]
        wanted += [f"videos/{name}/{part}" for name in self._video_features for part in per_video]
        rows: list[dict] = []
        for file in files:
            rows += _read_table(file, wanted).to_pylist()
        firsts: dict[Path, int] = {}  # the dataset's number of each data file's first row
        places = []
        for row in rows:
            place = _numbers(files[0], row, "data/")
            data = self._path("data_path", **place)
            firsts[data] = min(firsts.get(data, row["dataset_from_index"]), row["dataset_from_index"])
            places.append((row, data))
        return self._in_order(
            EpisodePlace(
                row["episode_index"],
                tuple(row["tasks"] or ()),
                row["length"],
                data,
                row["dataset_from_index"] - firsts[data],
                {
                    name: (
                        self._path("video_path", video_key=name, **_numbers(files[0], row, f"videos/{name}/")),
                        float(row[f"videos/{name}/from_timestamp"]),
                    )
                    for name in self._video_features
                },
            )
            for row, data in places
        )

    def _episodes_v2(self) -> list[EpisodePlace]:
        path = self.root / "meta/episodes.jsonl"
        per_chunk = int(self._info("chunks_size", int))
        if per_chunk < 1:
            raise BadInput(f"{self.root / INFO}: chunks_size is {per_chunk}, expected at least 1")
        episodes = []
        for line in _read_text(path).splitlines():
            row = _object(path, _parsed(path, line)) if line.strip() else {}
            if not row:
                continue
            number, tasks, length = row.get("episode_index"), row.get("tasks"), row.get("length")
            if not isinstance(number, int) or not isinstance(length, int) or not isinstance(tasks, list) or number < 0:
                raise BadInput(f"{path}: a line is {line[:80]!r}, expected episode_index, tasks and length")
            numbers = {"episode_chunk": number // per_chunk, "episode_index": number}
            videos = {name: (self._path("video_path", video_key=name, **numbers), 0.0) for name in self._video_features}
            data = self._path("data_path", **numbers)
            episodes.append(EpisodePlace(number, tuple(map(str, tasks)), length, data, 0, videos))
        return self._in_order(episodes)

    def _in_order(self, episodes: Iterator[EpisodePlace] | list[EpisodePlace]) -> list[EpisodePlace]:
        ordered = sorted(episodes, key=lambda episode: episode.number)
        for first, second in itertools.pairwise(ordered):
            if first.number == second.number:
                raise BadInput(f"{self.root}: meta has episode {first.number} twice")
        for episode in ordered:
            if not 1 <= episode.length <= LONGEST_EPISODE:
                raise BadInput(
                    f"{self.root}: episode {episode.number} has {episode.length} frames, expected 1 to "
                    f"{LONGEST_EPISODE}"
                )
            if not episode.tasks or not episode.tasks[0].strip():
                raise BadInput(f"{self.root}: episode {episode.number} has no task, expected its instruction")
        return ordered

    def _path(self, key: str, **values: str | int) -> Path:
        """A file of the dataset by its template in info.json, filled in with plain numbers and a name alone: Python's
        own format would follow attributes and pad without bounds."""

        def filled(match: re.Match) -> str:
            name, width = match.group(1), match.group(2)
            if name not in values:
                raise BadInput(f"{self.root / INFO}: {key} names {{{name}}}, expected {', '.join(values)}")
            return str(values[name]).zfill(int(width or 0))

        template = str(self._info(key, str))
        text = re.sub(r"\{(\w+)(?::0?(\d{1,2})d)?\}", filled, template)
        if "{" in text or "\0" in text or PurePosixPath(text).is_absolute() or ".." in re.split(r"[/\\]", text):
            raise BadInput(
                f"{self.root / INFO}: {key} is {template!r}, which leaves the dataset or is no template of it"
            )
        return self.root / text

    # ---------------------------------------------------------------------------------------------------------- rows

    def _rows(self, episode: EpisodePlace, columns: list[str]) -> pa.Table:
        """The episode's rows. What was read of the file, whole row groups, is kept for the next episode."""
        try:
            if not episode.data.is_file():
                raise BadInput(f"{episode.data}: is missing, episode {episode.number} should be in it")
            with pq.ParquetFile(episode.data) as file:
                lacks = sorted(set(columns) - set(file.schema_arrow.names))
                if lacks:
                    raise BadInput(
                        f"{episode.data}: has no column {lacks[0]}; it has {_listed(file.schema_arrow.names)}"
                    )
                sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
                ends = np.cumsum([0, *sizes])
                begin, end = episode.first_row, episode.first_row + episode.length
                if end > ends[-1]:
                    raise BadInput(
                        f"{episode.data}: has {ends[-1]} rows, but episode {episode.number} should end at row {end - 1}"
                    )
                groups = [g for g in range(len(sizes)) if ends[g] < end and ends[g + 1] > begin]
                place, kept = (episode.data, groups), self._tables.get(tuple(columns))
                if kept is None or kept[0] != place:
                    kept = place, file.read_row_groups(groups, columns=columns)
                    self._tables[tuple(columns)] = kept
                return kept[1].slice(begin - int(ends[groups[0]]), episode.length)
        except PARQUET_ERRORS as problem:
            raise BadInput(f"{episode.data}: cannot be read as parquet ({_one_line(problem)})") from None

    def _values(self, episode: EpisodePlace, feature: str, column: pa.ChunkedArray) -> np.ndarray:
        """A column as (N, D) float32."""
        where = f"{episode.data}: episode {episode.number}: {feature}"
        array, width = column.combine_chunks(), self.width(feature)
        if (
            pa.types.is_list(array.type)
            or pa.types.is_large_list(array.type)
            or pa.types.is_fixed_size_list(array.type)
        ):
            counted = array.value_lengths().to_numpy(zero_copy_only=False)
            if array.null_count or (counted != width).any():
                raise BadInput(f"{where} has lists of other lengths than {width}, which {INFO} says")
            array = array.flatten()
        numeric = pa.types.is_floating(array.type) or pa.types.is_integer(array.type) or pa.types.is_boolean(array.type)
        if not numeric or array.null_count or len(array) != episode.length * width:
            raise BadInput(f"{where} is {column.type}, expected {width} numbers a frame, none of them missing")
        values = array.to_numpy(zero_copy_only=False).astype(np.float32).reshape(episode.length, width)
        if not np.isfinite(values).all():
            raise BadInput(f"{where} holds NaN or infinite values in frame {np.argwhere(~np.isfinite(values))[0][0]}")
        return values

    def size_of_pictures(self, feature: str) -> int:
        """Side of a feature's square pictures in pixels, as info.json has it. Raises BadInput for others."""
        shape = self._feature(feature).get("shape")
        sides = [side for side in shape if side != 3] if isinstance(shape, list) else []
        if (
            not self.is_picture(feature)
            or len(sides) != 2
            or sides[0] != sides[1]
            or not 16 <= sides[0] <= LARGEST_SIDE
        ):
            raise BadInput(
                f"{self.root}: feature {feature} is {self._feature(feature).get('dtype')} {shape}, expected square "
                f"pictures of 16 to {LARGEST_SIDE} px with 3 channels"
            )
        return int(sides[0])


def _read_text(path: Path) -> str:
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise BadInput(f"{path}: has {path.stat().st_size:,} bytes, expected at most {LARGEST_JSON:,}")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise BadInput(f"{path}: cannot be read ({_one_line(problem)})") from None


def _parsed(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as problem:
        raise BadInput(f"{path}: is no JSON ({_one_line(problem)})") from None


def _read_json(path: Path) -> Any:
    return _parsed(path, _read_text(path))


def _object(where: object, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadInput(f"{where}: is {type(value).__name__}, expected an object with keys")
    return value


def _read_table(path: Path, columns: list[str]) -> pa.Table:
    """Columns of a small parquet file of meta/, without missing values."""
    try:
        with pq.ParquetFile(path) as file:
            lacks = [name for name in columns if name not in file.schema_arrow.names]
            if lacks:
                raise BadInput(f"{path}: has no column {lacks[0]}, which v3.0 has")
            table = file.read(columns=columns)
    except PARQUET_ERRORS as problem:
        raise BadInput(f"{path}: cannot be read as parquet ({_one_line(problem)})") from None
    for name in columns:
        kind = table[name].type
        expected = "text" if name == "tasks" else "seconds" if name.endswith("timestamp") else "whole numbers"
        fits = {
            "text": pa.types.is_list(kind) and pa.types.is_string(kind.value_type),
            "seconds": pa.types.is_floating(kind),
            "whole numbers": pa.types.is_integer(kind),
        }[expected]
        if table[name].null_count or not fits:
            raise BadInput(f"{path}: column {name} is {kind} or has gaps, expected {expected}")
    return table


def _numbers(path: Path, row: dict, prefix: str) -> dict[str, int]:
    numbers = {name: row[prefix + name] for name in ("chunk_index", "file_index")}
    if min(numbers.values()) < 0:
        raise BadInput(f"{path}: {prefix}{min(numbers, key=lambda name: numbers[name])} is negative")
    return numbers


def _listed(names: list[str]) -> str:
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")


def _one_line(problem: BaseException) -> str:
    return (str(problem).strip() or type(problem).__name__).splitlines()[0]
