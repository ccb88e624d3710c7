"""A task for which one mode is not enough: the door that opens is hidden, and may be tried for.

PYTHONPATH=tests python fpmd_meanflow_online.py --env-id door_envs:HiddenDoors-v0
"""

import gymnasium as gym
import numpy as np

DOORS = -0.5, 0.5  # middles of the two doors
HALF_WIDTH = 0.15
TRIES = 4  # per episode


class HiddenDoors(gym.Env):
    """One of two doors opens, at random and unseen; an episode ends behind it or after four tries.

    The observation (1,) is always 0, the action (1,) a place in [-1, 1]. Behind the door the
    reward is 1, else 0, so the return is the rate of success. Whoever tries one door alone has
    1 / 2; whoever draws one of both for each try has 1 - 1 / 2**4 = 0.94.
    """

    observation_space = gym.spaces.Box(-1, 1, (1,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, render_mode: str | None = None):
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.door = self.np_random.choice(DOORS)
        self.left = TRIES
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.left -= 1
        through = bool(abs(float(action[0]) - self.door) < HALF_WIDTH)
        return np.zeros(1, np.float32), float(through), through, self.left == 0, {}


gym.register("HiddenDoors-v0", HiddenDoors)
