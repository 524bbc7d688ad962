"""meta/stats.json and the statistics of each episode, as LeRobot's trainers read them.

Pictures are counted exactly, as how often each of the 256 values occurs in each channel: such counts add up over
episodes, and all statistics follow from them.

Letters: N frames, D numbers of a feature.
"""

import numpy as np

QUANTILES = (1, 10, 50, 90, 99)  # per cent


def vector_statistics(values: np.ndarray) -> dict[str, list]:
    """values (N, D) -> min, max, mean, std and quantiles, D numbers each, and count [N]."""
    values = values.astype(np.float64)
    found = {
        "min": values.min(axis=0),
        "max": values.max(axis=0),
        "mean": values.mean(axis=0),
        "std": values.std(axis=0),
    }
    quantiles = np.percentile(values, QUANTILES, axis=0)
    found |= {f"q{percent:02d}": of_percent for percent, of_percent in zip(QUANTILES, quantiles, strict=True)}
    return {name: of_feature.tolist() for name, of_feature in found.items()} | {"count": [len(values)]}


def picture_counts(pictures: np.ndarray) -> np.ndarray:
    """pictures (N, H, W, 3) uint8 -> how often each value occurs in each channel, (3, 256) int64."""
    return np.stack([np.bincount(pictures[..., channel].ravel(), minlength=256) for channel in range(3)])


def picture_statistics(counts: np.ndarray, num_frames: int) -> dict[str, list]:
    """counts (3, 256) of `picture_counts` -> the same statistics in 0..1, (3, 1, 1) each."""
    levels = np.arange(256) / 255
    share = counts / counts.sum(axis=1, keepdims=True)
    mean = share @ levels
    std = np.sqrt(np.maximum((share * (levels - mean[:, None]) ** 2).sum(axis=1), 0))
    below = share.cumsum(axis=1)
    found = {
        "min": levels[(counts > 0).argmax(axis=1)],
        "max": levels[255 - (counts[:, ::-1] > 0).argmax(axis=1)],
        "mean": mean,
        "std": std,
    }
    for percent in QUANTILES:
        found[f"q{percent:02d}"] = levels[(below >= percent / 100 - 1e-12).argmax(axis=1)]
    return {name: value.reshape(3, 1, 1).tolist() for name, value in found.items()} | {"count": [num_frames]}
