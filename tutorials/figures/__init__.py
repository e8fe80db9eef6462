"""The published claims of arXiv 2512.01374 in miniature, with seeds and intervals.

    python tutorials/figures core      # run the grid; again: go on where it was interrupted
    python tutorials/figures report    # verdicts and pictures from what there is
    python tutorials/figures corrections    # masks, objectives, gate weights, old rollouts: no claim asks for them
    python tutorials/figures moving    # another kind of picture: one response, and whose experts it meets

Which runs there are, and why: grid. How one is made and kept: runner. What is read off it: outcomes.
What is claimed, and how a verdict is decided: claims, with intervals. What a correction does to a
gradient, without training: mechanism. Pictures: drawing; the one that moves: moving, and
browser, which looks at it.
"""
