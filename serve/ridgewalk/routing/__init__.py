"""Which replica takes a request: pure, no Ray, no torch, no clock of its own."""
