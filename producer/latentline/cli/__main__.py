"""``python -m latentline.cli``."""

from . import main

main()
