"""The rewards of a reward model in OpenRLHF, in the process of the rollouts, or from several servers.

    REWARD_MODEL=checkpoints/bt/my-rm python -m openrlhf.cli.train_ppo_ray \\
        --reward.remote_url examples/openrlhf_reward_func.py ...

REWARD_MODEL=http://a:8000,http://b:8000 uses these servers in turn, with retries. One server, which all rollouts share,
needs no file:

    rm-gallery serve checkpoints/bt/my-rm
    python -m openrlhf.cli.train_ppo_ray --reward.remote_url http://127.0.0.1:8000/get_reward ...
"""

from __future__ import annotations

import os

from rm_gallery.integrations.openrlhf import reward_function

model = os.environ["REWARD_MODEL"]
device = {} if model.startswith("http") else {"device": os.environ.get("REWARD_DEVICE", "auto")}
reward_func = reward_function(model, **device)
