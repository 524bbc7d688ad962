"""A data directory's figures as text."""

from collections.abc import Iterator, Sequence
from statistics import median

from checkup.folder import FileReport, FolderReport
from checkup.oddities import DIMENSIONS


def folder_table(folder: FolderReport) -> Iterator[str]:
    """The lines of the two tables of a folder: its files, and the actions in them."""
    names = ("file", *(file.path.name for file in folder.files))
    figures = [FILE_HEADINGS, *(_file_row(number, folder) for number in range(len(folder.files)))]
    yield str(folder.directory)
    yield from (f"{line}  {name}" for line, name in zip(_aligned(figures), names, strict=True))
    yield ""
    yield "least and largest of each action dimension; = where it is the same in all steps"
    yield from _aligned([("", *DIMENSIONS), *(_action_row(number, file) for number, file in enumerate(folder.files))])


FILE_HEADINGS = (
    "", "demos", "steps", "shortest", "median", "longest", "pixels", "drawn every", "obs recorded", "gripper", "no-ops",
    "clipped", "bad pictures", "copies", "language", "errors", "warnings",
)  # fmt: skip


def _file_row(number: int, folder: FolderReport) -> tuple[str, ...]:
    file = folder.files[number]
    lengths = file.lengths
    spread = (str(min(lengths)), f"{median(lengths):g}", str(max(lengths))) if lengths else ("-", "-", "-")
    return (
        str(number + 1), str(len(lengths)), f"{sum(lengths):,}", *spread, _listed(file.image_sizes),
        _listed(file.drawn_every), file.alignment, str(file.gripper), f"{file.no_ops:.1%}", f"{file.clipped:.1%}",
        str(file.num_bad_pictures), str(folder.num_copies(file)), "yes" if file.has_language else "no",
        str(len(file.errors)), str(len(file.warnings)),
    )  # fmt: skip


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers)) or "-"


def _action_row(number: int, file: FileReport) -> tuple[str, ...]:
    if file.actions is None:
        return (str(number + 1), *("-" for _ in DIMENSIONS))
    ranges = zip(*file.actions.tolist(), strict=True)
    return (str(number + 1), *(f"= {low:.2f}" if low == high else f"{low:.2f} {high:.2f}" for low, high in ranges))


def _aligned(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """Columns as wide as their widest cell, all to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
