"""Settings of every test process, before anything imports torch or asks the Hub."""

import gc
import os

# Two workers share two cores, and sums must not depend on how many cores there are.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# The suite compares with references on the CPU, bit for bit: a GPU is out of sight but for the tests that need one.
if os.environ.get("SLSAM_TEST_GPU") != "1":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

# Imports make half a million objects that stay. They are collected once, in `pytest_collection_finish`.
gc.disable()


def pytest_collection_finish() -> None:
    """Take what was imported out of the garbage collector's sight.

    A training collects garbage at its end, and went over every object of torch, transformers and TRL each time: more
    than half of the CPU time of a training of three steps.
    """
    gc.collect()
    gc.freeze()
    gc.enable()
