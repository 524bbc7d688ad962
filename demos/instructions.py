"""Which task an HDF5 file is of: its instruction, from the file's name and attributes, in one spelling.

A task is a file: libero_90 has 28 tasks, in different scenes, that share 12 instructions.
"""

import functools
import re
from pathlib import Path

import h5py

from demos.hdf5_errors import text_attribute
from errors import BadInput

# What LIBERO's own file names and BDDL files differ in: "pick up the black bowl in the top drawer of the cabinet" is
# "Pick the akita black bowl in the top layer of the drawer".
UNTOLD = {"the", "a", "an", "it", "them", "and", "of", "on", "in", "at", "to", "up", "inside", "akita", "compartment"}
SAME_WORD = {"layer": "drawer", "cabinet": "drawer", "cookies": "cookie"}
LIBERO_CONTRADICTS_ITSELF = (  # the name and the BDDL file of three of its tasks
    {"open the top drawer and put the bowl inside", "open the top layer of the drawer and put the bowl inside"},
    {"put the middle black bowl on the plate", "put the black bowl in the middle on the plate"},
    {
        "stack the middle black bowl on the back black bowl",
        "stack the black bowl in the middle on the black bowl at the front",
    },
)


def canonical_instruction(text: str) -> str:
    """One spelling for one task: the benchmark says "pick up the X", BDDL files and HDF5 attributes "Pick the X"."""
    text = " ".join(text.lower().replace("_", " ").split()).rstrip(" .")
    return re.sub(r"^pick (?!up\b)", "pick up ", text)


def same_task(first: str, second: str) -> bool:
    """Whether two instructions say the same, LIBERO's own carelessness allowed for."""
    first, second = canonical_instruction(first), canonical_instruction(second)
    told = [[SAME_WORD.get(word, word) for word in text.split() if word not in UNTOLD] for text in (first, second)]
    return told[0] == told[1] or {first, second} in LIBERO_CONTRADICTS_ITSELF


def task_instruction(path: Path, data: h5py.Group) -> str:
    """A file's instruction: from its name as LIBERO does it (without the SCENE prefix of LIBERO-100), or, where the
    name isn't LIBERO's, from the attribute problem_info or the BDDL file's text. LIBERO-PRO's suites with other words
    (_lan) or other goals (_task) keep the names of the suite that they vary: there the BDDL file alone speaks.

    Raises BadInput where the file has none, or two that disagree by more than LIBERO's own do. The attribute
    problem_info alone is no match for a name that has the scene, too: both are named and the name is taken.
    """
    stem, bddl = path.stem, Path(text_attribute(data.attrs, "bddl_file_name", path).replace("\\", "/"))
    in_info = re.search(r'"language_instruction":\s*"([^"]+)"', text_attribute(data.attrs, "problem_info", path))
    in_bddl = re.search(r"\(:language\s+([^)]*)\)", text_attribute(data.attrs, "bddl_file_content", path))
    told = {}
    if stem.endswith("_demo"):
        told["its name"] = _without_scene(stem.removesuffix("_demo"))
    if bddl.parent.name.startswith("libero_"):  # LIBERO's own folders; anyone else's files are named as they like
        told["attribute bddl_file_name"] = _without_scene(bddl.stem)
    if bddl.parent.name.endswith(("_lan", "_task")):
        told = {}
    if in_info:
        told["attribute problem_info"] = in_info.group(1)
    if in_bddl:
        told["attribute bddl_file_content"] = in_bddl.group(1)
    told = {source: canonical_instruction(text) for source, text in told.items()}
    instruction = next(iter(told.values()), "")
    if not instruction:
        raise BadInput(f"{path}: no instruction; expected a file name <task>_demo.hdf5 or data attribute problem_info")
    scenes = {match.group() for name in (stem, bddl.stem) if (match := re.match(r"[A-Z_]*SCENE\d+(?=_)", name))}
    for source, text in told.items():
        if same_task(instruction, text):
            continue
        both = f"{path}: {next(iter(told))} says '{instruction}', but {source} '{text}'"
        if scenes and len(told) == 2 and source == "attribute problem_info":
            # A name with its scene is that of one task of LIBERO-100, whose own attributes are careless.
            _say(f"note: {both}; the name, which has the scene, is taken")
        else:
            raise BadInput(f"{both}; rename the file or correct the attribute, whichever is wrong")
    if len(scenes) > 1:
        raise BadInput(
            f"{path}: attribute bddl_file_name is {bddl.name}, which is of another scene than the file's name"
        )
    return instruction


@functools.cache
def _say(sentence: str) -> None:
    """Once in a process, however often a file is read."""
    print(sentence, flush=True)


def _without_scene(name: str) -> str:
    return re.sub(r"^[A-Z_]*SCENE\d+_", "", name)
