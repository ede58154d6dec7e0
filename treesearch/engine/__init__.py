"""The only caller of kernels and rewards: segments of all tasks in full batches."""
