"""Makes `lit_small` importable for the tests and for the scripts that run in processes of their own."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
