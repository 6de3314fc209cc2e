"""Kernels of the decoder layers: the torch reference, C++ for the CPU, Triton for GPUs."""
