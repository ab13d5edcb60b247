"""Hydra entry of the Bradley-Terry recipe: `python trainer.py KEY=VALUE ...` trains from the trainer.yaml next to it.

The same as `rm-gallery train --config trainer.yaml KEY=VALUE ...`; works under torchrun and by itself.
"""

import sys
from pathlib import Path

from rm_gallery.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]], default_config=str(Path(__file__).with_name("trainer.yaml"))))
