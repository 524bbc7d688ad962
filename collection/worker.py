"""A worker process of collect_demos.py: what it keeps between its orders, and how it ends."""

import multiprocessing
import multiprocessing.connection
import os
import threading

from collection.files import DemoSettings, SceneSettings
from simulator.env import LiberoEnv, make_env
from simulator.suites import make_suite

TASK_SUITE = "libero_object"


class Worker:
    """Keeps the environment of the task that it worked on last. A process is of one kind of worker all its life, with
    one image size and one share of the meshes."""

    task_id: int | None = None
    env: LiberoEnv | None = None

    @classmethod
    def env_of(cls, task_id: int, settings: DemoSettings | SceneSettings) -> LiberoEnv:
        env = cls.env
        if env is None or cls.task_id != task_id:
            cls.close()
            env = make_env(make_suite(TASK_SUITE), task_id, settings.image_size, settings.visual_mesh_ratio)
            cls.env, cls.task_id = env, task_id
        return env

    @classmethod
    def close(cls) -> None:
        if cls.env is not None:
            cls.env.close()
        cls.env = cls.task_id = None


def prepare_worker() -> None:
    """However the main process dies, its workers end, too."""

    def end_with_parent():
        multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
