"""Scheduling and the KV cache: pure, no torch, no Ray, no clock of its own."""
