"""Measuring a machine: what its ranks reach with the kernels and the transport that they serve with."""
