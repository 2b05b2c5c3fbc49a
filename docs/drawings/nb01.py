"""Notebook 01: how Ghost Attention makes a training row, and what may stand in its history."""

from canvas import GREEN, GREY, ORANGE, PALE, RED, Canvas

DESC = (
    "Three strips of one dialogue of three turns. Strip 1, sample: the instruction stands before "
    "each of the three user messages, and all replies obey. Strip 2, strip: the instruction stays "
    "in the first message only. Strip 3, teach: only the last reply carries loss; the replies "
    "before it are grey. Below, what the grey replies may be: the model's own, which obey (the "
    "paper); neutral ones, which ignore the instruction; competing ones, which obey another one."
)
WIDE, HIGH = 120, 44


def draw() -> str:
    canvas = Canvas(460, title="Ghost Attention: three moves, and whose history", desc=DESC)
    _strip(canvas, 30, "1  sample", instructed=(0, 1, 2), taught=(0, 1, 2))
    _strip(canvas, 120, "2  strip", instructed=(0,), taught=(0, 1, 2))
    _strip(canvas, 210, "3  teach", instructed=(0,), taught=(2,))
    canvas.text(872, 275, "the loss", size=18, colour=GREEN, bold=True)
    canvas.bracket(261, 658, 262, "the replies before may be anything:", size=18)
    entries = {"own (the paper)": GREEN, "neutral": GREY, "competing": RED}
    for n, (words, colour) in enumerate(entries.items()):
        canvas.box(205 + 220 * n, 335, 200, 44, words, colour=colour, size=18)
    examples = ("Lisbon. I love chess.", "Lisbon.", "Lisbon. I love tennis.")
    for n, words in enumerate(examples):
        canvas.text(305 + 220 * n, 400, words, size=16, colour=GREY)
    canvas.text(
        480, 438, "Only with the first kind can the last reply be copied.", size=18, bold=True
    )
    return canvas.svg()


def _strip(
    canvas: Canvas, y: float, name: str, *, instructed: tuple[int, ...], taught: tuple[int, ...]
) -> None:
    """Three turns in a row: user messages, `instructed` or not, and replies, green if taught."""
    canvas.text(20, y + HIGH / 2, name, size=20, anchor="start", bold=True)
    for turn in range(3):
        x = 135 + 277 * turn
        told = turn in instructed
        colour = ORANGE if told else PALE
        canvas.box(x, y, WIDE, HIGH, "chess! + ?" if told else "?", colour=colour, size=18)
        colour = GREEN if turn in taught else PALE
        canvas.box(x + WIDE + 6, y, WIDE, HIGH, f"reply {turn + 1}", colour=colour, size=18)
