"""The harness: measured speed, memory and agreement of macaron_ops against eager PyTorch.

    presets, eager        what is measured, and the eager layers that everything is measured against
    eager_decoders        those of the suite of nGPT
    suites/               the groups of variants: layers, operators, a real model, splitting schemes, particles, nGPT
    studies/              what the suite of schemes finds out beside times: orders, errors, a training check
    correctness           a variant is checked before it is timed
    timing, memory        how one number is taken
    flops, ceilings       what the number is compared with
    environment, results  what a number needs beside it to be worth anything; the JSON file
    runner                prepare, check, time, write: one group of variants after another
    activations           what a layer keeps between its passes, by formula
    compile_ahead         what a run compiles, compiled before it in many processes
    gpu_suite/            all that a GPU is wanted for, in steps that a later call goes on with
    compare, goals, headlines, table, plots, report    what people read

`python -m macaron_ops bench --help` is the way in.
"""

import os

# Kineto, torch's profiler, announces each start and stop on stderr unless told otherwise before its first use.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
