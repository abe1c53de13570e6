"""Triton kernels for NVIDIA GPUs, one file for each file of plain functions that it speeds up. Needs Triton."""
