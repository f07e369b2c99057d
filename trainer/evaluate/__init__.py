"""Figures of a trained codec on held-out clips, beside other codecs, between a ceiling and two floors.

The ceiling is the AudioAE alone; the floors are a decode from another clip's z, which tells "follows the source" from
"plausible", and an unconditional sample. Each system of ours has its own such control beside each figure.

    clips.py      what is scored                      report.py      pieces → means, intervals, differences
    ours.py       our codecs as rows                  bootstrap.py   the intervals
    others.py     codecs by others (`baselines/`)     tables.py      text, Markdown, LaTeX
    scores.py     sounds → figures of a block         embedding.py   what distances of sets are taken over
    pieces.py     what is done already                run.py         the evaluation, whole or in parts
"""
