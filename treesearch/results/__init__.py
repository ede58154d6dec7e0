"""What a search found, and what may be claimed of it."""
