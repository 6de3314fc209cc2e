"""Process groups over a mesh and timed collectives."""
