"""A baseline of your own: items that are often in the same histories, newest history item first.

python baselines.py --plugin docs/examples/baseline.py --names popularity,together ...
python evaluate.py --plugin docs/examples/baseline.py --fuse together --fuse_weight 0.1 ...
"""

from __future__ import annotations

from collections import Counter, defaultdict

from minionerec.recommenders.registry import BaselineInputs, Likelihoods, register_baseline


def build_together(inputs: BaselineInputs) -> Likelihoods:
    """Called once; what it returns is called with many histories of item ids, oldest first."""
    together: dict[int, Counter] = defaultdict(Counter)
    for row in inputs.train_rows:
        for item in set(row.history_ids):
            together[item][row.item_id] += 1
    item_ids = set(inputs.catalogue.item_ids)

    def predict(histories):
        likelihoods = []
        for history in histories:
            scores: Counter = Counter()
            for age, item in enumerate(reversed(history)):
                for candidate, count in together[item].items():
                    if candidate in item_ids:
                        scores[candidate] += 0.7**age * count
            total = sum(scores.values()) or 1.0
            likelihoods.append({candidate: score / total for candidate, score in scores.items()})
        return likelihoods

    return predict


register_baseline("together", build_together)
