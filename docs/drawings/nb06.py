"""Where the levers act, along the way of one reply."""

from canvas import BLUE, GREEN, GREY, ORANGE, PINK, RED, Canvas

STATIONS = {  # what a reply passes, and the levers there
    "prompt": (BLUE, "say it again"),
    "attention": (ORANGE, "PASTA\nInstABoost\nSpotLight\nsplit-softmax"),
    "weights": (GREEN, "Ghost\nAttention"),
    "cache": (PINK, "pin the first\nmessage"),
    "prediction": (RED, "guidance"),
}


def draw() -> str:
    desc = (
        "A reply's way from left to right: prompt, attention, weights, cache, prediction. Below "
        "each station the levers that act there: say it again; PASTA, InstABoost, SpotLight and "
        "split-softmax; Ghost Attention; pin the first message; guidance. At the bottom their "
        "prices: tokens, side effects, a training, cache room, a second pass."
    )
    canvas = Canvas(310, title="Where the levers act", desc=desc)
    canvas.text(480, 28, "Five places to keep an instruction", size=22, bold=True)
    width, gap = 160, 32
    for number, (station, (colour, levers)) in enumerate(STATIONS.items()):
        left = 16 + number * (width + gap)
        canvas.box(left, 60, width, 56, station, colour=colour, size=20, bold=True)
        if number:
            canvas.arrow((left - gap + 2, 88), (left - 2, 88), colour=GREY)
        lines = levers.count("\n") + 1
        canvas.text(left + width / 2, 150 + 11 * lines, levers, size=18)
    prices = ("tokens", "side effects", "a training", "cache room", "a second pass")
    for number, price in enumerate(prices):
        middle = 16 + number * (width + gap) + width / 2
        canvas.text(middle, 282, f"price: {price}", size=16, colour=GREY)
    return canvas.svg()
