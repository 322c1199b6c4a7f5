"""Runtime checks of shapes and types, for a user who debugs: set `HOOKGRAPH_TYPECHECK=1`.

Every annotation of the package is then checked by jaxtyping and beartype at each call. Off, which is the
default, they cost nothing. This module is imported before any other one of the package.
"""

import os

from jaxtyping import install_import_hook

if os.environ.get("HOOKGRAPH_TYPECHECK", "0") not in ("", "0"):
    install_import_hook("hookgraph", "beartype.beartype")
