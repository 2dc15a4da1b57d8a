"""MiniOneRec: generative recommendation over semantic IDs.

from minionerec import Recommender
recommender = Recommender.load("output/rl/final_checkpoint")
recommender.recommend([["first title", "second title"]], k=10)
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minionerec.evaluation.recommender import Recommendation, Recommender

__all__ = ["Recommendation", "Recommender"]


def __getattr__(name: str) -> Any:
    """Names that take seconds to import are imported when they are asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from minionerec.evaluation import recommender

    return getattr(recommender, name)
