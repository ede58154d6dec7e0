"""Processes beyond plain diffusion: trained models of them, and what holds."""
