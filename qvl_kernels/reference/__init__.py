"""Plain PyTorch: the definition of every operation, and the fallback where nothing faster runs.

Each module is the equation of its operation and nothing else. Shapes are checked by the caller (`qvl_kernels/<op>.py`).
"""
