"""Notebook 04: four ways to read token 8 of a stream, after Figures 1 and 4 of StreamingLLM."""

from collections.abc import Sequence

from canvas import BLUE, GREEN, GREY, ORANGE, RED, Canvas

TITLE = "Four caches: what the newest token sees, and at which position"
DESC = (
    "Four rows over the same stream of nine tokens, 0 to 8, with room for six of them. Dense keeps "
    "all nine, at positions 0 to 8: beyond the trained length it fails. Window keeps tokens 3 to 8 "
    "at positions 0 to 5: the first token is gone, it fails. Re-computation reads tokens 3 to 8 "
    "afresh for each new token: token 3 becomes a first token, it works and is slow. StreamingLLM "
    "keeps tokens 0 and 1, the sinks, and 5 to 8, at positions 0 to 5: it works and is fast."
)
TOKENS, TRAINED = 9, 6
WIDTH, GAP, LEFT, HIGH, STEP = 46, 6, 204, 36, 104
# name, kept tokens, sinks among them, colour, verdict
ROWS = (
    ("dense", range(9), 0, BLUE, "beyond the trained\nlength: fails"),
    ("window", range(3, 9), 0, BLUE, "first token gone:\nfails"),
    ("re-computation", range(3, 9), 0, ORANGE, "all made afresh for\neach token: slow"),
    ("StreamingLLM", (0, 1, 5, 6, 7, 8), 2, BLUE, "sinks stay, the rest\nmoves up: works"),
)


def draw() -> str:
    canvas = Canvas(500, title=TITLE, desc=DESC)
    words = "A stream of nine tokens; the model was trained on six"
    canvas.text(30, 24, words, anchor="start", bold=True)
    for number, row in enumerate(ROWS):
        _row(canvas, 52 + STEP * number, *row)
    entries = {"sink": GREEN, "kept": BLUE, "computed anew each time": ORANGE}
    canvas.legend(30, 478, entries)
    canvas.box(500, 469, 18, 18, colour="#d0d0d0", fill="#ffffff", dashed=True)
    canvas.text(526, 478, "evicted: gone, not masked", anchor="start", size=16)
    return canvas.svg()


def _row(
    canvas: Canvas,
    top: float,
    name: str,
    kept: Sequence[int],
    sinks: int,
    colour: str,
    verdict: str,
) -> None:
    """Tokens on top; under the kept ones their positions."""
    canvas.text(30, top + HIGH / 2, name, anchor="start", bold=True)
    look = {"width": WIDTH, "height": HIGH, "gap": GAP, "size": 18}
    colours = {token: GREEN if slot < sinks else colour for slot, token in enumerate(kept)}
    gone = [token for token in range(TOKENS) if token not in kept]
    tokens = [str(token) for token in range(TOKENS)]
    middles = canvas.tokens(LEFT, top, tokens, colours=colours, faded=gone, **look)
    canvas.text(30, top + 58, "position", anchor="start", size=16, colour=GREY)
    for slot, token in enumerate(kept):
        ink = RED if slot >= TRAINED else GREY
        canvas.text(middles[token], top + 58, str(slot), size=18, colour=ink, bold=ink == RED)
    canvas.text(LEFT + TOKENS * (WIDTH + GAP) + 24, top + HIGH / 2 + 6, verdict, anchor="start")
