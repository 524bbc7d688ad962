"""The simulator, against LIBERO's own environment as the definition. Needs a working renderer; takes half a minute."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import ROOT

from errors import BadInput
from files import keeps_files, private_temporary_folder
from observation import SIMULATOR_CAMERAS, SIMULATOR_KEYS, axis_angle, from_simulator
from simulator import libero
from simulator.env import SimulatorError, is_seen_only_directly, make_env
from simulator.libero import import_libero
from simulator.suites import make_suite, task_init_states

TASK = 6
SIZE = 64


@pytest.fixture(scope="module")
def suite():
    return make_suite("libero_object")


@pytest.fixture(scope="module")
def env(suite):
    env = make_env(suite, TASK, SIZE)
    yield env
    env.close()


def some_actions(count):
    rng = np.random.default_rng(0)
    return [np.append(rng.uniform(-1, 1, 6), -1.0) for _ in range(count)]


def test_observe_equals_liberos_own_camera_observation(env, suite):
    official = import_libero().OffScreenRenderEnv(
        bddl_file_name=str(env.bddl_file), camera_heights=SIZE, camera_widths=SIZE, hard_reset=False
    )
    make_officials_renderer_current = official.env.sim._render_context_offscreen.gl_ctx.make_current
    init_state = task_init_states(suite, TASK)[4]
    for starts_from_init_state in (False, True):  # LIBERO reads its sensors 2 ms earlier after set_init_state
        env.reset(seed=3)
        official.seed(3)
        official.robots[0].gripper.current_action = np.zeros(2)  # as the slow hard_reset would leave it
        make_officials_renderer_current()
        expected = official.reset()
        if starts_from_init_state:
            env.set_init_state(init_state)
            make_officials_renderer_current()
            expected = official.set_init_state(init_state)
        for action in some_actions(4):
            found = env.observe()
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                np.testing.assert_array_equal(found[name], value, err_msg=name)
            env.step(action)
            make_officials_renderer_current()
            expected = official.step(action)[0]
    make_officials_renderer_current()
    official.close()


@pytest.mark.parametrize(
    ("light", "reflectance", "left_away"),
    [("false", 0, [False, True, True]), ("false", 0.5, [False] * 3), ("true", 0, [False] * 3)],
)
def test_geoms_out_of_view_are_drawn_where_a_shadow_or_a_mirror_could_show_them(light, reflectance, left_away):
    mujoco = import_libero().mujoco
    model = mujoco.MjModel.from_xml_string(f"""<mujoco>
      <asset><material name="mirror" reflectance="{reflectance}"/></asset>
      <worldbody>
        <light castshadow="{light}"/>
        <geom type="plane" size="0 0 1"/>
        <geom type="box" size="1 1 1" material="mirror"/>
        <geom type="sphere" size="1"/>
      </worldbody>
    </mujoco>""")
    assert is_seen_only_directly(model, mujoco.mjtGeom).tolist() == left_away


def test_observation_has_the_repos_names_and_types_and_is_not_flipped(env):
    env.reset(seed=0)
    env_obs = env.observe()
    obs = from_simulator(env_obs)
    assert {name: (value.shape, value.dtype) for name, value in obs.items()} == {
        "agentview_rgb": ((SIZE, SIZE, 3), np.uint8),
        "eye_in_hand_rgb": ((SIZE, SIZE, 3), np.uint8),
        "joint_states": ((7,), np.float32),
        "gripper_states": ((2,), np.float32),
        "ee_pos": ((3,), np.float32),
        "ee_ori": ((3,), np.float32),
    }
    for name, sim_name in SIMULATOR_KEYS.items():
        np.testing.assert_array_equal(obs[name], env_obs[sim_name].astype(obs[name].dtype))
    assert obs["ee_ori"] == pytest.approx([np.pi, 0, 0], abs=0.2)  # the hand points down


def test_an_orientation_is_written_as_robosuite_writes_it(env):
    """Bit for bit, as the state in LIBERO's files and in openpi's LIBERO messages was made by its function."""
    from robosuite.utils.transform_utils import quat2axisangle

    rng = np.random.default_rng(0)
    quaternions = rng.normal(size=(200, 4))
    quaternions[:100, 3] *= 1e-3  # of hands that point down
    quaternions /= np.linalg.norm(quaternions, axis=1, keepdims=True)
    ends = [[0, 0, 0, 1], [0, 0, 0, -1], [0, 0, 1e-9, 1 + 1e-9], [0, 0, 1e-9, -1 - 1e-9]]
    for quaternion in [*quaternions, *np.array(ends), env.proprioception()["robot0_eef_quat"]]:
        np.testing.assert_array_equal(axis_angle(quaternion), quat2axisangle(quaternion.copy()))


def test_a_picture_drawn_later_equals_the_live_one(env):
    env.reset(seed=1)
    first, *others = some_actions(4)
    env.step(first)
    live, poses = env.observe(), env.poses()
    for action in others:
        env.step(action)
    state_before_drawing = env.state()
    for name, picture in env.draw(poses).items():
        np.testing.assert_array_equal(picture, live[name])
        assert not np.array_equal(picture, env.observe()[name])  # the scene has moved on
    np.testing.assert_array_equal(env.state(), state_before_drawing)


def test_thinned_meshes_leave_physics_untouched(env, suite):
    thinned = make_env(suite, TASK, SIZE, visual_mesh_ratio=0.2)
    for each in (env, thinned):
        each.reset(seed=2)
    for action in some_actions(10):
        assert env.step(action) == thinned.step(action)
    np.testing.assert_array_equal(env.state(), thinned.state())
    full, thin = env.observe(), thinned.observe()
    triangles = [each.sim.model._model.mesh_facenum.sum() for each in (env, thinned)]
    thinned.close()
    assert triangles[1] < 0.5 * triangles[0]
    for camera in SIMULATOR_CAMERAS:
        difference = np.abs(full[f"{camera}_image"].astype(int) - thin[f"{camera}_image"])
        assert 0 < difference.mean() < 4  # of 255: another picture, but hardly so


def test_reset_with_a_seed_repeats_the_episode_whatever_was_before(env):
    states = []
    for seed in (5, 6, 5):
        env.reset(seed=seed)
        for action in some_actions(5):
            env.step(action)
        states.append(env.state())
        for _ in range(5):
            env.step(np.array([0, 0, 0, 0, 0, 0, 1.0]))  # a closing gripper must not be remembered
    np.testing.assert_array_equal(states[0], states[2])
    assert not np.array_equal(states[0], states[1])


def test_start_pose_is_noisy(env):
    def joints_after_reset(std, seed):
        env.reset(seed=0)
        env.add_start_noise(np.random.default_rng(seed), std)
        return env.proprioception()["robot0_joint_pos"]

    still = joints_after_reset(0.0, 0)
    np.testing.assert_array_equal(still, env.domain.robots[0].init_qpos)
    offsets = np.array([joints_after_reset(0.02, seed) - still for seed in range(30)])  # 210 draws: std is known to 5%
    assert 0.016 < offsets.std() < 0.024


def object_places(env) -> dict[str, np.ndarray]:
    return {name: env.sim.data.body_xpos[body].copy() for name, body in env.domain.obj_body_id.items()}


def test_a_shifted_target_is_all_that_moves_and_touches_nothing(env, suite):
    for init_state in task_init_states(suite, TASK)[:2]:
        env.reset(seed=0)
        env.set_init_state(init_state)
        before, arm = object_places(env), env.sim.data.qpos[:9].copy()
        shifts = []
        for seed in range(30):
            env.set_init_state(init_state)
            env.shift_target(np.random.default_rng(seed), 0.05)
            after = object_places(env)
            np.testing.assert_array_equal(env.sim.data.qpos[:9], arm)
            for name, place in before.items():
                if name != "butter_1":
                    np.testing.assert_array_equal(after[name], place)
            shifts.append(after["butter_1"] - before["butter_1"])
            bodies = env.sim.model.geom_bodyid
            for contact in env.sim.data.contact[: env.sim.data.ncon]:
                touching = {env.sim.model.body_id2name(bodies[geom]) for geom in (contact.geom1, contact.geom2)}
                assert "butter_1_main" not in touching or not touching & {f"{name}_main" for name in before} - {
                    "butter_1_main"
                }
        shifts = np.array(shifts)
        assert np.abs(shifts[:, :2]).max() <= 0.05 and (shifts[:, :2].std(0) > 0.02).all()  # 0.029 if uniform
        assert np.abs(shifts[:, 2]).max() < 1e-9


def test_a_shift_shows_at_once_and_is_a_function_of_its_seed(env, suite):
    def shifted_picture(seed):
        env.reset(seed=0)
        env.set_init_state(task_init_states(suite, TASK)[0])
        unshifted = env.observe()["agentview_image"]
        env.shift_target(np.random.default_rng(seed), 0.05)
        return unshifted, env.observe()["agentview_image"]

    (unshifted, first), (_, again), (_, other) = shifted_picture(1), shifted_picture(1), shifted_picture(2)
    np.testing.assert_array_equal(first, again)
    assert (first != unshifted).any() and (first != other).any()


def test_a_target_without_a_free_place_is_a_simulator_error(env, suite):
    env.reset(seed=0)
    radius = env.domain.objects_dict["butter_1"].horizontal_radius
    joint = env.domain.objects_dict["ketchup_1"].joints[-1]
    pose = env.sim.data.get_joint_qpos(joint).copy()
    pose[:2] = env.sim.data.body_xpos[env.domain.obj_body_id["butter_1"]][:2]
    env.sim.data.set_joint_qpos(joint, pose)
    env.sim.forward()
    with pytest.raises(SimulatorError, match="butter_1 has no free place"):
        env.shift_target(np.random.default_rng(0), radius / 2)


def test_a_simulation_that_breaks_down_is_a_simulator_error(env, monkeypatch):
    def diverge(action):
        raise np.linalg.LinAlgError("SVD did not converge")

    monkeypatch.setattr(env._env, "step", diverge)
    with pytest.raises(SimulatorError, match="SVD did not converge"):
        env.step(np.zeros(7))


def test_init_states_are_loaded_and_reproduced(env, suite):
    init_states = task_init_states(suite, TASK)
    assert init_states.shape == (50, 110)
    assert init_states.dtype == np.float64
    env.reset()
    env.set_init_state(init_states[7])
    np.testing.assert_array_equal(env.state(), init_states[7])


def suite_with(init_states: Path) -> SimpleNamespace:
    """A suite of one task, whose init states are in this file."""
    task = SimpleNamespace(problem_folder="libero_x", name="lift", init_states_file=str(init_states))
    return SimpleNamespace(get_task=lambda task_id: task)


@pytest.mark.parametrize("core", ["core", "_core"])
def test_init_states_stored_with_torch_save_by_either_numpy_are_loaded(core, tmp_path):
    path = tmp_path / "upstream.pruned_init"
    init_states = np.random.default_rng(0).normal(size=(3, 110))
    torch.save(init_states, path, _use_new_zipfile_serialization=False)
    here = np.empty(0).__reduce__()[0].__module__.encode()  # the two numpys' files differ in this name
    stored = path.read_bytes()
    assert stored.count(here) == 1
    path.write_bytes(stored.replace(here, f"numpy.{core}.multiarray".encode()))
    np.testing.assert_array_equal(task_init_states(suite_with(path), 0), init_states)


def test_init_states_that_cannot_be_read_are_one_sentence(tmp_path):
    path = tmp_path / "upstream.pruned_init"
    for content in (b"", b"version https://git-lfs.github.com/spec/v1\n", b"PK\x03\x04 cut short"):
        path.write_bytes(content)
        with pytest.raises(BadInput, match=r"libero_x: the installed LIBERO's init states of task 0, lift, cannot be"):
            task_init_states(suite_with(path), 0)


def test_unknown_suite_is_answered_with_the_known_ones():
    with pytest.raises(BadInput, match=r"libero_objekt.*libero_goal.*libero_object"):
        make_suite("libero_objekt")


def test_upstreams_first_question_is_answered_once(tmp_path, monkeypatch):
    package = tmp_path / "libero/libero/__init__.py"
    package.parent.mkdir(parents=True)
    package.write_text('answer = input("Do you want to specify a custom path for the dataset folder? (Y/N): ")')
    monkeypatch.setattr(libero.importlib.util, "find_spec", lambda name: SimpleNamespace(origin=str(package)))
    monkeypatch.setenv("LIBERO_CONFIG_PATH", str(tmp_path / "config"))
    config_file = tmp_path / "config/config.yaml"

    libero._answer_upstreams_first_question()
    assert f"bddl_files: {package.parent / 'bddl_files'}\n" in config_file.read_text()
    config_file.write_text("the user's own")
    libero._answer_upstreams_first_question()
    assert config_file.read_text() == "the user's own"


def in_a_process(code: str, **variables: str | None) -> str:
    """What Python code prints that imports simulator.libero with these variables set, or for None not set."""
    environment = {name: value for name, value in (os.environ | variables).items() if value is not None}
    command = [sys.executable, "-c", f"import os, sys\nfrom simulator.libero import *\n{code}"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_opens_no_log_of_all_users_and_leaves_the_settings_of_gpus_alone():
    """robosuite would open /tmp/robosuite.log, and assert that MUJOCO_EGL_DEVICE_ID is one of CUDA_VISIBLE_DEVICES."""
    said = in_a_process(
        """
opened = []
sys.addaudithook(lambda event, details: opened.append(str(details[0])) if event == "open" else None)
import_libero()
import robosuite
print(os.environ["CUDA_VISIBLE_DEVICES"], robosuite.macros.FILE_LOGGING_LEVEL, robosuite.macros.CACHE_NUMBA)
print([name for name in opened if name.endswith("robosuite.log")], len(opened) > 100)
""",
        CUDA_VISIBLE_DEVICES="3",
        MUJOCO_EGL_DEVICE_ID="0",
    )
    assert said == "3 None True\n[] True\n"


def test_folders_of_an_installation_that_is_gone_are_named(tmp_path):
    """LIBERO's config.yaml outlives the LIBERO that it was written for. HOME is no home either, as in a container."""
    (tmp_path / "config.yaml").write_text(f"bddl_files: {tmp_path / 'gone'}\n")
    said = in_a_process(
        """
from errors import BadInput
try:
    import_libero()
except BadInput as problem:
    print(problem)
""",
        LIBERO_CONFIG_PATH=str(tmp_path),
        HOME="/proc/nobody",
    )
    assert said.startswith(f"{tmp_path}/config.yaml: its bddl_files, {tmp_path}/gone, is no folder here; delete that")


@pytest.mark.skipif(os.environ.get("MUJOCO_GL") != "egl", reason="about EGL's devices")
def test_settings_that_name_gpus_do_not_stop_the_renderer(env, monkeypatch):
    choose = libero._open_egl_display.__wrapped__
    for visible in ("0", "3", "99,1", "", "-1", "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6", "MIG-1/2/3"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert choose()
    monkeypatch.setenv("MUJOCO_EGL_DEVICE_ID", "0")  # EGL's device, whatever CUDA sees
    assert choose()
    for wrong in ("77", "-1", "cuda:0"):
        monkeypatch.setenv("MUJOCO_EGL_DEVICE_ID", wrong)
        with pytest.raises(RuntimeError, match=f"MUJOCO_EGL_DEVICE_ID is {wrong}, the EGL devices are 0 to") as caught:
            choose()
        said = str(libero.no_renderer(caught.value))
        assert "way to draw without a screen; set MUJOCO_EGL_DEVICE_ID to the number of an EGL device" in said
        assert f"MUJOCO_EGL_DEVICE_ID={wrong}, CUDA_VISIBLE_DEVICES=MIG-1/2/3" in said and "apt-get" not in said


def test_torch_with_triton_and_a_renderer_live_in_one_process(env):
    """torch.optim imports triton, whose LLVM and that of Mesa's renderer ended in a segmentation fault."""
    pytest.importorskip("triton")
    torch.optim.AdamW([torch.zeros(1, requires_grad=True)])
    env.reset(seed=0)
    assert env.observe()["agentview_image"].any()


@pytest.mark.parametrize(
    "problem, advice",
    [
        (ModuleNotFoundError("No module named 'bddl'"), "(ModuleNotFoundError: No module named 'bddl'); run `pip"),
        (ImportError("libGL.so.1: cannot open shared object file"), "run `apt-get install libgl1 libglib2.0-0`"),
        (RuntimeError("invalid value for environment variable MUJOCO_GL: glx2"), "set MUJOCO_GL to egl or osmesa (inv"),
        (
            ImportError("Cannot initialize a EGL device display."),
            "run `apt-get install libegl1 libegl-mesa0 libgl1-mes",
        ),
        (ImportError("The PYOPENGL_PLATFORM environment variable is set to 'glx'"), "unset PYOPENGL_PLATFORM"),
        (RuntimeError("cannot cache function 'f': no locator available"), "set NUMBA_CACHE_DIR to a folder that can"),
    ],
)
def test_the_errors_own_text_chooses_the_advice(problem, advice):
    assert advice in str(libero._import_problem(problem))


def test_other_causes_get_no_advice():
    said = str(libero._import_problem(PermissionError(13, "Permission denied", "/srv/libero/benchmark.py")))
    assert said == (
        "LIBERO cannot be imported (PermissionError: [Errno 13] Permission denied: '/srv/libero/benchmark.py')"
    )


def test_a_folder_that_keeps_nothing_is_known(tmp_path, monkeypatch):
    assert keeps_files(tmp_path / "new") and list((tmp_path / "new").iterdir()) == []
    assert not keeps_files(Path("/proc/nobody"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = private_temporary_folder("cache")
    assert folder.parent == tmp_path and folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)  # made by somebody who wants others to put things there
    assert private_temporary_folder("cache") is None


def test_missing_renderer_names_the_packages(monkeypatch):
    def load(name):
        raise OSError(name)

    monkeypatch.setenv("MUJOCO_GL", "egl")
    monkeypatch.setattr(libero.ctypes.util, "find_library", lambda name: None)
    monkeypatch.setattr(libero.ctypes, "CDLL", load)
    with pytest.raises(BadInput, match="apt-get install libegl1 libegl-mesa0 libgl1-mesa-dri"):
        libero._check_renderer_library()


@pytest.mark.parametrize("name", ["libero_object", "libero_object_swap"])
def test_init_states_of_a_task_are_one_layout(name):
    """What docs/evaluation.md says of them: 7 objects follow time and 9 joints, the basket moves most."""
    suite, stand_still = make_suite(name), 0
    for task_id in range(suite.n_tasks):
        places = np.asarray(task_init_states(suite, task_id))[:, 10 : 10 + 7 * 7].reshape(50, 7, 7)[..., :2]
        *others, basket = sorted(np.ptp(places, axis=0).max(axis=1))
        assert others[-1] <= 0.02 < basket <= 0.03  # metres
        stand_still += sum(moved < 1e-6 for moved in others)
    assert stand_still == 36  # of 60
