"""The rewards of a reward model in OpenRLHF, in the process of the rollouts.

    REWARD_MODEL=checkpoints/bt/my-rm python -m openrlhf.cli.train_ppo_ray \\
        --reward.remote_url examples/openrlhf_reward_func.py ...

With a server instead, which all rollouts share, no file is needed:

    rm-gallery serve checkpoints/bt/my-rm
    python -m openrlhf.cli.train_ppo_ray --reward.remote_url http://127.0.0.1:8000/get_reward ...
"""

from __future__ import annotations

import os

from rm_gallery.integrations.openrlhf import reward_function

reward_func = reward_function(os.environ["REWARD_MODEL"], device=os.environ.get("REWARD_DEVICE", "auto"))
