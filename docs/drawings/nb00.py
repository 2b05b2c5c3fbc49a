"""One row of attention weights, and the three ways in which the kit changes it."""

from canvas import BLACK, BLUE, GREEN, GREY, ORANGE, Canvas

KEYS = ("[first]", "chess", "Anna", "live")
PLAIN = (0.50, 0.10, 0.25, 0.15)
ALPHA = 0.1


def scaled(weights: tuple[float, ...], factors: tuple[float, ...]) -> list[float]:
    """Weights times factors, renormalised."""
    products = [w * f for w, f in zip(weights, factors, strict=True)]
    return [p / sum(products) for p in products]


PANELS = {
    "plain": ("no change", PLAIN, GREY, "softmax of the scores", "every notebook"),
    "train": ("1. train", (0.30, 0.55, 0.10, 0.05), BLUE, "new queries, keys,\nvalues", "GAtt: 01"),
    "bias": (
        "2. bias",
        scaled(PLAIN, (ALPHA, 1, ALPHA, ALPHA)),
        ORANGE,
        "all but 'chess' × 0.1,\nthen sum to 1",
        "PASTA: 03",
    ),
    "evict": (
        "3. evict",
        scaled(PLAIN, (0, 1, 1, 1)),
        GREEN,
        "'[first]' dropped: the\nothers × 1 / (1 - 0.5)",
        "StreamingLLM: 04",
    ),
}


def draw() -> str:
    rows = "; ".join(
        f"{title}: " + ", ".join(f"{key} {w:.2f}" for key, w in zip(KEYS, weights, strict=True))
        for title, weights, *_ in PANELS.values()
    )
    canvas = Canvas(
        420,
        title="One row of attention weights, and three ways to change it",
        desc="Made-up weights with which 'love' in the reply 'I love ...' looks at four tokens, "
        f"as four bar charts that each sum to one. {rows}.",
    )
    canvas.text(480, 26, "'I love ...': where 'love' looks (made-up weights)", size=22, bold=True)
    for number, (title, weights, colour, how, who) in enumerate(PANELS.values()):
        left = 12 + 240 * number
        canvas.text(left + 108, 66, title, size=20, bold=True, colour=colour)
        canvas.line([(left, 290), (left + 216, 290)], colour=BLACK)
        for key, (word, weight) in enumerate(zip(KEYS, weights, strict=True)):
            x, height = left + 4 + 54 * key, 260 * weight
            if weight:
                canvas.box(x + 4, 290 - height, 38, height, colour=colour)
            canvas.text(x + 23, 276 - height, f"{weight:.2f}".lstrip("0") if weight else "gone")
            canvas.text(x + 23, 308, word, size=16)
        canvas.text(left + 108, 354, how, size=17)
        canvas.text(left + 108, 398, who, size=17, colour=colour, bold=True)
    return canvas.svg()
