"""Whatever is in a cell, a row stays a row of as many cells."""

from outrider.train.heads.tables import table


def test_cells_are_escaped():
    rows = [["a|b", "two\nlines\r\nor three"], [r"c\|d", ""]]
    assert table(["x|y", "z"], rows).splitlines() == [
        r"| x\|y | z |",
        "| --- | --- |",
        r"| a\|b | two lines or three |",
        r"| c\\\|d |  |",
    ]
