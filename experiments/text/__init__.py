"""Text: what small masked language models are trained on, and how."""
