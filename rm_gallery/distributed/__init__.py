"""Processes of a run: process group, collectives, watchdog, and CPU settings."""
