"""One text, one reward: every route of benchmarks/one_reward, for a packed decoder and for an encoder."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")
pytest.importorskip("uvicorn", reason="the extra serve is not installed")

from benchmarks.one_reward.__main__ import TOLERANCE, compare, show
from benchmarks.one_reward.routes import ROUTES
from benchmarks.one_reward.setting import Setting, make_cases, serving
from tests.scoring.models import make_checkpoint

# With tools; the encoder's writes the special tokens, as a checkpoint that was trained on chats needs it.
DECODER = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
)
ENCODER = (
    "[CLS]{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}[SEP]"
)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of other packages
@pytest.mark.parametrize(("kind", "template"), [("qwen2", DECODER), ("bert", ENCODER)])
def test_every_route_gives_the_reward_of_plain_transformers(kind: str, template: str, tmp_path: Path) -> None:
    folder, _ = make_checkpoint(kind, tmp_path / "model", style="chat", seed=1, template=template)
    (tmp_path / "scratch").mkdir()
    # Processes of their own load torch again: tests/scoring/test_workers.py compares the files of `--processes`; one
    # model is enough on Ray.
    slow = {"score in two processes", *(["score on Ray"] if kind == "bert" else [])}
    routes = [route for route in ROUTES if route.name not in slow]
    with serving(folder) as url:
        setting = Setting(folder, url, make_cases(), tmp_path / "scratch")
        lines = compare(setting, routes)
        setting.close()
    print(show(lines, setting))  # pytest -s
    assert len({round(reward, 3) for reward in setting.expected}) > 0.8 * len(setting.cases)
    assert not [line for line in lines if not line.skipped and not (line.difference or 0.0) <= TOLERANCE]  # or NaN
