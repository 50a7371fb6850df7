"""Run train_direct.py with the refill's way of computing forced: forced_way.py {scoring,straight,auto} [arguments]."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common
import train_direct

# A cost of None has no straight way; at a cost of hardly more than 1, straight pays at every accept rate.
BACKWARD_COST = {"scoring": None, "straight": 1.0000001, "auto": 3}


def force(way):
    initialise = common.Refill.__init__

    def forced(self, *arguments, backward_cost, **more):
        initialise(self, *arguments, backward_cost=BACKWARD_COST[way], **more)

    common.Refill.__init__ = forced
    return initialise


if __name__ == "__main__":
    force(sys.argv[1])
    train_direct.main(sys.argv[2:])
