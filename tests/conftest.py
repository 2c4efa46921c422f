"""Settings of every test process, before anything imports torch or asks the Hub."""

import os

# Two workers share two cores, and sums must not depend on how many cores there are.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
