"""Laws that every plug-in must obey, as functions to call from a test of your own kernel, reward or method.

    def test_my_kernel():
        check_kernel(MyKernel(), prompts=["a red cube"])

Each raises `CheckFailed`, an AssertionError, with what was expected and what came; it does so under `python -O` too.
How near is near enough is said in `compare`.
"""

from treesearch.testing.chains import bare_chain, conditioning, noise
from treesearch.testing.compare import LAM, UNSEEN, CheckFailed, Room, require, same_result, same_task
from treesearch.testing.counting import Counting, Tally
from treesearch.testing.drafts import check_drafts
from treesearch.testing.kernels import check_kernel, rounding
from treesearch.testing.methods import check_budget, check_edges, check_method, check_noise
from treesearch.testing.rewards import check_reward, total
from treesearch.testing.stores import check_store, flipped

__all__ = [
    "LAM",
    "UNSEEN",
    "CheckFailed",
    "Counting",
    "Room",
    "Tally",
    "bare_chain",
    "check_budget",
    "check_drafts",
    "check_edges",
    "check_kernel",
    "check_method",
    "check_noise",
    "check_reward",
    "check_store",
    "conditioning",
    "flipped",
    "noise",
    "require",
    "rounding",
    "same_result",
    "same_task",
    "total",
]
