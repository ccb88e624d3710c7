"""The odd environments under a module's name with `maze` in it, by which OGBench's relabelling
takes them for mazes: so mvp_offline_to_online.py finds a dataset's rewards for them."""

import odd_envs  # noqa: F401
