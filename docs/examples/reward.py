"""A reward of one's own: half a point for a completion whose first code is the target's, a whole one for the target.

python rl.py --plugin docs/examples/reward.py --reward_type first_code,rule:0.5 ...
"""

from minionerec.common.records import SID_TOKEN
from minionerec.training.rewards import register_reward


def build_first_code(inputs):
    """Called once: `inputs` holds the catalogue, the train rows, the device and the files that flags name."""

    def score(completions, example):
        """One number per completion; `example` is the row, with its target's SID, item id and history."""
        first = SID_TOKEN.findall(example.sid)[0]
        return [0.5 * completion.startswith(first) + 0.5 * (completion == example.sid) for completion in completions]

    return score


register_reward("first_code", build_first_code, uses_items=False)
