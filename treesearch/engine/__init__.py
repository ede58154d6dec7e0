"""The only caller of kernels and rewards: segments of all tasks in full batches.

`engine` is the loop, `model` what it asks, `segments` what it is asked for; it knows no method, no disk and no Ray.
"""
