"""Whether what `treesearch diagnose` suggests is worth its pilot."""
