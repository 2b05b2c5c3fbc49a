"""PASTA: steer some attention heads towards a span of the prompt, and search which heads.

arXiv 2311.02262; the methods it is compared with are in `other_methods.py`, each with its paper.
Begin with `pasta.py` (`emphasise`), then `head_search.py` (Algorithm 1).
"""
