"""Conditions x seeds: plan, run, resume, tune, compare and report many runs as one."""
