"""Kernels usable without sfjax."""
