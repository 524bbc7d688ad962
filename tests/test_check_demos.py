"""The doctor for data: each kind of damaged or odd demonstrations is named, and what it calls an error is exactly what
training refuses."""

import os
import re
import shutil
import sys
from pathlib import Path

import h5py
import matplotlib.image
import numpy as np
import pytest
from broken_demos import BROKEN, close_the_fingers, damage, replace, settings, verdict, write_embeddings
from helpers import INSTRUCTION
from libero_files import TASK, write_task_file

import check_demos
from checkup.folder import examine
from demos.language import EMBEDDINGS_FILE
from observation import CAMERAS

BUTTER = "pick_up_the_butter_and_place_it_in_the_basket"
STEPS, DEMOS = 30, 3


@pytest.fixture(scope="module")
def good_file(tmp_path_factory) -> Path:
    path = write_task_file(tmp_path_factory.mktemp("good"))
    close_the_fingers(path)
    write_embeddings(path.parent)
    return path


@pytest.fixture
def file(good_file, tmp_path) -> Path:
    """A file with nothing wrong in a folder of its own, to be damaged."""
    shutil.copytree(good_file.parent, tmp_path / "data")
    return tmp_path / "data" / good_file.name


def matching(sentences: list[str], pattern: str) -> list[str]:
    return [sentence for sentence in sentences if re.search(pattern, sentence)]


# ------------------------------------------------------------------------------------------------ one demo is broken


def in_all(change) -> object:
    """A change to a demo, as one to each demo of a file."""

    def apply(path: Path) -> None:
        with h5py.File(path, "a") as file:
            for demo in file["data"].values():
                change(demo)

    return apply


def in_file(change) -> object:
    """A change to an open file."""

    def apply(path: Path) -> None:
        with h5py.File(path, "a") as file:
            change(file)

    return apply


def in_one(change) -> object:
    """A change to demo_1."""
    return in_file(lambda file: change(file["data/demo_1"]))


def drop(name: str):
    return lambda demo: demo.__delitem__(name)


def film(demo: h5py.Group, camera: str = "agentview_rgb") -> h5py.Dataset:
    return demo["obs"][camera]


def sixteen_bit(demo: h5py.Group) -> None:
    replace(demo, "obs/agentview_rgb", film(demo)[()].astype(np.uint16))


BROKEN_DEMO = {  # what was done to demo_1 -> (how, what the sentence must say), beside what broken_demos.py has
    "no steps": (lambda d: replace(d, "actions", np.zeros((0, 7))), "has 0 steps, expected at least 2"),
    "one step": (lambda d: replace(d, "actions", np.zeros((1, 7))), "has 1 steps, expected at least 2"),
    "a number for actions": (lambda d: replace(d, "actions", 3.0), r"key actions has shape \(\), expected \(T, 7\)"),
    "flat actions": (lambda d: replace(d, "actions", np.zeros(30)), r"key actions has shape \(30,\), expected"),
    "complex actions": (lambda d: replace(d, "actions", np.zeros((30, 7), complex)), "holds no array of numbers"),
    "actions of records": (lambda d: replace(d, "actions", np.zeros((30, 7), "f8,f8")), "holds no array of numbers"),
    "actions without a shape": (lambda d: replace(d, "actions", h5py.Empty("f8")), "holds no array of numbers"),
    "no actions": (drop("actions"), "key actions is missing"),
    "an infinite action": (lambda d: d["actions"].__setitem__((3, 2), np.inf), "key actions holds NaN or"),
    "a gripper between": (lambda d: d["actions"].__setitem__((3, 6), 0.25), r"gripper values \[-1.0, 0.25, 1.0\]"),
    "a damaged chunk of actions": (lambda d: damage(d, "actions"), "demo_1: .*filter returned failure"),
    "no obs": (drop("obs"), "key obs/joint_states is missing"),
    "no joints": (drop("obs/joint_states"), "key obs/joint_states is missing"),
    "joints of fewer steps": (
        lambda d: replace(d, "obs/joint_states", d["obs/joint_states"][:29]),
        r"key obs/joint_states has shape \(29, 7\), expected \(30, 7\)",
    ),
    "grey pictures": (lambda d: replace(d, "obs/agentview_rgb", film(d)[..., 0]), r"is uint8 \(30, 32, 32\), expected"),
    "four channels": (
        lambda d: replace(d, "obs/agentview_rgb", np.ones((30, 32, 32, 4), np.uint8)),
        r"is uint8 \(30, 32, 32, 4\), expected",
    ),
    "pictures of sixteen bits": (sixteen_bit, r"is uint16 \(30, 32, 32, 3\), expected uint8"),
    "pictures of no size": (
        lambda d: replace(d, "obs/agentview_rgb", np.ones((30, 0, 0, 3), np.uint8)),
        r"has shape \(30, 0, 0, 3\), expected square images",
    ),
    "oblong pictures": (
        lambda d: replace(d, "obs/agentview_rgb", film(d)[:, :16]),
        r"has shape \(30, 16, 32, 3\), expected square images",
    ),
    "a picture too few": (lambda d: replace(d, "obs/agentview_rgb", film(d)[:29]), r"is uint8 \(29, 32, 32, 3\)"),
    "a black picture on the way": (lambda d: film(d).__setitem__(7, 0), "the picture of step 7 is all black"),
    "a camera frozen for a while": (
        lambda d: film(d).__setitem__(slice(3, 12), film(d)[3]),
        "the pictures of steps 3 and 11 are the same although the arm moved",
    ),
    "no simulator states": (drop("states"), "key states is missing, so whether .*set data.obs_alignment"),
    "simulator states that are narrow": (
        lambda d: replace(d, "states", np.zeros((30, 5))),
        r"key states is \(30, 5\), so whether",
    ),
    "NaN in the simulator states": (lambda d: d["states"].__setitem__((3, 2), np.nan), "or holds NaN, expected finite"),
    "simulator states of fewer steps": (
        lambda d: replace(d, "states", d["states"][:29]),
        r"key states is \(29, 20\) or holds NaN, expected finite values of 30 steps",
    ),
    "simulator states of another demo": (
        lambda d: d["states"].__setitem__((slice(None), slice(1, 8)), np.random.default_rng(0).normal(0, 1, (30, 7))),
        "fits states neither as recorded before",
    ),
    "a link to a folder": (
        lambda d: replace(d, "actions", h5py.ExternalLink(".", "/x")),
        "file read failed: Is a directory$",
    ),
    "num_samples is NaN": (lambda d: d.attrs.__setitem__("num_samples", np.nan), "num_samples is 'nan', expected"),
}  # fmt: skip


@pytest.mark.parametrize("kind", [*BROKEN, *BROKEN_DEMO])
def test_a_broken_demo_is_named_and_the_others_are_read(file, kind):
    change, sentence = {**BROKEN, **BROKEN_DEMO}[kind]
    in_one(change)(file)
    found = verdict(settings(file.parent))
    assert matching(found.all_errors(), f"^{file}: .*{sentence}"), found.all_errors()
    assert all("demo_0" not in error.split(":")[1] and "demo_2" not in error for error in found.all_errors())
    assert {demo.key for demo in found.files[0].demos} >= {"demo_0", "demo_2"}


# ------------------------------------------------------------------------------------- what is wrong with whole files


def add_copied_file(path: Path) -> None:
    shutil.copy(path, path.with_name(f"{TASK}_demo (1).hdf5"))


def add_file(**options):
    def apply(path: Path) -> None:
        close_the_fingers(write_task_file(path.parent, task=BUTTER, **options))

    return apply


def rename(name: str):
    return lambda path: path.rename(path.with_name(name))


def attribute(name: str, value: object):
    return in_file(lambda file: file["data"].attrs.__setitem__(name, value))


def without_instruction(path: Path) -> None:
    in_file(lambda file: file["data"].attrs.__delitem__("problem_info"))(path)
    path.rename(path.with_name("collected.hdf5"))


def overwritten(start: int, size: int, by: bytes = b"\xff"):
    def apply(path: Path) -> None:
        with path.open("r+b") as stream:
            stream.seek(start)
            stream.write((by * size)[:size])

    return apply


def keep_demos(number: int):
    def change(file: h5py.File) -> None:
        for key in list(file["data"])[number:]:
            del file["data"][key]
        file["data"].attrs["num_demos"] = number

    return in_file(change)


def short(path: Path) -> None:
    path.unlink()
    close_the_fingers(write_task_file(path.parent, steps=9))


def folder_in_place(path: Path) -> None:
    path.unlink()
    path.mkdir()


BROKEN_FILE = {  # what was done to the folder's one file -> (how, what a sentence must say)
    "truncated": (lambda p: os.truncate(p, p.stat().st_size // 2), "it is truncated"),
    "empty": (lambda p: os.truncate(p, 0), "is empty, expected an HDF5 file"),
    "a page of a web server": (lambda p: p.write_text("<!DOCTYPE html>"), "is no HDF5 file, it begins with"),
    "a pointer of Git LFS": (lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
    "its first block overwritten": (overwritten(0, 64), "is no HDF5 file"),
    "its root overwritten": (overwritten(64, 200), f"{TASK}_demo.hdf5: "),
    "a folder of that name": (folder_in_place, "Is a directory"),
    "no data": (in_file(lambda f: f.__delitem__("data")), "holds no group data/demo_0"),
    "a dataset for data": (in_file(lambda f: replace(f, "data", np.zeros(3))), "data is a dataset, expected a group"),
    "no demos": (keep_demos(0), "holds no group data/demo_0"),
    "one demo": (keep_demos(1), "has 1 demo, expected at least 2"),
    "a dataset for a demo": (in_file(lambda f: replace(f, "data/demo_1", np.zeros(3))), "is a dataset, expected a g"),
    "a demo that links to itself": (
        in_file(lambda f: replace(f, "data/demo_1", h5py.SoftLink("/data/demo_1"))),
        "demo_1: its links lead in a circle",
    ),
    "no instruction": (without_instruction, "no instruction; expected a file name"),
    "another task's name": (rename(f"{BUTTER}_demo.hdf5"), "its name says 'pick up the butter .*rename the file or"),
    "a demo twice": (in_file(lambda f: f.copy("data/demo_1", "data/demo_7")), "demo_7 is a copy of demo_1"),
    "a file twice": (add_copied_file, r"demo_2 is a copy of demo_2 in"),
    "demos that are too short": (short, "demo_0: has 9 steps, expected at least 11"),
    "a mesh ratio in words": (attribute("visual_mesh_ratio", "x"), "visual_mesh_ratio is 'x', expected a number"),
    "pictures of two sizes": (add_file(image_size=16), "image_size is 32, but .* has 16; all files"),
    "recorded before and after": (add_file(alignment="before"), "obs_alignment is after, but .* has before; all files"),
    "two orientations": (
        lambda p: [add_file()(p), attribute("macros_image_convention", "opencv")(p)],
        "image_orientation is opencv, but .* has opengl; all files",
    ),
    "meshes thinned in one": (
        lambda p: [add_file()(p), attribute("visual_mesh_ratio", 0.2)(p)],
        r"visual_mesh_ratio is 0\.2, but .* has 1\.0; all files",
    ),
    "no language": (lambda p: p.with_name(EMBEDDINGS_FILE).unlink(), "no language embeddings; run"),
    "other language": (lambda p: write_embeddings(p.parent, "fly"), f"no embedding for the task '{INSTRUCTION}"),
    "language that is no archive": (lambda p: p.with_name(EMBEDDINGS_FILE).write_text("x"), "not readable as language"),
    "language with a damaged header": (
        lambda p: overwritten(p.with_name(EMBEDDINGS_FILE).read_bytes().index(b"descr"), 2, b"'(")(
            p.with_name(EMBEDDINGS_FILE)
        ),
        "not readable as language embeddings",
    ),
    "language of another width": (
        lambda p: np.savez(p.with_name(EMBEDDINGS_FILE), texts=["a"], embeddings=np.ones((1, 7)), encoder="e"),
        r"embeddings are \(1, 7\), expected",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN_FILE)
def test_a_broken_file_is_named(file, kind):
    change, sentence = BROKEN_FILE[kind]
    change(file)
    found = verdict(settings(file.parent))
    assert matching(found.all_errors(), sentence), found.all_errors()
    assert all(str(file.parent) in error for error in found.all_errors())


def test_a_file_of_which_some_demos_were_recorded_otherwise_is_named(file):
    with h5py.File(file, "a") as there:
        demo = there["data/demo_1"]
        demo["obs/joint_states"][...] = demo["states"][:, 1:8]
    found = verdict(settings(file.parent))
    assert matching(found.all_errors(), r"recorded before actions\[t\] in demo_1, but after it in the other 2 demos")


def test_settings_decide_what_is_refused(file):
    assert matching(verdict(settings(file.parent, "data.max_len_data=20")).all_errors(), "max_len_data allows 20")
    assert matching(verdict(settings(file.parent, "model.action_seq_len=30")).all_errors(), "expected at least 31")
    in_all(drop("states"))(file)
    assert len(matching(verdict(settings(file.parent)).all_errors(), "key states is missing")) == DEMOS
    assert verdict(settings(file.parent, "data.obs_alignment=before")).all_errors() == []


# --------------------------------------------------------------------------------------- what is read, and is odd


def some_actions(share: float, value: float):
    return in_all(lambda d: d["actions"].__setitem__((slice(0, round(STEPS * share)), slice(0, 6)), value))


def scaled(name: str, factor: float, columns: slice = slice(None)):
    return in_all(lambda d: d[name].__setitem__((slice(None), columns), d[name][:, columns] * factor))


def in_degrees(path: Path) -> None:
    scaled("obs/joint_states", 57.3)(path)
    scaled("states", 57.3, slice(1, 8))(path)


def jump(demo: h5py.Group) -> None:
    demo["obs/joint_states"][10:] += 1.0
    demo["states"][11:, 1:8] += 1.0


def still_joint(demo: h5py.Group) -> None:
    demo["obs/joint_states"][:, 6] = 0.785
    demo["states"][:, 7] = 0.785


def blocked_hand(demo: h5py.Group) -> None:
    """For 5 of the 30 steps the actions go on, and arm and fingers stay where they are."""
    demo["states"][10:16, 1:8] = demo["states"][10, 1:8]
    demo["obs/joint_states"][9:15] = demo["states"][10, 1:8]
    demo["obs/gripper_states"][9:15] = demo["obs/gripper_states"][9]
    demo["actions"][9:16, 2] = -0.2


ODD = {  # what was done to the folder's one file -> (how, what a warning must say)
    "an inverted gripper": (scaled("actions", -1, slice(6, 7)), "fingers close after the lower gripper command"),
    "fingers with a will of their own": (
        in_all(lambda d: replace(d, "obs/gripper_states", np.random.default_rng(0).uniform(0, 0.04, (STEPS, 2)))),
        "the fingers do not follow the gripper commands",
    ),
    "many no-ops": (some_actions(0.4, 0.0), r"key actions: 3\d% do nothing"),
    "a hand that is blocked": (in_all(blocked_hand), r"in 17% of the steps the hand is blocked .*learns to push on"),
    "clipped actions": (some_actions(0.6, 1.0), "60% of the steps have a pose delta of -1 or 1"),
    "actions in metres": (scaled("actions", 0.05, slice(0, 6)), "no pose delta is above 0.045, .*are they metres"),
    "a rotation that is never used": (scaled("actions", 0, slice(4, 5)), "key actions: ry is 0 in all of its demos"),
    "a gripper that is never used": (
        in_all(lambda d: d["actions"].__setitem__((slice(None), 6), -1.0)),
        "key actions: gripper is -1 in all",
    ),
    "the actions of another demo": (
        in_file(lambda f: f["data/demo_2/actions"].write_direct(f["data/demo_0/actions"][()])),
        "demo_2: key actions is that of demo_0",
    ),
    "a joint that never moves": (in_all(still_joint), "key obs/joint_states: number 6 is the same in all"),
    "joints in degrees": (in_degrees, "key obs/joint_states goes beyond a full turn in demo_0, .*in degrees"),
    "a jump of the arm": (in_one(jump), r"demo_1: key obs/joint_states jumps by .* from step 9 to 10"),
    "fingers in millimetres": (scaled("obs/gripper_states", 1000), r"gripper_states goes beyond 0\.06 in demo_0"),
    "the film of another demo": (
        in_file(lambda f: f["data/demo_2/obs/agentview_rgb"].write_direct(f["data/demo_0/obs/agentview_rgb"][()])),
        "demo_2: key obs/agentview_rgb shows what it shows in demo_0",
    ),
    "dark pictures": (
        in_one(lambda d: film(d).write_direct(film(d)[()] // 32)),
        "demo_1: key obs/agentview_rgb: no pixel is brighter than 7 of 255",
    ),
    "one camera twice": (
        in_one(lambda d: film(d).write_direct(film(d, "eye_in_hand_rgb")[()])),
        "demo_1: both cameras show the same",
    ),
    "a task that was not solved": (
        in_one(lambda d: d.__setitem__("dones", np.zeros(STEPS, np.uint8))),
        "key dones ends with 0 in demo_1, expected 1",
    ),
    "demos of another name": (in_file(lambda f: f.move("data/demo_2", "data/episode_2")), "data holds episode_2"),
    "a group whose name is no text": (in_file(lambda f: f.create_group(b"data/\xff\xfe")), "data holds b'.xff.xfe'"),
    "a count of demos that is wrong": (attribute("num_demos", 50), "num_demos is 50, but there are 3 demos"),
    "a count of demos that is none": (attribute("num_demos", "many"), "num_demos is no number, but there are 3"),
    "another orientation": (attribute("macros_image_convention", "opencv"), "is 'opencv', expected opengl"),
    "a file of another ending": (lambda p: shutil.copy(p, p.with_suffix(".h5")), r"_demo\.h5 is not read"),
    "a file in capitals": (lambda p: shutil.copy(p, p.with_suffix(".HDF5")), r"_demo\.HDF5 is not read"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ODD)
def test_what_training_reads_without_a_word_is_a_warning(file, kind):
    change, sentence = ODD[kind]
    change(file)
    found = verdict(settings(file.parent))
    assert found.all_errors() == []
    assert matching(found.all_warnings(), sentence), found.all_warnings()
    assert all(str(file.parent) in warning for warning in found.all_warnings())


def test_demos_that_a_setting_leaves_out_are_counted(file):
    found = verdict(settings(file.parent, "data.demos_per_task=2"))
    assert found.all_warnings() == [f"{file}: holds 3 demos, of which data.demos_per_task reads 2"]
    assert len(found.files[0].demos) == 2


def openvla(path: Path) -> None:
    path.unlink()
    close_the_fingers(write_task_file(path.parent, official=False, alignment="before"))


def compressed(demo: h5py.Group) -> None:
    values = film(demo)[()]
    del demo["obs/agentview_rgb"]
    demo.create_dataset("obs/agentview_rgb", data=values, chunks=(1, 32, 32, 3), compression="gzip", shuffle=True)


def in_another_file(path: Path) -> None:
    with h5py.File(path, "a") as file, h5py.File(path.with_name("part.data"), "w") as part:
        file.copy("data/demo_1", part, name="it")
        del file["data/demo_1"]
        file["data/demo_1"] = h5py.ExternalLink("part.data", "/it")


def retyped(name: str, dtype: str):
    return in_all(lambda d: replace(d, name, d[name][()].astype(dtype)))


def still(demo: h5py.Group) -> None:
    """The arm hardly moves, and so the camera may show the same."""
    demo["states"][:, 1:8] = demo["states"][0, 1:8] + np.linspace(0, 0.05, STEPS)[:, None]
    demo["obs/joint_states"][:-1] = demo["states"][1:, 1:8]
    demo["obs/joint_states"][-1] = demo["states"][-1, 1:8]
    demo["actions"][:, :6] *= 0.1
    film(demo).write_direct(np.repeat(film(demo)[:1], STEPS, axis=0))


SOUND = {  # what is unusual about the folder's one file and still as it should be
    "nothing": lambda p: None,
    "OpenVLA's variant": openvla,
    "compressed pictures": in_all(compressed),
    "actions of half the width": retyped("actions", "f4"),
    "joints with the other byte order": retyped("obs/joint_states", ">f8"),
    "num_samples in words": in_all(lambda d: d.attrs.__setitem__("num_samples", "30")),
    "attributes as bytes": attribute("macros_image_convention", np.bytes_(b"opengl")),
    "a demo in another file": in_another_file,
    "a name of one's own": rename("collected.hdf5"),
    "a symbolic link": lambda p: [shutil.move(p, p.parent.parent / "x"), p.symlink_to(p.parent.parent / "x")],
    "a hidden file of macOS": lambda p: (p.parent / f"._{p.name}").write_bytes(bytes(400)),
    "other groups in the file": in_file(lambda f: f.create_group("mask")),
    "further keys": in_all(lambda d: d.__setitem__("obs/depth", np.zeros((STEPS, 4)))),
    "solved tasks": in_all(lambda d: d.__setitem__("dones", np.arange(STEPS) == STEPS - 1)),
    "a second task": add_file(),
    "an arm that stands still": in_one(still),
}


@pytest.mark.parametrize("kind", SOUND)
def test_what_is_unusual_and_right_is_read_without_a_word(file, kind):
    SOUND[kind](file)
    found = verdict(settings(file.parent))
    assert (found.all_errors(), found.all_warnings()) == ([], [])


def test_at_least_sixty_kinds_of_damage_and_oddity_are_made():
    assert len(BROKEN) + len(BROKEN_DEMO) + len(BROKEN_FILE) + len(ODD) >= 100


# ----------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def call(monkeypatch, capsys):
    """The command with these arguments -> its exit code, stdout and stderr without progress bars."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["check_demos.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            check_demos.main()
        printed = capsys.readouterr()
        return end.value.code, printed.out, printed.err

    return run


def test_a_sound_folder_has_a_row_of_figures_a_file_and_exit_code_0(file, call):
    add_file(steps=40)(file)
    code, out, _ = call(file.parent)
    assert code == 0
    headings, butter, milk = out.splitlines()[1:4]
    assert " ".join(headings.split()) == (
        "demos steps shortest median longest pixels drawn every obs recorded gripper no-ops clipped bad pictures "
        "copies language errors warnings file"
    )
    expected = "32 1 after as expected 0.0% 0.0% 0 0 yes 0 0"
    assert butter.split() == f"1 3 120 40 40 40 {expected} {BUTTER}_demo.hdf5".split()
    assert milk.split() == f"2 3 90 30 30 30 {expected} {TASK}_demo.hdf5".split()
    assert "2 files, 6 demos, 210 steps: 0 errors, 0 warnings; training reads them" in out
    with h5py.File(file) as there:
        x = np.concatenate([demo["actions"][:, 0] for demo in there["data"].values()])
    assert f"2  {x.min():.2f} {x.max():.2f}  " in out


def test_every_problem_is_told_and_not_the_first_alone(file, call):
    add_file()(file)
    butter = file.with_name(f"{BUTTER}_demo.hdf5")
    with h5py.File(file, "a") as there:
        demos = there["data"]
        demos["demo_0/actions"][3, 2] = 2.5
        demos["demo_0/actions"][:, 6] = (demos["demo_0/actions"][:, 6] + 1) / 2
        del demos["demo_1/obs/eye_in_hand_rgb"]
        demos["demo_1/obs/agentview_rgb"][4] = 0
        demos["demo_2/obs/joint_states"][0, 0] = np.nan
        demos["demo_2"].attrs["num_samples"] = 7
    os.truncate(butter, 1000)
    code, out, _ = call(file.parent)
    assert code == 1
    for sentence in (
        f"error: {file}: demo_0: key actions has a pose delta of size 2.5",
        f"error: {file}: demo_0: key actions has gripper values [0.0, 1.0]",
        f"error: {file}: demo_1: key obs/eye_in_hand_rgb is missing",
        f"error: {file}: demo_1: key obs/agentview_rgb: the picture of step 4 is all black",
        f"error: {file}: demo_2: key obs/joint_states holds NaN",
        f"error: {file}: demo_2: num_samples is 7, but actions has 30 steps",
        f"error: {butter}: it is truncated",
    ):
        assert out.count(sentence) == 1, out
    assert "7 errors" in out and "training would refuse them" in out


@pytest.mark.parametrize(
    "values, inverted, told",
    [("-1/+1", False, "as expected"), ("-1/+1", True, "-1/+1, low closes"), ("0/1", False, "0/1, high closes"),
     ("0/1", True, "0/1, low closes")],
)  # fmt: skip
def test_the_gripper_convention_is_found_from_the_fingers(file, values, inverted, told):
    with h5py.File(file, "a") as there:
        for demo in there["data"].values():
            command = demo["actions"][:, 6] * (-1 if inverted else 1)
            demo["actions"][:, 6] = command if values == "-1/+1" else (command + 1) / 2
    assert str(examine(settings(file.parent)).files[0].gripper) == told


def test_a_copy_in_another_folder_is_a_warning(file, tmp_path, call):
    other = tmp_path / "other"
    shutil.copytree(file.parent, other)
    code, out, _ = call(file.parent, other)
    assert code == 0
    assert out.count(f"warning: {other / file.name}: demo_1 is a copy of demo_1") == 1


def test_a_folder_that_cannot_be_trained_on_with_another_is_a_warning(file, tmp_path, call):
    other = tmp_path / "other"
    other.mkdir()
    path = write_task_file(other, task=BUTTER, alignment="before", image_size=64)
    close_the_fingers(path)
    write_embeddings(other)
    smaller = ("--set", "model.image_size=32")
    assert "0 errors, 0 warnings" in call(file.parent, other, *smaller)[1]  # sizes and alignments may differ
    out = call(file.parent, other)[1]
    assert f"warning: {file.parent}: images are 32 px, those of {other} 64 px; sizes may differ where none is" in out
    write_embeddings(other, encoder="another")
    out = call(file.parent, other, *smaller)[1]
    assert matching(out.splitlines(), f"^warning: {other}.*another")
    attribute("macros_image_convention", "opencv")(path)
    code, out, _ = call(file.parent, other)
    assert code == 0
    assert f"warning: {other}: image_orientation is opencv, but data has opengl; all folders of data.data_dir" in out


def test_an_episode_that_was_recorded_before_and_after_its_actions_is_one(file, tmp_path, call):
    other = tmp_path / "other"
    shutil.copytree(file.parent, other)
    with h5py.File(other / file.name, "a") as there:
        for demo in there["data"].values():
            for name in ("joint_states", "gripper_states", "ee_pos", "ee_ori"):
                after = demo[f"obs/{name}"][()]
                first = demo["states"][:1, 1:8] if name == "joint_states" else after[:1]
                demo[f"obs/{name}"][...] = np.concatenate([first, after[:-1]])
    for folders in ((file.parent, other), (other, file.parent)):
        out = call(*folders)[1]
        assert out.count(" is a copy of demo_") == DEMOS, out
    assert " is a copy of " not in call(other)[1]


END_EFFECTOR = {  # what was done to the folder's one file -> (how, what an error must say, and of how many demos)
    "no joints": (in_all(drop("obs/joint_states")), r"obs/joint_states is missing, so whether .*set data", DEMOS),
    "no position": (in_one(drop("obs/ee_pos")), "demo_1: key obs/ee_pos is missing, .* data.robot_state joints", 1),
    "NaN orientation": (in_one(lambda d: d["obs/ee_ori"].__setitem__((3, 2), np.nan)), "key obs/ee_ori holds NaN", 1),
    "a camera frozen for a while": (
        in_one(lambda d: film(d).__setitem__(slice(3, 12), film(d)[3])),
        "demo_1: .*the pictures of steps 3 and 11 are the same although the arm moved",
        1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", END_EFFECTOR)
def test_the_state_is_checked_that_training_is_to_read(file, kind):
    change, sentence, demos = END_EFFECTOR[kind]
    change(file)
    found = verdict(settings(file.parent, "data.robot_state=end_effector"))
    assert len(matching(found.all_errors(), sentence)) == demos, found.all_errors()


def test_a_file_without_joints_may_tell_its_alignment(file):
    in_all(drop("obs/joint_states"))(file)
    attribute("obs_alignment", "before")(file)
    found = verdict(settings(file.parent, "data.robot_state=end_effector"))
    assert (found.all_errors(), found.all_warnings(), found.files[0].alignment) == ([], [], "before")
    advice = "it has what data.robot_state end_effector reads"
    assert len(matching(verdict(settings(file.parent)).all_errors(), advice)) == DEMOS
    attribute("obs_alignment", "during")(file)
    assert matching(verdict(settings(file.parent)).all_errors(), "obs_alignment is 'during', expected before or after")


def test_every_picture_is_read_once(file, monkeypatch):
    read, original = [], h5py.Dataset.__getitem__

    def counting(dataset, index, *more):
        values = original(dataset, index, *more)
        if dataset.name.endswith(CAMERAS):
            read.append(values.size)
        return values

    monkeypatch.setattr(h5py.Dataset, "__getitem__", counting)
    examine(settings(file.parent))
    assert sum(read) == DEMOS * STEPS * len(CAMERAS) * 32 * 32 * 3


def test_the_preview_shows_first_middle_and_last_pictures_upright_in_a_row_a_file(file, tmp_path, call):
    add_file()(file)
    colours = {0: (255, 0, 0), STEPS // 2: (0, 255, 0), STEPS - 1: (0, 0, 255)}
    with h5py.File(file, "a") as there:
        for step, colour in colours.items():
            picture = np.zeros((32, 32, 3), np.uint8)
            picture[16:] = colour  # the rows that are stored last are a person's upper ones
            there["data/demo_0/obs/agentview_rgb"][step] = picture
    target = tmp_path / "preview.png"
    assert call(file.parent, "--preview", target)[0] == 0
    drawn = (matplotlib.image.imread(target)[..., :3] * 255).round().astype(int)
    lefts = []
    for colour in colours.values():
        rows, columns = (np.abs(drawn - colour).max(axis=-1) <= 2).nonzero()
        assert len(rows) > 500
        below = drawn[rows.max() + 5 : rows.max() + 5 + np.ptp(rows) // 2, columns.min() + 5 : columns.max() - 5]
        assert below.max() < 10  # its black half
        assert rows.min() > drawn.shape[0] * 0.45  # the second of two tasks
        lefts.append(columns.min())
    assert lefts == sorted(lefts)
    assert drawn.shape[1] > 1.5 * drawn.shape[0]


def test_what_cannot_be_drawn_or_counted_stops_nothing(file, tmp_path, call):
    """A demo without a step, and cameras of two sizes."""
    with h5py.File(file, "a") as there:
        for demo in there["data"].values():
            del demo["obs/eye_in_hand_rgb"]
            demo["obs/eye_in_hand_rgb"] = np.random.default_rng(0).integers(0, 256, (STEPS, 64, 64, 3), dtype=np.uint8)
    code, out, _ = call(file.parent, "--preview", tmp_path / "preview.png")
    assert code == 1 and "no preview" in out
    with h5py.File(file, "a") as there:
        for demo in there["data"].values():
            for name in ("actions", "obs/joint_states", "obs/gripper_states"):
                values = demo[name][:0]
                del demo[name]
                demo[name] = values
    code, out, _ = call(file.parent)
    assert code == 1 and matching(out.splitlines(), "^error: .*demo_1")


def test_a_preview_of_nothing_is_not_drawn(file, tmp_path, call):
    os.truncate(file, 1000)
    code, out, _ = call(file.parent, "--preview", tmp_path / "preview.png")
    assert code == 1 and "no preview" in out and not (tmp_path / "preview.png").exists()


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["nowhere"], "nowhere: no such directory, expected a folder"),
        (["."], r"\.: holds no \*\.hdf5 file"),
        (["data", "--preview", "nowhere/x.png"], "--preview nowhere/x.png: expected a file in a dir"),
        (["data", "--set", "data.demos=3"], "no such key"),
        (["data", "--config", "nowhere.yaml"], "no such config file"),
    ],
)  # fmt: skip
def test_a_bad_flag_is_one_sentence_and_exit_code_2(file, monkeypatch, call, arguments, sentence):
    monkeypatch.chdir(file.parent.parent)
    code, out, err = call(*arguments)
    assert code == 2 and out == "" and err.count("\n") == 1
    assert matching([err], sentence)


def test_demonstrations_of_our_own_collector_have_nothing_wrong(collected_demos, tmp_path):
    write_embeddings(tmp_path)
    found = examine(settings(collected_demos, f"data.language_embeddings={tmp_path / EMBEDDINGS_FILE}"))
    assert (found.all_errors(), found.all_warnings()) == ([], [])
    assert str(found.files[0].gripper) == "as expected"
