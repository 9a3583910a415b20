"""Triton kernels and their launchers, one file per operator.

``kernels/ffn_step.py`` serves the operator ``ffn_step``: the backend table finds a file by its operator's name. A
file opens with the formula, the traffic and the limit; then come the jit functions and one launcher, forward and
backward. A kernel knows tensors and numbers only: nothing here imports another room of the package.
"""
