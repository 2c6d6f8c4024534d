"""A run folder read back: its records, its figures, and one self-contained HTML page.

Reads files only (no torch, no process group), so a report can be made while the run goes on.
"""
