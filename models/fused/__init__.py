"""Parts of the models that take one kernel of a GPU each, in place of many: functions with kernels in Triton.

Each function has a plain form in torch's own operations, which CPUs take, and which `torch.compile` fuses by itself.
"""
