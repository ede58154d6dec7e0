"""Samples as files of their kind, and contact sheets; knows neither searches nor results."""
