"""Text: kernels on masked (and uniform) language diffusion, what is clamped in them, and how checkpoints are read."""
