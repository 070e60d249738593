"""Share a run on the Hugging Face Hub and get one from there: `push` and `pull`, safe to repeat after any interruption.

A dataset repository holds the tables under the names they have in a run, a card that says what they are, and one
index, `fire/manifest.json`. Tables go first and the index last; what the index does not name does not exist.
"""

from fire_data.hub.pull import pull
from fire_data.hub.push import push

__all__ = ["pull", "push"]
