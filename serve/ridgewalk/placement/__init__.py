"""Models, hardware, meshes and memory as data: pure, no torch."""
