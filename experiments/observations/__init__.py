"""Observations and experts: what steering by a measurement, or by a noise-aware value, is worth."""
