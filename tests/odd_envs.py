"""Environments as strangers bring them, registered as odd_envs:<Name>-v0.

REFUSED must be refused before anything is written, FAILS break in mid-run, WORKS must train. Where
something is wrong from the start it is <Kind>AtOnce, where it begins in mid-run <Kind>Later.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Sequence, Text, Tuple

REFUSED = {}  # id: words of the refusal, any of them
FAILS = {}  # id: words of the error line, any of them
WORKS = []  # ids
FILMED = {}  # id: words of the refusal if --capture-video is asked for


class Base(gym.Env):
    """Three observations, two actions, episodes of 20 steps; sound in every way."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012
    observation_space = Box(-np.inf, np.inf, (3,), np.float32)
    action_space = Box(-1, 1, (2,), np.float32)
    limit = 20
    # what OGBench's relabelling reads, so that there are datasets for these environments, too
    _reward_task_id, _goal_tol, cur_goal_xy = 1, 0.5, np.zeros(2)

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def obs(self):
        return self.np_random.normal(size=3).astype(np.float32)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.obs(), {}

    def step(self, action):
        self.t += 1
        over = self.limit is not None and self.t >= self.limit
        return self.obs(), -float(np.square(action).sum()), False, over, {}

    def render(self):
        return np.full((64, 64, 3), self.t * 10 % 255, np.uint8)


def register(name, kind, **options):
    """Under the name that a command line gives, which is returned."""
    gym.register(f"{name}-v0", entry_point=kind, **options)
    return f"odd_envs:{name}-v0"


def works(kind):
    """A class whose environments must train."""
    WORKS.append(register(kind.__name__, kind))
    return kind


# ---------------------------------------------------------------------------- wrong data
def with_value(column, value):
    """A step whose column of (obs, reward, terminated, truncated, info) is something else."""
    return lambda transition: (*transition[:column], value, *transition[column + 1 :])


def spoiled(value):
    """A step whose second observation is that value."""
    obs = np.array([0, value, 0], np.float64)
    return with_value(0, obs if abs(value) == 1e300 else obs.astype(np.float32))


NAN, INF = ["NaN", "nan"], ["infinit", "inf"]
OBS, REWARD, ENDS = ["observation"], ["reward"], ["terminat", "truncat"]
STEP = ["step"]
WRONG_STEPS = {  # name: (what becomes of a step, words that name it)
    "ObsNan": (spoiled(np.nan), NAN),
    "ObsInf": (spoiled(np.inf), INF),
    "ObsHuge": (spoiled(1e300), [*INF, "1e+300"]),
    "ObsShort": (with_value(0, np.zeros(2, np.float32)), OBS),
    "ObsLong": (with_value(0, np.zeros(4, np.float32)), OBS),
    "ObsMatrix": (with_value(0, np.zeros((3, 3), np.float32)), OBS),
    "ObsScalar": (with_value(0, np.float32(0)), OBS),
    "ObsNone": (with_value(0, None), OBS),
    "ObsObject": (with_value(0, np.array([None, {}, 1], object)), OBS),
    "ObsText": (with_value(0, np.array(["a", "b", "c"])), OBS),
    "ObsComplex": (with_value(0, np.array([1j, 0, 0])), OBS),
    "ObsDict": (with_value(0, {"a": 1}), OBS),
    "RewardNan": (with_value(1, np.nan), NAN),
    "RewardInf": (with_value(1, -np.inf), INF),
    "RewardHuge": (with_value(1, 1e300), [*INF, "1e+300"]),
    "RewardBeyondFloat32": (with_value(1, 1e39), [*INF, "1e+39"]),
    "RewardNone": (with_value(1, None), REWARD),
    "RewardText": (with_value(1, "good"), REWARD),
    "RewardPair": (with_value(1, np.array([1.0, 2.0])), REWARD),
    "RewardComplex": (with_value(1, 1 + 2j), REWARD),
    "RewardDict": (with_value(1, {"total": 1}), REWARD),
    "EndPair": (with_value(2, np.array([True, False])), ENDS),
    "EndText": (with_value(2, "no"), ENDS),
    "FourValues": (lambda transition: (*transition[:3], {}), ["4"]),
    "SixValues": (lambda transition: (*transition, 0), ["6", "five", "5"]),
    "NoValues": (lambda transition: None, STEP),
}


def raising(error):
    def step(_transition):
        raise error

    return step


WRONG_STEPS |= {
    "StepRaises": (raising(RuntimeError("the simulator\nexploded")), ["the simulator exploded"]),
    "StepAsserts": (raising(AssertionError()), ["AssertionError"]),
    "StepStops": (raising(StopIteration()), ["StopIteration"]),
    "StepIndexes": (raising(KeyError("qpos")), ["qpos"]),
    "StepExits": (raising(SystemExit(3)), ["SystemExit", "exit"]),
    "StepExitsWell": (raising(SystemExit(0)), ["SystemExit", "exit"]),
    "StepOverflows": (raising(RecursionError("too deep")), ["too deep"]),
    "StepMemory": (raising(MemoryError()), ["MemoryError", "memory"]),
    "StepMissesFile": (raising(FileNotFoundError(2, "no such file", "a.xml")), ["a.xml"]),
    "StepLosesPipe": (raising(BrokenPipeError(32, "the license server is gone")), ["license"]),
    "StepEndsInput": (raising(EOFError("the game is over")), ["the game is over"]),
}


class WrongStep(Base):
    """From its step number `first` on, counted over all episodes, a step is what `wrong` makes."""

    wrong, first = None, 1
    count = 0

    def step(self, action):
        transition = super().step(action)
        self.count += 1
        return type(self).wrong(transition) if self.count >= self.first else transition


class ResetReturns(Base):
    """From its reset number `first` on, it gives what `wrong` makes of (obs, info)."""

    wrong, first = None, 1
    count = 0

    def reset(self, seed=None, options=None):
        out = super().reset(seed=seed)
        self.count += 1
        return type(self).wrong(out) if self.count >= self.first else out


WRONG_RESETS = {
    "ResetNan": (spoiled(np.nan), NAN),
    "ResetInf": (spoiled(np.inf), INF),
    "ResetShort": (with_value(0, np.zeros(2, np.float32)), OBS),
    "ResetNone": (lambda out: None, ["reset"]),
    "ResetOnlyObs": (lambda out: out[0], ["reset"]),
    "ResetTriple": (lambda out: (*out, 0), ["reset"]),
    "ResetRaises": (raising(RuntimeError("no connection")), ["no connection"]),
    "ResetExits": (raising(SystemExit("no license")), ["no license", "SystemExit", "exit"]),
}
for parent, table, late in (WrongStep, WRONG_STEPS, 30), (ResetReturns, WRONG_RESETS, 4):
    for kind, (wrong, words) in table.items():
        for suffix, number, expected in ("AtOnce", 1, REFUSED), ("Later", late, FAILS):
            fields = {"wrong": staticmethod(wrong), "first": number}
            env = type(kind + suffix, (parent,), fields)
            expected[register(kind + suffix, env)] = words


# ---------------------------------------------------------------------------- wrong interfaces
class NoOptions(Base):
    def reset(self, seed=None):
        return super().reset(seed=seed)


class NoSeed(Base):
    def reset(self):
        return super().reset()


class ConstructorRaises(Base):
    def __init__(self, render_mode=None):
        raise ValueError("no license\nfor this machine")


class ConstructorIsSilent(Base):
    def __init__(self, render_mode=None):
        raise AssertionError


class ConstructorExits(Base):
    def __init__(self, render_mode=None):
        sys.exit("no license")


class NeedsArgument(Base):
    def __init__(self, level, render_mode=None):
        self.level, self.render_mode = level, render_mode


class NoSpaces(Base):
    action_space = None


class NoObservationSpace(Base):
    observation_space = None


WORDS = {
    NoOptions: ["options", "reset"],
    NoSeed: ["seed", "reset"],
    ConstructorRaises: ["no license for this machine"],
    ConstructorIsSilent: ["AssertionError"],
    ConstructorExits: ["no license"],
    NeedsArgument: ["level"],
    NoSpaces: ["action"],
    NoObservationSpace: ["observation"],
}
for env, words in WORDS.items():
    REFUSED[register(env.__name__, env)] = words


# ---------------------------------------------------------------------------- spaces
class SpaceOf(Base):
    """Observations are drawn from the space; any action will do."""

    def obs(self):
        self.observation_space.seed(int(self.np_random.integers(1 << 30)))
        return self.observation_space.sample()

    def step(self, action):
        self.t += 1
        return self.obs(), 1.0, False, self.t >= self.limit, {}


def box(low, high, dtype=np.float32):
    return Box(np.array(low, dtype), np.array(high, dtype), dtype=dtype)


def broken_box(low, high):
    """Bounds that Box itself would refuse, as an environment that edits them has."""
    space = box([-1, -1], [1, 1])
    space.low, space.high = np.array(low, np.float32), np.array(high, np.float32)
    return space


IMAGE = Box(0, 255, (64, 64, 3), np.uint8)
# which of two components is at fault
SECOND = ["action 1", "component 1", "actions[1]", "[1]", "number 1", "index 1", "action_1"]
ACTIONS = {
    "DiscreteAction": (Discrete(4), ["Discrete(4)"]),
    "MultiDiscreteAction": (MultiDiscrete([2, 3]), ["MultiDiscrete([2 3])"]),
    "BinaryAction": (MultiBinary(3), ["MultiBinary(3)"]),
    "DictAction": (Dict(a=Box(-1, 1, (2,))), ["Dict("]),
    "TupleAction": (Tuple([Box(-1, 1, (2,))]), ["Tuple("]),
    "IntegerAction": (Box(0, 5, (2,), np.int64), ["int64"]),
    "EmptyAction": (Box(-1, 1, (0,)), ["action"]),
    "UnboundedAction": (box([-1, -np.inf], [1, np.inf]), SECOND),
    "HalfBoundedAction": (box([-1, -1], [1, np.inf]), SECOND),
    "ActFixed": (box([-1, 0.5], [1, 0.5]), SECOND),
    "WideAction": (box([-1, -1e10], [1, 1e10]), SECOND),
    "WideOnOneSide": (box([-1, -1], [1, 3e7]), SECOND),
    "NanAction": (broken_box([-1, np.nan], [1, 1]), SECOND),
    "InvertedAction": (broken_box([-1, 1], [1, -1]), SECOND),
}
OBSERVATIONS = {
    "ImageObs": (IMAGE, ["image"]),
    "FirstChannelObs": (Box(0, 255, (3, 64, 64), np.uint8), ["image"]),
    "GreyObs": (Box(0, 255, (84, 84, 1), np.uint8), ["image"]),
    "ImageInDict": (Dict(camera=IMAGE, joints=Box(-1, 1, (3,))), ["image"]),
    "ImageInTuple": (Tuple([Tuple([Box(-1, 1, (3,)), IMAGE])]), ["image"]),
    "TextObs": (Text(5), ["Text("]),
    "SequenceObs": (Sequence(Box(-1, 1, (2,))), ["Sequence("]),
    "TextInDict": (Dict(order=Text(5), joints=Box(-1, 1, (3,))), ["Text("]),
    "EmptyObs": (Box(-1, 1, (0,)), ["observation"]),
    "EmptyDictObs": (Dict(), ["observation"]),
}
for key, table in ("action_space", ACTIONS), ("observation_space", OBSERVATIONS):
    for kind, (space, words) in table.items():
        REFUSED[register(kind, type(kind, (SpaceOf,), {key: space}))] = words
SOUND = {
    "IntegerObs": Box(-100, 100, (4,), np.int64),
    "ByteObs": Box(0, 255, (6,), np.uint8),
    "BinaryObs": MultiBinary(5),
    "BoolObs": Box(0, 1, (3,), np.bool_),
    "DiscreteObs": Discrete(5),
    "LateDiscreteObs": Discrete(5, start=-2),
    "MultiDiscreteObs": MultiDiscrete([3, 4]),
    "NestedDictObs": Dict(arm=Dict(q=Box(-1, 1, (2,)), on=Discrete(2)), goal=Box(-1, 1, (2, 2))),
    "TupleObs": Tuple([Box(-1, 1, (2,)), Discrete(3), Tuple([MultiBinary(2)])]),
    "MatrixObs": Box(-1, 1, (3, 4)),
    "HalfObs": Box(-1, 1, (3,), np.float16),
    "DoubleObs": Box(-np.inf, np.inf, (3,), np.float64),
}
for kind, space in SOUND.items():
    works(type(kind, (SpaceOf,), {"observation_space": space}))


class MatrixAction(SpaceOf):
    """Six actions as a matrix; the environment insists on their shape."""

    action_space = Box(-2, 2, (2, 3), np.float32)

    def step(self, action):
        assert np.shape(action) == (2, 3), np.shape(action)
        return super().step(action)


class DoubleAction(SpaceOf):
    """Lopsided bounds in float64, which actions keep to."""

    action_space = box([0, -3e-3], [1e4, 1e-3], np.float64)

    def step(self, action):
        assert self.action_space.contains(action), action
        return super().step(action)


class StrictActions(SpaceOf):
    """Bounds that rounding leaves if nobody takes care, (1, 2) of them, and an env that looks."""

    def __init__(self, render_mode=None, low=-0.37, high=1.2, dtype="float32"):
        super().__init__(render_mode)
        self.action_space = Box(low, high, (1, 2), np.dtype(dtype))

    def step(self, action):
        assert self.action_space.contains(action), action
        return super().step(action)


class HugeObs(SpaceOf):
    """3,500 observations: the default replay buffer would take 26 GiB."""

    observation_space = Box(-1, 1, (3_500,), np.float32)

    def obs(self):
        return self.np_random.random(3_500, np.float32)


for env in MatrixAction, DoubleAction, StrictActions, HugeObs:
    works(env)


# ---------------------------------------------------------------------------- odd, but sound
@works
class Stagger(Base):
    """Half of the episodes succeed, others end sooner or later without a word about it."""

    def reset(self, seed=None, options=None):
        out = super().reset(seed=seed)
        self.good = bool(self.np_random.integers(2))
        self.end = int(self.np_random.integers(5, 25))
        return out

    def step(self, action):
        obs, reward, *_ = super().step(action)
        if self.good and self.t >= self.end:
            return obs, reward, True, False, {"is_success": True}
        return obs, reward, False, self.t >= self.end, {}


@works
class StaggerSame(Stagger):
    """The same, but all episodes end in the same vector step."""

    def reset(self, seed=None, options=None):
        out = super().reset(seed=seed)
        self.end = 15
        return out


@works
class SuccessOnTheWay(Base):
    """Success at step 5, none at the end of the episode: what counts is the end."""

    def step(self, action):
        obs, reward, terminated, truncated, _ = super().step(action)
        return obs, reward, terminated, truncated, {"success": self.t == 5}


@works
class NeverSaysSuccess(Base):
    """Its info holds other things only."""

    def step(self, action):
        return *super().step(action)[:4], {"x_position": 1.0, "text": "no", "array": np.ones(3)}


@works
class SuccessIsAnArray(Base):
    def step(self, action):
        return *super().step(action)[:4], {"is_success": np.array([1.0])}


@works
class SuccessIsANumber(Base):
    """0.0 on the way and 1.0 at the end: numbers, not truth values."""

    def step(self, action):
        return *super().step(action)[:4], {"success": np.float32(self.t == self.limit)}


@works
class EpisodeKey(Base):
    """Reports its own statistics, as RecordEpisodeStatistics does."""

    def step(self, action):
        obs, reward, terminated, truncated, _ = super().step(action)
        info = {"episode": {"r": 1.0, "l": self.t, "t": 0.0}} if truncated else {}
        return obs, reward, terminated, truncated, info


@works
class EpisodeIsANumber(Base):
    """Another meaning of the same key."""

    def step(self, action):
        return *super().step(action)[:4], {"episode": self.t}


@works
class ObservationKeys(Base):
    """Keys that vector environments use themselves."""

    def step(self, action):
        info = {"final_obs": 1, "final_info": {"episode": 2}, "_episode": True, "obs": None}
        return *super().step(action)[:4], info


@works
class RewardArray(Base):
    def step(self, action):
        obs, reward, *rest = super().step(action)
        return obs, np.array([reward]), *rest


@works
class RewardInteger(Base):
    def step(self, action):
        obs, _, *rest = super().step(action)
        return obs, self.t % 2, *rest


@works
class RewardIsZeroDimensional(Base):
    def step(self, action):
        obs, reward, *rest = super().step(action)
        return obs, np.array(reward, np.float64), *rest


@works
class NumpyTruth(Base):
    def step(self, action):
        obs, reward, terminated, truncated, info = super().step(action)
        return obs, reward, np.bool_(terminated), np.bool_(truncated), info


@works
class NumberTruth(Base):
    """0 and 1 for False and True."""

    def step(self, action):
        obs, reward, terminated, truncated, info = super().step(action)
        return obs, reward, int(terminated), int(truncated), info


@works
class BothEnds(Base):
    """Terminated and truncated in the same step."""

    def step(self, action):
        obs, reward, _, truncated, info = super().step(action)
        return obs, reward, truncated, truncated, info


@works
class OneStep(Base):
    limit = 1


@works
class SameArray(Base):
    """One array, which it changes in place and returns again and again."""

    held = None

    def obs(self):
        if self.held is None:
            self.held = np.zeros(3, np.float32)
        self.held += 1
        return self.held


@works
class ReadOnlyArray(Base):
    def obs(self):
        obs = super().obs()
        obs.flags.writeable = False
        return obs


@works
class ChangesActions(Base):
    """Writes into the actions that it is given."""

    def step(self, action):
        out = super().step(action)
        action[:] = np.nan
        return out


@works
class Printing(Base):
    def step(self, action):
        if self.t == 0:
            print("a simulator's greeting")
        return super().step(action)


@works
class Slow(Base):
    def reset(self, seed=None, options=None):
        time.sleep(0.02)
        return super().reset(seed=seed)


@works
class CloseFails(Base):
    """What breaks after all is saved costs nothing."""

    def close(self):
        raise RuntimeError("cannot close")


@works
class NoMetadata(Base):
    metadata = {}  # noqa: RUF012


@works
class OffCentre(Base):
    """Bounds of the observations that it does not keep to."""

    observation_space = Box(-1, 1, (3,), np.float32)

    def obs(self):
        return 10 + super().obs()


WORKS.append(
    register(
        "DoubleStats",
        Base,
        additional_wrappers=(gym.wrappers.RecordEpisodeStatistics.wrapper_spec(),),
    )
)
WORKS.append(
    register(
        "TwiceWrapped",
        Base,
        max_episode_steps=7,
        order_enforce=False,
        disable_env_checker=True,
        additional_wrappers=(
            gym.wrappers.TimeAwareObservation.wrapper_spec(),
            gym.wrappers.NormalizeObservation.wrapper_spec(),
        ),
    )
)


# ---------------------------------------------------------------------------- not reproducible
class Clock(Base):
    """Draws from numpy's global generator, which no seed of an episode sets."""

    limit = 60

    def obs(self):
        return np.random.normal(size=3).astype(np.float32)  # noqa: NPY002

    def step(self, action):
        obs, reward, _, truncated, info = super().step(action)
        return obs, reward, bool(np.random.random() < 0.02), truncated, info  # noqa: NPY002


class PythonRandom(Base):
    """The same with Python's."""

    def obs(self):
        return np.array([random.gauss(0, 1) for _ in range(3)], np.float32)


class Upgraded(Base):
    """Its dynamics follow ODD_VERSION, as a simulator's follow its version."""

    def obs(self):
        return super().obs() + float(os.environ.get("ODD_VERSION", "0"))


class EndsSooner(Base):
    """Its episodes are as long as ODD_LIMIT says, as if it had been changed in between."""

    def step(self, action):
        self.limit = int(os.environ.get("ODD_LIMIT", "20"))
        return super().step(action)


# ---------------------------------------------------------------------------- for single tests
class NoLimit(Base):
    """Its episodes never end."""

    limit = None


class TakesArguments(Base):
    """Its reward is its argument."""

    def __init__(self, bonus=1.0, names=(), render_mode=None):
        super().__init__(render_mode)
        self.bonus, self.names = bonus, names

    def step(self, action):
        obs, _, *rest = super().step(action)
        return obs, float(self.bonus) + len(self.names), *rest


class Signalling(Base):
    """Sends ODD_SIGNAL to its process, or to its group, when it has made ODD_STEP steps in all.

    ODD_WHERE names the file whose existence says that this has been done.
    """

    steps = 0

    def step(self, action):
        Signalling.steps += 1
        done = os.environ.get("ODD_WHERE", "")
        at = int(os.environ.get("ODD_STEP", "0"))
        if done and Signalling.steps == at and not os.path.exists(done):
            open(done, "w").close()
            signum = int(os.environ["ODD_SIGNAL"])
            if os.environ.get("ODD_GROUP"):
                os.killpg(os.getpgid(0), signum)
            else:
                os.kill(os.getpid(), signum)
        return super().step(action)


class Dies(Base):
    """Kills its own process at its 30th step, as a simulator that crashes does."""

    count = 0

    def step(self, action):
        self.count += 1
        if self.count == 30:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step(action)


class Hangs(Base):
    """Never answers its 30th step, as a simulator behind a socket may; a file says so."""

    count = 0

    def step(self, action):
        self.count += 1
        if self.count == 30:
            Path(os.environ["ODD_HANGS"]).touch()
            time.sleep(10**6)
        return super().step(action)


class Hermit(Base):
    """Deletes the folder ODD_DELETE with all that is in it at its 30th step."""

    count = 0

    def step(self, action):
        self.count += 1
        if self.count == 30 and os.environ.get("ODD_DELETE"):
            import shutil

            for name in os.listdir(os.environ["ODD_DELETE"]):
                shutil.rmtree(os.path.join(os.environ["ODD_DELETE"], name))
        return super().step(action)


class RareStagger(Stagger):
    """For runs that are stopped: episodes of many lengths, some of which succeed."""

    def obs(self):
        return np.append(super().obs()[:2], np.float32(self.t))


class Bare(Base):
    """No render_fps: pictures, but nobody knows how fast."""

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012


for env in Clock, PythonRandom, Upgraded, EndsSooner, NoLimit, TakesArguments, Signalling, Dies:
    register(env.__name__, env)
for env in Hangs, Hermit, RareStagger, Bare:
    register(env.__name__, env)
register("Sound", Base)


# ---------------------------------------------------------------------------- films
def filmed(name, words, modes=("rgb_array",), picture=None, error=None):
    """It trains, but cannot be filmed."""

    def render(self):
        if error:
            raise error
        return picture

    metadata = {"render_modes": list(modes), "render_fps": 10}
    env = type(name, (Base,), {"metadata": metadata, "render": render})
    FILMED[register(name, env)] = words


filmed("NoRenderMode", ["render"], modes=())
filmed("OnlyHuman", ["render"], modes=("human",))
filmed("RenderNone", ["render"])
filmed("RenderText", ["render"], picture="a picture")
filmed("RenderFlat", ["render"], picture=np.zeros((64, 64), np.uint8))
filmed("RenderList", ["render"], picture=[])
filmed("RenderRaises", ["no screen"], error=RuntimeError("no screen"))
FILMED[register("TakesNoMode", type("TakesNoMode", (Base,), {"__init__": lambda self: None}))] = [
    "render"
]
