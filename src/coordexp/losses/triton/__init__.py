"""Triton kernels for the two passes of the fused objective. Only :mod:`.fused` is imported from outside."""
