"""Lets the tests here import the toys that several of them share, such as `llava_style_toys`."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
