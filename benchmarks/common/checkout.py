"""Makes `import nemodiff` work from a checkout that is not installed. Import it first.

The repository's root is the package, so no entry of PYTHONPATH alone can name it.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

if importlib.util.find_spec("nemodiff") is None:
    spec = importlib.util.spec_from_file_location(
        "nemodiff", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    assert spec is not None
    assert spec.loader is not None
    sys.modules["nemodiff"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["nemodiff"])
