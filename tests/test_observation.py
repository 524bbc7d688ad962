"""The one definition of an observation: laws of how an orientation is written. What files and simulator give, and that
robosuite writes it so, stands in test_collect_demos.py and test_simulator.py."""

import numpy as np

from observation import axis_angle


def rotation(turn: np.ndarray) -> np.ndarray:
    """Rodrigues' formula: axis times angle (3,) -> (3, 3)."""
    angle = np.linalg.norm(turn)
    x, y, z = turn / angle
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def test_axis_and_angle_are_the_quaternions_rotation():
    for quaternion in np.random.default_rng(0).normal(size=(50, 4)):
        quaternion /= np.linalg.norm(quaternion)
        axis, w = quaternion[:3], quaternion[3]
        for vector in np.eye(3):
            turned = vector + 2 * np.cross(axis, np.cross(axis, vector) + w * vector)
            np.testing.assert_allclose(rotation(axis_angle(quaternion)) @ vector, turned, atol=1e-12)


def test_a_turn_through_pi_is_continuous():
    """A quaternion that keeps its sign moves through w = 0: the angle grows beyond pi, the axis stays."""
    angles = np.pi + np.linspace(-0.1, 0.1, 201)
    axis = np.array([0.96, 0.28, 0.0])
    turns = np.array([axis_angle(np.append(axis * np.sin(angle / 2), np.cos(angle / 2))) for angle in angles])
    np.testing.assert_allclose(turns, angles[:, None] * axis, atol=1e-12)


def test_no_turn_is_zero_and_a_quaternion_that_is_slightly_too_long_is_none():
    np.testing.assert_array_equal(axis_angle(np.array([0.0, 0, 0, 1])), np.zeros(3))
    np.testing.assert_array_equal(axis_angle(np.array([0.0, 0, 1e-9, 1 + 1e-9])), np.zeros(3))
