"""What follows a run beside its loss: each has its own state, and is told of events as transformers tells its
callbacks.

They come before all other callbacks, in this order: at the end of an optimizer step the average follows the trained
weights before anything is evaluated or saved, and at the end of training the pictures are drawn from it before the
trackers close. `SaveAndStop` comes after all others: it has the last word on what follows a step.
"""

from .metrics import Metrics
from .moving_average import MovingAverage
from .nan_policy import NaNPolicy
from .pictures import Pictures
from .save_and_stop import SaveAndStop

__all__ = ["Metrics", "MovingAverage", "NaNPolicy", "Pictures", "SaveAndStop"]
