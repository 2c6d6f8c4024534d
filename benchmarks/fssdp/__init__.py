"""Experts placed where the load is."""
