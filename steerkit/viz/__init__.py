"""Figures with captions and alternative text, attention as HTML, and sliders for notebooks.

The heat maps follow Llama 2 (arXiv 2307.09288), Figure 10.
Begin with `plots.py` (`show` writes a figure and its values), then `html.py` and `widgets.py`.
"""
