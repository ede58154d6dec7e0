"""What is learnt on top of frozen kernels: policies of their noise. The only room that knows Stable-Baselines3."""
