"""pytest-benchmark micro-benchmarks of the operators, for work on one kernel: `pytest bench/micro`.

They share their inputs and checks with `macaron-ops bench ops`, which is the place for numbers to tell.
"""
