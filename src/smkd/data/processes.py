"""Worker processes that end with the process that started them."""

from __future__ import annotations

import multiprocessing
import os
import threading
from multiprocessing.connection import wait


def end_with_parent(_: int = 0) -> None:
    """End this process when its parent is killed; nobody else would. For the start of a worker, whatever its number.

    The watch of PyTorch's loaders misses a kill while they start, and one while a worker is busy for long.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
