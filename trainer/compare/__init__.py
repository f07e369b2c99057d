"""Compares runs: what differs in their settings, their figures, curves and sounds, as tables and as one page."""
