"""Triton kernels for GPUs from sm_70. Each module has the functions of the operation's compiled modules, under the same
names.

`TRITON_INTERPRET=1`, set before the first import, runs them on CPU tensors; that is how they are tested without a GPU.
"""
