"""The fused decoder: whole layers as one autograd function each, with kernels written for this work."""
