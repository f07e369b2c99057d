"""Scores a trained codec on held-out clips and compares it with other codecs, a ceiling and two floors.

The ceiling is the AudioAE alone. One floor is a decode from another clip's z, which shows whether a codec follows its
source or only sounds plausible; the other is an unconditional sample. Each of our systems also has a control of its
own: the same system, decoded from another clip's z or codes.

    evaluation.py     the evaluation, whole or in parts      scored_clips.py    the held-out clips and their blocks
    under_test.py     the interface of a scored system       pieces.py          results of finished blocks, on disk
    own_codecs.py     our codecs as systems                  report.py          pieces → means, intervals, differences
    other_codecs.py   codecs by others as systems            bootstrap.py       confidence intervals
    baselines/        the codecs by others                   systems.py         a row of the tables, ranges of bit rates
    scores.py         decodes of a block → its figures       tables.py          text, Markdown and LaTeX tables
    figures.py        the figures themselves                 listening_test.py  a blind listening test
    embeddings/       embeddings for distances of sets and for retrieval
"""
