"""The operators `torch.ops.zemoe.*`: shapes for tracing, hand-written gradients, and a kernel for each device."""
