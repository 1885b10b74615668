"""A few corrupt examples may be left out; each is said."""

import sys
import threading
from collections.abc import Hashable

from tljax.types import BadInput


class Allowance:
    """How many corrupt examples may be left out, and which ones were."""

    def __init__(self, most: int):
        """Allow so many: data.max_corrupt."""
        self.most = most
        self.corrupt: set[Hashable] = set()
        self._lock = threading.Lock()

    def leave_out(self, example: Hashable, error: BadInput) -> None:
        """Leave an example out, said the first time; raises BadInput for one too many."""
        if not self.most:
            raise error
        with self._lock:
            if example in self.corrupt:
                return
            count, reason = len(self.corrupt) + 1, str(error).partition("\n")[0]
            if count > self.most:
                raise BadInput(
                    f"{count} examples are corrupt, more than data.max_corrupt={self.most}; "
                    f"the last one: {reason}"
                )
            self.corrupt.add(example)
            print(f"left out, {count} of data.max_corrupt={self.most}: {reason}", file=sys.stderr)
