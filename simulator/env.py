"""One LIBERO task as an environment that draws a picture only when asked."""

import atexit
import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from errors import BadInput
from observation import SIMULATOR_CAMERAS
from simulator.libero import choose_egl_device, import_libero, in_short, no_renderer
from simulator.suites import bddl_path
from simulator.thin_meshes import thin_visual_meshes

# What MuJoCo takes from its MjData to draw a scene: where things are. Copying it costs microseconds, drawing 0.1 s.
POSE_ARRAYS = (
    "geom_xpos", "geom_xmat", "site_xpos", "site_xmat", "cam_xpos", "cam_xmat", "light_xpos", "light_xdir",
    "xpos", "xquat", "xmat", "xipos", "ximat",
)  # fmt: skip
UNDRAWN_GROUP = 5  # mjv_updateScene leaves this group away unless its options say otherwise
FALLEN = 0.35  # rad by which what stood leans; a standing object settles within 0.02
BOX_CORNERS = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], dtype=np.float64)


class SimulatorError(Exception):
    """The simulation broke down in the middle of an episode: MuJoCo, the arm's controller or the renderer gave up."""


@contextlib.contextmanager
def _breakdowns_named():
    libero = import_libero()
    try:
        yield
    except (libero.mujoco.FatalError, libero.SimulationError, np.linalg.LinAlgError) as problem:
        raise SimulatorError(f"{type(problem).__name__}: {problem}") from problem


def is_seen_only_directly(model, shapes) -> np.ndarray:
    """(num_geoms,) bool: none where a light casts shadows or something flat mirrors, else all but endless planes."""
    is_flat = np.isin(model.geom_type, (shapes.mjGEOM_PLANE, shapes.mjGEOM_BOX)) & (model.geom_matid >= 0)
    mirrors = (model.mat_reflectance[model.geom_matid[is_flat]] > 0).any()  # LIBERO's stove does
    shades = (model.light_castshadow & model.light_active).any()
    return (model.geom_type != shapes.mjGEOM_PLANE) & (not (mirrors or shades))


def has_fallen(stood: np.ndarray, now: np.ndarray) -> bool:
    """Whether an object that stood with one rotation (3, 3) has fallen over in another one; turning in place is none of
    it."""
    return bool((now @ stood.T)[2, 2] < np.cos(FALLEN))


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
            choose_egl_device()
            self._env = libero.OffScreenRenderEnv(
                bddl_file_name=str(bddl_file),
                use_camera_obs=False,  # step() draws nothing
                hard_reset=False,  # reset() keeps the compiled model: 0.03 s instead of 4 s, placement is still random
                ignore_done=True,
            )
        except (ImportError, RuntimeError, libero.GLError) as problem:  # what EGL and OSMesa contexts raise
            raise no_renderer(problem) from None
        except FileNotFoundError as problem:
            raise BadInput(f"the installed LIBERO lacks an asset of this task, {problem.filename}") from None
        except ValueError as problem:  # MuJoCo's compiler: a mesh or texture that is missing or none
            raise BadInput(f"{bddl_file}: MuJoCo cannot build this task's scene ({in_short(problem)})") from None
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
        middle, half_size = self._model.geom_aabb[:, None, :3], self._model.geom_aabb[:, None, 3:]
        self._geom_corners = middle + BOX_CORNERS * half_size  # (num_geoms, 8, 3) in the geom's own frame
        self._left_away_unseen = is_seen_only_directly(self._model, libero.mujoco.mjtGeom)  # (num_geoms,) bool
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
        start = self.domain.robots[0].init_qpos
        self.pose_arm(start + rng.normal(0, std, len(start)))

    @_breakdowns_named()
    def pose_arm(self, joints: np.ndarray, fingers: np.ndarray | None = None) -> None:
        """Puts the arm's joints (7,) in rad, and the fingers (2,) in metres where they are given, as observations have
        them. Nothing in the scene moves then, and the controller holds the arm there. Call it after `reset()`."""
        robot, data = self.domain.robots[0], self.sim.data
        data.qpos[robot._ref_joint_pos_indexes] = joints
        if fingers is not None:
            data.qpos[robot._ref_gripper_joint_pos_indexes] = fingers
        data.qvel[:] = 0
        self.sim.forward()
        robot.controller.update(force=True)
        robot.controller.reset_goal()
        self._read_sensors_anew()

    def arm_touches_an_object(self) -> bool:
        """Whether arm or hand are in contact with something that can be moved, or inside of it."""
        root_of, data = self.sim.model.body_rootid, self.sim.data
        arm = root_of[self.sim.model.body_name2id("robot0_base")]
        objects = {int(root_of[self.domain.obj_body_id[name]]) for name in self.domain.objects_dict}
        bodies = root_of[self.sim.model.geom_bodyid]
        pairs = ((contact.geom1, contact.geom2) for contact in (data.contact[i] for i in range(data.ncon)))
        touching = [{int(bodies[one]), int(bodies[other])} for one, other in pairs]
        return any(arm in pair and pair & objects for pair in touching)

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

    @_breakdowns_named()
    def place_objects(self, layout: Mapping[str, np.ndarray], heights: Mapping[str, float] | None = None) -> None:
        """Puts each named object at its x and y (2,) in metres. Its rotation stays, and so does its height where
        `heights`, as `object_heights` gives them, has none. Call it after `reset()`."""
        data = self.sim.data
        for name, xy in layout.items():
            joint = self.domain.objects_dict[name].joints[-1]
            pose = np.append(xy, data.get_joint_qpos(joint)[2:])
            pose[2] = (heights or {}).get(name, pose[2])
            data.set_joint_qpos(joint, pose)
        self.sim.forward()
        self._read_sensors_anew()

    def ask_for(self, target: str) -> None:
        """Changes the object that a "pick up the X and place it in the Y" is about: what `obj_of_interest` names and
        `check_success` looks at. It stays so until the next call."""
        (predicate, _, place), *others = self.domain.parsed_problem["goal_state"]
        if target not in self.domain.objects_dict or others:
            raise BadInput(f"{target} cannot be asked for in the scene of {self.bddl_file.stem}")
        self.domain.parsed_problem["goal_state"] = [[predicate, target, place]]
        self.domain.obj_of_interest = [target, *self.domain.obj_of_interest[1:]]

    def collision_boxes(self, name: str) -> np.ndarray:
        """(n, 8, 3) world corners of an object's collision boxes; other shapes count as a cube inside their sphere."""
        model, data = self.sim.model, self.sim.data
        belongs = model.body_rootid[model.geom_bodyid] == self.domain.obj_body_id[name]
        boxes = []
        for geom in np.flatnonzero(belongs & (model.geom_contype != 0)):
            is_box = model.geom_type[geom] == import_libero().mujoco.mjtGeom.mjGEOM_BOX
            half_size = model.geom_size[geom] if is_box else np.full(3, 0.6 * model.geom_rbound[geom])
            boxes.append(data.geom_xpos[geom] + (BOX_CORNERS * half_size) @ data.geom_xmat[geom].reshape(3, 3).T)
        return np.array(boxes)

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

    @property
    def target(self) -> str | None:
        """The first object that the task is about, None where that is a fixture, such as a drawer."""
        name, *_ = self.domain.obj_of_interest
        return name if name in self.domain.objects_dict else None

    @property
    def asked_for(self) -> list[str]:
        """The objects that the task says something of, without fixtures and without what others are put into."""
        moved = {name for _, name, *_ in self.domain.parsed_problem["goal_state"]}
        return [name for name in self.domain.obj_of_interest if name in moved and name in self.domain.objects_dict]

    def object_heights(self) -> dict[str, float]:
        """Where the middle of each movable object is, in metres above the floor of the world."""
        heights = self.sim.data.body_xpos[:, 2]
        return {name: float(heights[self.domain.obj_body_id[name]]) for name in self.domain.objects_dict}

    def object_rotations(self) -> dict[str, np.ndarray]:
        """How each movable object is turned, (3, 3): its own axes, in the world's, are the columns."""
        bodies, rotations = self.domain.obj_body_id, self.sim.data.body_xmat
        return {name: rotations[bodies[name]].reshape(3, 3).copy() for name in self.domain.objects_dict}

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
    def draw(self, poses: dict, image_size: int | None = None, cameras: Sequence[str] = SIMULATOR_CAMERAS) -> dict:
        """The pictures at `poses`, {camera}_image -> (image_size, image_size, 3) uint8 in raw OpenGL row order."""
        mujoco, renderer, size = import_libero().mujoco, self._renderer, image_size or self.image_size
        for name in POSE_ARRAYS:
            getattr(self._drawn_data, name)[:] = poses[name]
        site_rgba_now, self._model.site_rgba[:] = self._model.site_rgba.copy(), poses["site_rgba"]
        geom_group_now = self._model.geom_group.copy()
        renderer.gl_ctx.make_current()  # another environment of this process may have drawn last
        viewport = mujoco.MjrRect(0, 0, size, size)
        pictures = {}
        for name in cameras:
            renderer.cam.type = mujoco.mjtCamera.mjCAMERA_FIXED
            renderer.cam.fixedcamid = self.sim.model.camera_name2id(name)
            self._model.geom_group[self._out_of_view(renderer.cam.fixedcamid)] = UNDRAWN_GROUP
            mujoco.mjv_updateScene(
                self._model, self._drawn_data, renderer.vopt, renderer.pert, renderer.cam, mujoco.mjtCatBit.mjCAT_ALL,
                renderer.scn,
            )  # fmt: skip
            mujoco.mjr_render(viewport, renderer.scn, renderer.con)
            self._model.geom_group[:] = geom_group_now
            pictures[f"{name}_image"] = renderer.read_pixels(size, size)
        self._model.site_rgba[:] = site_rgba_now
        return pictures

    def _out_of_view(self, camera: int) -> np.ndarray:
        """(num_geoms,) bool: what lies wholly beside or behind the view of a camera of square pictures. Without it no
        pixel changes, and the wrist camera draws in half the time."""
        model, data = self._model, self._drawn_data
        turned = self._geom_corners @ data.geom_xmat.reshape(-1, 3, 3).transpose(0, 2, 1)
        seen = (turned + data.geom_xpos[:, None] - data.cam_xpos[camera]) @ data.cam_xmat[camera].reshape(3, 3)
        right, up, ahead = seen[..., 0], seen[..., 1], -seen[..., 2]  # of the camera, in metres (num_geoms, 8)
        edge = 1.02 * np.tan(np.radians(model.cam_fovy[camera]) / 2) * ahead  # a little further than the picture
        beyond = [ahead < 0, right > edge, right < -edge, up > edge, up < -edge]
        return self._left_away_unseen & np.any([corners.all(1) for corners in beyond], axis=0)

    def close(self) -> None:
        """Frees simulation and renderer; a second call does nothing."""
        atexit.unregister(self.close)
        if self._env is not None:
            self._renderer = self._drawn_data = self._model = self.sim = self.domain = None
            self._env.close()
            self._env = None

    def _add_pose_sensor(self, libero) -> None:
        @libero.sensor(modality="poses")
        def copy_poses(_obs_cache):
            self._poses = {name: getattr(self.sim.data, name).copy() for name in POSE_ARRAYS}
            self._poses["site_rgba"] = self._model.site_rgba.copy()  # a stove that is on shows its flame this way
            return 0.0  # robosuite wants a number from every sensor

        observable = libero.Observable("camera_poses", copy_poses, sampling_rate=self.domain.control_freq)
        observable.set_active(False)  # sampled with the other sensors, but not part of their observation
        self.domain.add_observable(observable)
