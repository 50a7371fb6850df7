"""Run train_direct.py, the refill's way of computing forced: forced_way.py {scoring,straight,reckless,auto} [...]."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common
import train_direct

# A cost of None has no straight way; at a cost of hardly more than 1, straight pays at every accept rate.
BACKWARD_COST = {"scoring": None, "straight": 1.0000001, "reckless": 3, "auto": 3}


class Forced:
    """A context in which every Refill computes in this way. Reckless: straight, even where the epoch is about to end
    and cannot fill the step, so that gradients have to be discarded."""

    def __init__(self, way):
        self.way = way

    def __enter__(self):
        self.saved = common.Refill.__init__, common.Refill.straight_pays
        initialise, way = common.Refill.__init__, self.way

        def forced(refill, *arguments, backward_cost, **more):
            initialise(refill, *arguments, backward_cost=BACKWARD_COST[way], **more)

        common.Refill.__init__ = forced
        if way == "reckless":
            common.Refill.straight_pays = lambda refill, room, rate: True

    def __exit__(self, *error):
        common.Refill.__init__, common.Refill.straight_pays = self.saved


if __name__ == "__main__":
    with Forced(sys.argv[1]):
        train_direct.main(sys.argv[2:])
