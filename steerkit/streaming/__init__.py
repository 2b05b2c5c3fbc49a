"""StreamingLLM: a bounded KV cache that keeps the first tokens, and what it costs and saves.

arXiv 2309.17453; a sink grown from nothing, in `backcopy.py`, is arXiv 2410.13835.
Begin with `sink_cache.py`, whose docstring draws the slots, then `losses.py`.
"""
