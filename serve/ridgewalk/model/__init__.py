"""Decoder layers, weights and sampling in torch."""
