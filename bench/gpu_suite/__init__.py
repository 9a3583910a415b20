"""`macaron-ops gpu-suite`: all that a GPU is wanted for, in one command, for a machine that has one for minutes.

steps       what is done, the most telling first
record      what a step left in the folder, and whether it still holds
run         one step after another, each a process of its own with a limit of time
gpu_tests   the tests marked `gpu`, in several processes
summary     what the steps found: summary.md, summary.json, results.json, report.html
"""
