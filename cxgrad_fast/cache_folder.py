"""Where everything lives that may be made again: decoded and drawn images, built operators.

``$CXGRAD_CACHE``, else ``$XDG_CACHE_HOME/cxgrad_fast``, else ``~/.cache/cxgrad_fast``; may be deleted at any time. What
is there is looked at before it is used (:mod:`cxgrad_fast.files`).
"""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path | None:
    """The folder, which need not exist yet; None where the machine names no home."""
    if named := os.environ.get("CXGRAD_CACHE"):
        return Path(named)
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "cxgrad_fast"
    try:
        return Path.home() / ".cache" / "cxgrad_fast"
    except RuntimeError:
        return None
