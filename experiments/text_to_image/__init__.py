"""Text-to-image benchmarks."""
