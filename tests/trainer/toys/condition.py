"""An example of a second condition of D, part one: the reader, which takes the condition from the samples' metadata."""

from __future__ import annotations

import torch

from trainer.data.conditions import ConditionReader


class GainReader(ConditionReader):
    """The gain by which `prepare` levelled a sound, in units of 20 dB, as D's `gain` (b,)."""

    def found_in(self, sets):
        return True

    def blank(self, size):
        return {"gain": torch.zeros(size)}

    def fill(self, into, shard_set, *, ids, rows, positions, note):
        for id_, row in zip(ids.tolist(), rows.tolist(), strict=True):
            into["gain"][row] = shard_set.metadata(id_)["gain_db"] / 20
