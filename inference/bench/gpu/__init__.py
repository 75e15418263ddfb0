"""Measurements prepared for a GPU, in stages that fit ten minutes each; see docs/gpu.md.

Needs torch, transformers and (on a GPU) triton alone: nothing here imports fire, deepspeed,
datasets or pydantic, and nothing is downloaded. At toy size everything runs on a CPU, which proves
that it runs and measures nothing.
"""
