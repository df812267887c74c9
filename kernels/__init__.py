"""Triton kernels, installed as `mokd_fast.kernels`."""
