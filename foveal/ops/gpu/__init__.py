"""Kernels for CUDA GPUs, in Triton and, for Hopper, in Gluon with a Triton twin beside each.

Nothing here decides: the operations of `foveal.ops` route to these and say why (`foveal.ops.which`).
"""
