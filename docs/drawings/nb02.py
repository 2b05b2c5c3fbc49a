"""Notebook 02: from all maps of a network to one, and what its bright column leaves open."""

from canvas import BLUE, GREEN, GREY, ORANGE, RED, Canvas, tint

DESC = (
    "Left: a stack of attention maps, one for each layer and head. An arrow labelled maximum, "
    "binned by turn, leads to one map with a row for each reply and a column for each turn. Its "
    "first column, the instruction, is bright from top to bottom. Right: two dialogues with the "
    "same bright column. In the first the reply of turn 8 obeys, in the second it does not. The "
    "map is the same, the replies are not."
)


def draw() -> str:
    canvas = Canvas(400, title="What an attention map tells, and what it does not", desc=DESC)
    _stack(canvas, 30, 120)
    canvas.text(105, 60, "one map for each\nlayer and head", size=18)
    canvas.arrow((205, 200), (330, 200), width=3, colour=GREY)
    canvas.text(268, 150, "maximum,", size=18)
    canvas.text(268, 240, "one bin\na turn", size=18)
    _map(canvas, 350, 95, 30, 7)
    canvas.text(365, 75, "instruction", size=18, colour=BLUE, bold=True, anchor="start")
    canvas.text(455, 335, "turn that is read", size=16, colour=GREY)
    canvas.text(455, 366, "row: the reply that reads", size=16, colour=GREY)
    _reply(canvas, 70, "weight 0.9", "obeys", GREEN, "Lisbon. I love chess.")
    _reply(canvas, 225, "weight 0.9", "does not obey", RED, "Lisbon.")
    canvas.text(770, 375, "The map does not tell which.", size=18, bold=True)
    return canvas.svg()


def _stack(canvas: Canvas, x: float, y: float) -> None:
    for n in range(4):
        canvas.box(x + 14 * n, y + 22 * n, 100, 90, colour=GREY, fill=tint(GREY, 0.12 * (n + 1)))


def _map(canvas: Canvas, x: float, y: float, cell: float, turns: int) -> None:
    """A causal map of `turns` rows: the first column and the diagonal are bright."""
    for row in range(turns):
        for column in range(row + 1):
            colour = BLUE if column == 0 else ORANGE if column == row else GREY
            strength = 0.9 if column == 0 else 0.6 if column == row else 0.15
            place = (x + cell * column, y + cell * row, cell - 2, cell - 2)
            canvas.box(*place, colour=colour, fill=tint(colour, strength))


def _reply(canvas: Canvas, y: float, weight: str, verdict: str, colour: str, words: str) -> None:
    canvas.box(590, y, 132, 46, "Hobby: chess.", colour=BLUE, size=16)
    canvas.box(765, y + 60, 190, 46, words, colour=colour, size=16)
    canvas.arrow((765, y + 75), (722, y + 30), colour=BLUE, width=5)
    canvas.text(690, y + 85, weight, size=16, colour=BLUE)
    canvas.text(860, y + 36, verdict, size=18, colour=colour, bold=True)
