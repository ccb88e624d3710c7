"""Environments whose values are known in closed form, registered as probe_envs:<Name>-v0.

Each isolates one thing an agent must get right; a failure names the broken part.
"""

import gymnasium as gym
import numpy as np

LOG = []  # every transition Coded has produced, in order: (env, obs, action, reward, next, term)


class Probe(gym.Env):
    """One observation number, one action number in [-1, 1], episodes of `length` steps."""

    observation_space = gym.spaces.Box(-1, 1, (1,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)
    length = 1

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps, self.obs = 0, self.first_obs()
        return self.obs, {}

    def step(self, action):
        reward = self.reward(float(action[0]))
        self.steps += 1
        self.obs = self.next_obs()
        return self.obs, reward, self.steps == self.length, False, {}

    def first_obs(self):
        return np.zeros(1, np.float32)

    def next_obs(self):
        return self.obs.copy()

    def reward(self, action):
        return 1.0


class Constant(Probe):
    """Q(s, a) = 1: the critics can fit a constant."""


class Observed(Probe):
    """Q(s, a) = s: the critics read the observation."""

    def first_obs(self):
        return self.np_random.choice([-1.0, 1.0], 1).astype(np.float32)

    def reward(self, action):
        return float(self.obs[0])


class Delayed(Probe):
    """Reward only on the second and last step: Q(0, a) = gamma, Q(1, a) = 1."""

    length = 2

    def next_obs(self):
        return np.ones(1, np.float32)

    def reward(self, action):
        return float(self.steps == 1)


class Acted(Probe):
    """The best action, 0.5, lies inside the box: the policy improves."""

    target = 0.5

    def reward(self, action):
        return 1 - (action - self.target) ** 2


class Both(Observed):
    """The best action is half the observation."""

    def reward(self, action):
        return 1 - (action - 0.5 * float(self.obs[0])) ** 2


class Endless(Probe):
    """Reward 1 for ever; a time limit of 8 cuts episodes, so Q = 1 / (1 - gamma) all the same."""

    length = np.inf


class Coded(gym.Env):
    """Observations that say which env, episode and step they belong to; staggered episode ends.

    Odd episodes terminate, even ones are truncated. Everything is also written to LOG.
    """

    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float32)
    action_space = gym.spaces.Box(-2, 2, (2,), np.float32)  # the script sees [-1, 1]
    made = 0

    def __init__(self):
        self.number, self.episode = Coded.made, 0
        Coded.made += 1

    def code(self):
        return np.array([self.number, self.episode, self.steps], np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.steps = self.episode + 1, 0
        return self.code(), {}

    def step(self, action):
        obs, reward = self.code(), 100 * self.number + 10 * self.episode + self.steps
        self.steps += 1
        done = self.steps == 3 + self.number + self.episode % 3
        terminated = done and self.episode % 2 == 1
        LOG.append((obs, np.asarray(action) / 2, reward, self.code(), terminated))
        return self.code(), reward, terminated, done and not terminated, {}


class Succeeding(Probe):
    """Says success at the end of episodes that started with a positive number."""

    length = 3

    def first_obs(self):
        return self.np_random.choice([-1.0, 1.0], 1).astype(np.float32)

    def step(self, action):
        obs, reward, terminated, truncated, info = super().step(action)
        return obs, reward, terminated, truncated, info | {"success": bool(self.obs[0] > 0)}


class Solving(Succeeding):
    """The same under gymnasium-robotics' name, and much else that nobody reads."""

    def step(self, action):
        *transition, info = super().step(action)
        return *transition, {"is_success": float(info["success"]), "x_position": 1.0, "text": "no"}


class Bounded(gym.Env):
    """Actions (2, 2), every one with bounds of its own; the reward weighs them all differently."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    low = np.array([[-2.0, 0.0], [-0.5, 1.0]], np.float32)
    high = np.array([[2.0, 3.0], [0.5, 9.0]], np.float32)
    action_space = gym.spaces.Box(low, high)
    length = 5

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.draw(), {}

    def step(self, action):
        assert np.shape(action) == (2, 2)
        # the scripts' rescaling may miss a bound by a rounding error
        assert (action >= self.low - 1e-5).all() and (action <= self.high + 1e-5).all()
        self.steps += 1
        reward = float(action.ravel() @ [1.0, 10.0, 100.0, 1000.0])
        return self.draw(), reward, self.steps == self.length, False, {}

    def draw(self):
        return self.np_random.normal(1, 2, 2).astype(np.float32)


class Unbounded(Probe):
    action_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float32)


class Scalar(Probe):
    action_space = gym.spaces.Box(-1, 1, ())

    def step(self, action):
        assert np.shape(action) == ()
        return super().step([action])


class Image(Probe):
    observation_space = gym.spaces.Box(0, 255, (8, 8, 3), np.uint8)


class Named(Probe):
    """Dict observations, flattened in the order of their keys; a wide, lopsided action range."""

    observation_space = gym.spaces.Dict(
        {"b": gym.spaces.Box(-1, 1, (2,)), "a": gym.spaces.Box(-1, 1, (), np.float64)}
    )
    action_space = gym.spaces.Box(np.array([0.0, -3.0]), np.array([1.0, 5.0]), dtype=np.float64)

    def first_obs(self):
        return {"b": np.array([2.0, 3.0], np.float32), "a": np.float64(1.0)}

    def reward(self, action):
        return action


LIMITS = {Endless: 8}
for env in (Constant, Observed, Delayed, Acted, Both, Endless, Coded, Succeeding, Solving):
    limit = LIMITS.get(env)
    gym.register(f"{env.__name__}-v0", env, max_episode_steps=limit, disable_env_checker=True)
for env in (Bounded, Unbounded, Scalar, Image, Named):
    gym.register(f"{env.__name__}-v0", env, disable_env_checker=True)
