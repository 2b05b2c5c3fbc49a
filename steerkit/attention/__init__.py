"""The attention function: read and edit attention, record its weights, map them, rotate keys.

Llama 2 (arXiv 2307.09288), Figure 10, for the maps; RoPE is arXiv 2104.09864.
Begin with `hook.py`: every edit and every recording goes through the one function in it.
"""
