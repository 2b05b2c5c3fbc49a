"""Notebook 05: when the copying head is on, when it is off, and what the sink holds back."""

from canvas import BLACK, BLUE, GREEN, GREY, ORANGE, RED, Canvas

TITLE = "A head that cannot switch itself off parks its weight on S"
DESC = (
    "Above, a stream of eight tokens: S, a, b, a trigger, b again, c, a trigger, c again. Each "
    "trigger reads the token before it, which is then repeated: the head is on. All other tokens "
    "read S, which says nothing: the head is off. Below, one idle token's attention weights as a "
    "bar: with S, 99 percent lie on S and one percent on the other tokens: the output is silent. "
    "With S evicted, the same one percent is spread over the whole bar, and the output is loud."
)
STREAM = ["S", "a", "b", "▲", "b", "c", "▲", "c"]
TRIGGERS, WIDTH, GAP, TOP = (3, 6), 72, 14, 118


def draw() -> str:
    canvas = Canvas(480, title=TITLE, desc=DESC)
    canvas.text(30, 24, "A stream, and what its one head reads", anchor="start", bold=True)
    colours = {0: GREEN, **dict.fromkeys(TRIGGERS, ORANGE)}
    at = canvas.tokens(30, TOP, STREAM, width=WIDTH, gap=GAP, colours=colours, size=18)
    for place, x in enumerate(at[1:], start=1):
        if place in TRIGGERS:  # to the token before
            canvas.arrow((x, TOP + 42), (at[place - 1], TOP + 42), colour=ORANGE, width=4, bend=22)
        else:
            canvas.arrow((x, TOP - 2), (at[0], TOP - 4), colour=GREEN, bend=-5 - 6 * place)
    off = "idle token: reads S,\nwhich says nothing\n(head off)"
    on = "trigger ▲: reads the\ntoken before it, to\nrepeat it (head on)"
    canvas.text(740, TOP - 16, off, anchor="start", colour=GREEN)
    canvas.text(740, TOP + 62, on, anchor="start", colour="#8a5f00")
    canvas.line([(30, 232), (930, 232)], colour="#d0d0d0")
    words = "One idle token: its weights add up to one, whatever happens"
    canvas.text(30, 258, words, anchor="start", bold=True)
    _bar(canvas, 290, "S kept", 0.99, "output: silent", BLUE)
    _bar(canvas, 400, "S evicted", 0.0, "output: loud", RED)
    canvas.line([(704, 336), (142, 398)], colour=RED, dashed=True)
    canvas.line([(709, 336), (709, 398)], colour=RED, dashed=True)
    words = "the last 1 %, stretched"
    canvas.text(700, 374, words, anchor="end", halo=True, colour=RED)
    return canvas.svg()


def _bar(canvas: Canvas, top: float, name: str, on_sink: float, output: str, colour: str) -> None:
    """One bar of weights: the part on S, the rest, and what the head says."""
    canvas.text(30, top + 22, name, anchor="start")
    left, width = 140, 570
    canvas.box(left, top, width, 44, colour=colour)
    if on_sink:
        words = f"weight on S: {on_sink:.2f}   (value of S: 0)"
        canvas.box(left, top, width * on_sink - 2, 44, words, colour=GREEN)
    else:
        canvas.text(left + width / 2, top + 22, "weight on the other tokens: 1.00")
    ink = GREY if on_sink else BLACK
    canvas.text(left + width + 20, top + 22, output, anchor="start", bold=True, colour=ink)
