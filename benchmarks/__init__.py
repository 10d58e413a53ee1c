"""Ours against the peer that a user would pick, on one machine, in one process or run."""
