"""The embedded models' world: texts without end, and tasks on which the methods are tried.

No paper: the kit made it up, so that every effect shows on a laptop CPU; data/make/ trains on it.
Begin with `world.py` (people, facts, instructions); the other files make each method's data.
"""
