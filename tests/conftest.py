"""The suite runs on the CPU, also on machines that have GPUs: its layouts need more processes than those."""

import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""
