"""Clients that ask an OpenAI-compatible endpoint and measure what they see."""
