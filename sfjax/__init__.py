"""Sparse Forcing: real-time autoregressive video diffusion in JAX."""
