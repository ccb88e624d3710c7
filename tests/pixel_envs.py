"""Environments that draw with numpy, so that no OpenGL is needed: pixel_envs:<Name>-v0."""

from typing import ClassVar

import gymnasium as gym
import numpy as np


class Drawn(gym.Env):
    """What these share: a number observed by nobody, one action in [-1, 1], square pictures."""

    metadata: ClassVar = {"render_modes": ["rgb_array"], "render_fps": 10}
    observation_space = gym.spaces.Box(-1, 1, (1,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)
    rendered = 0  # pictures so far, of all of the class

    def __init__(self, render_mode=None, size=24):
        self.render_mode = render_mode
        self.size = size

    def render(self):
        type(self).rendered += 1
        return self.draw()

    def nothing(self):
        return np.zeros(1, np.float32)


class MovingSquare(Drawn):
    """The best action is the velocity of a square, which a single frame does not show.

    The square is 4 pixels wide, drawn to fractions of a pixel, and leaves to come in again on the
    other side. It moves by up to 0.15 half-widths per step, at a velocity drawn anew every 7
    steps. Episodes last for 50 steps: the best constant action gets 33, and one that follows the
    velocity with the delay of a step about 45.
    """

    fastest = 0.15

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        self.x = self.np_random.uniform(0, self.size)
        self.y = self.np_random.integers(0, self.size - 4)
        self.velocity = self.np_random.uniform(-1, 1)
        return self.nothing(), {}

    def step(self, action):
        reward = 1 - (float(action[0]) - self.velocity) ** 2
        self.x += self.velocity * self.fastest * self.size / 2
        self.steps += 1
        if self.steps % 7 == 0:
            self.velocity = self.np_random.uniform(-1, 1)
        return self.nothing(), reward, False, self.steps == 50, {}

    def draw(self):
        # how much of each column the square covers
        left = (np.arange(self.size) - self.x) % self.size
        cover = np.clip(4 - left, 0, 1) + np.clip(left - (self.size - 1), 0, 1)
        picture = np.zeros((self.size, self.size, 3), np.uint8)
        picture[self.y : self.y + 4] = np.round(255 * cover)[:, None]
        return picture


gym.register("MovingSquare-v0", MovingSquare, disable_env_checker=True)


class CodedFrames(Drawn):
    """Pictures that say which env, episode and step they are of; episodes of length 1, 2, 3 or 5.

    What happened is in LOG, in order: (env, stack, action, reward, next stack, terminated).
    Odd episodes terminate, even ones are truncated.
    """

    made = 0
    log: ClassVar = []
    lengths = 3, 1, 2, 5

    def __init__(self, **options):
        super().__init__(**options)
        self.number = CodedFrames.made
        self.episode = 0
        CodedFrames.made += 1

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode += 1
        self.steps = 0
        self.seen = [self.draw()] * 3
        return self.nothing(), {}

    def step(self, action):
        self.steps += 1
        before = np.stack(self.seen[-3:])
        self.seen.append(self.draw())
        reward = 100 * self.number + 10 * self.episode + self.steps
        done = self.steps == self.lengths[(self.number + self.episode) % 4]
        terminated = done and self.episode % 2 == 1
        after = np.stack(self.seen[-3:])
        CodedFrames.log.append((self.number, before, float(action[0]), reward, after, terminated))
        return self.nothing(), reward, terminated, done and not terminated, {}

    def draw(self):
        picture = np.zeros((self.size, self.size, 3), np.uint8)
        picture[..., 0] = self.number
        picture[..., 1] = self.episode % 256
        picture[..., 2] = self.steps
        picture[0, :, 0] = 100 + np.arange(self.size)  # a picture is neither mirrored nor moved
        picture[:, 0, 1] = 100 + np.arange(self.size)
        return picture


class SeededFrames(Drawn):
    """A picture of the seed's noise, which a walk moves: what a resume must find again."""

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        self.length = self.np_random.integers(2, 30)
        self.picture = self.np_random.integers(0, 256, (self.size, self.size, 3), np.uint8)
        return self.nothing(), {}

    def step(self, action):
        self.steps += 1
        self.picture = np.roll(self.picture, round(5 * float(action[0])), 1)
        reward = float(self.picture[0, 0, 0]) / 255
        return self.nothing(), reward, False, self.steps >= self.length, {}

    def draw(self):
        return self.picture.copy()


class OneArray(SeededFrames):
    """It draws into the same array again and again, as a renderer with a canvas of its own does."""

    def draw(self):
        if not hasattr(self, "canvas"):
            self.canvas = np.zeros((self.size, self.size, 3), np.uint8)
        self.canvas[:] = self.picture
        return self.canvas


class Wide(Drawn):
    """Its pictures are not square."""

    def draw(self):
        return np.zeros((24, 32, 3), np.uint8)


class Grey(Drawn):
    """Its pictures have no colours."""

    def draw(self):
        return np.zeros((24, 24), np.uint8)


class Deep(Drawn):
    """Its pictures have 16 bits, which would be cut to 8 in silence."""

    def draw(self):
        return np.full((24, 24, 3), 40_000, np.uint16)


class Fractions(Drawn):
    """Its pictures are shares of white."""

    def draw(self):
        return np.full((24, 24, 3), 0.5)


class Unseen(gym.Env):
    """It cannot be rendered at all."""

    observation_space = gym.spaces.Box(-1, 1, (1,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)
    render_mode = None

    def __init__(self, render_mode=None):
        self.render_mode = None

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action):
        return np.zeros(1, np.float32), 0.0, False, False, {}


class Blind(gym.Wrapper):
    """Any environment behind black pictures: what is learnt from them is learnt without seeing."""

    def __init__(self, env_id, render_mode=None, size=24):
        if env_id.startswith("dm_control/"):
            import shimmy  # noqa: F401  registers the ids
        super().__init__(gym.make(env_id))
        self.size = size
        self.mode = render_mode

    @property
    def render_mode(self):
        return self.mode

    def render(self):
        return np.zeros((self.size, self.size, 3), np.uint8)


def repeated_cartpole(render_mode=None):
    """dm_control's cart-pole with actions held for 8 steps, for scripts that see its state."""
    import shimmy  # noqa: F401  registers the ids

    env = gym.make("dm_control/cartpole-swingup-v0", render_mode=render_mode)
    return gym.wrappers.RepeatAction(env, 8)


gym.register("RepeatedCartpole-v0", repeated_cartpole, disable_env_checker=True)
for env in (Blind, CodedFrames, SeededFrames, OneArray, Wide, Grey, Deep, Fractions, Unseen):
    gym.register(f"{env.__name__}-v0", env, disable_env_checker=True)
