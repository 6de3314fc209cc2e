"""Ridgewalk: serve reasoning LLMs on a Ray cluster, between the capacity cliff and the synchronization cliff."""

__version__ = "0.1.0"
