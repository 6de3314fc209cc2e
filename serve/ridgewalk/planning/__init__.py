"""Which placement suits a model, hardware and workload: simulated with the engine's own scheduler.

Above `engine` (whose `Scheduler` it drives with a virtual clock) and `placement` (what models, hardware and steps
cost), below the command line. Pure but for the command itself: no torch, no Ray, no clock.
"""
