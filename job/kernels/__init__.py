"""Triton kernels. Beside each use stands the same in plain torch, which a CPU takes; they are imported on a GPU only.

They read and write what they need once, where torch's chains write every step of a formula to memory. Arithmetic is
fp32, rounded where the chains round.
"""
