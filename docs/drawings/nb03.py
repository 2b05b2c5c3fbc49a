"""PASTA: one row of weights before and after, and the search for the heads to steer."""

from canvas import BLACK, BLUE, GREY, ORANGE, PALE, WHITE, Canvas

PLAIN, STEERED = (0.58, 0.21, 0.13, 0.08), (0.04, 0.02, 0.94, 0.01)
SPAN = 2  # the key that is emphasised
BEST = {(2, 0): 1, (2, 2): 0.7, (4, 4): 0.9, (1, 3): 0.6}  # four heads of a made-up search
GRID = 6


def bars(canvas: Canvas, left: float, title: str, weights: tuple[float, ...]) -> None:
    canvas.text(left + 92, 74, title, size=18, bold=True)
    canvas.line([(left, 280), (left + 184, 280)], colour=BLACK)
    for key, weight in enumerate(weights):
        x, height = left + 6 + 45 * key, 170 * weight
        canvas.box(x, 280 - height, 36, height, colour=ORANGE if key == SPAN else GREY)
        canvas.text(x + 18, 266 - height, f"{weight:.2f}".lstrip("0"), size=16)
    canvas.text(left + 114, 298, "span", size=16, colour=ORANGE, bold=True)


def draw() -> str:
    canvas = Canvas(
        400,
        title="PASTA steers a few heads, and a search says which",
        desc="Left: four attention weights of a head, .58, .21, .13 and .08. The third key is the "
        "emphasised span. Multiplied by alpha = 0.01 outside the span and renormalised they are "
        ".04, .02, .94 and .01. Right: the search in three steps. Steer each head alone on "
        "profiling prompts; rank the heads and take the best four, framed in a grid of layers and "
        "heads; test them on other prompts.",
    )
    canvas.text(215, 28, "A steered head", size=20, bold=True)
    bars(canvas, 14, "plain", PLAIN)
    canvas.arrow((206, 190), (244, 190), colour=ORANGE, width=3)
    bars(canvas, 252, "steered", STEERED)
    canvas.text(225, 356, "weights outside the span × 0.01,\nthen the row sums to 1 again", size=17)

    canvas.line([(470, 20), (470, 384)], colour=PALE)
    canvas.text(715, 28, "Which heads? Search", size=20, bold=True)
    canvas.box(492, 120, 130, 110, "1. profile:\nsteer each\nhead alone", colour=BLUE, size=17)
    for layer in range(GRID):
        for head in range(GRID):
            strength = BEST.get((layer, head))
            colour = BLUE if strength else PALE
            canvas.box(
                650 + 22 * head, 109 + 22 * layer, 18, 18,
                colour=colour, fill=BLUE if strength else WHITE,
            )  # fmt: skip
    canvas.text(715, 84, "2. rank, take four", size=17)
    canvas.text(715, 262, "6 layers × 6 heads", size=16, colour=GREY)
    canvas.box(812, 120, 134, 110, "3. test the\nfour on other\nprompts", colour=ORANGE, size=17)
    canvas.arrow((622, 175), (646, 175))
    canvas.arrow((784, 175), (810, 175))
    canvas.text(
        715, 340,
        "Score: log-probability of the right answer.\nNobody in a profiling prompt\n"
        "appears in a test prompt.",
        size=17,
    )  # fmt: skip
    return canvas.svg()
