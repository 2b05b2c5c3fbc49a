"""Ghost Attention (GAtt): train a chat model to keep an instruction that was given once.

Llama 2 (arXiv 2307.09288), section 3.3 and Table 30.
Begin with `dialogues.py` (sampling and rows), then `training.py` and `evaluation.py`.
"""
