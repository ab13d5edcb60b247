"""Types without a sequence classification class: trained and exported with a class that plain transformers can load."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.small_models import save_language_model
from rm_gallery.data.batching.packed_batch import collate
from rm_gallery.errors import UserError
from rm_gallery.modeling.export import InputRecord
from rm_gallery.modeling.generic_class import CODE_FILE
from rm_gallery.modeling.model_folder import check_class, quiet_transformers, read_model_config
from rm_gallery.modeling.reward_model import load_reward_model
from rm_gallery.scoring.scorer import RewardScorer
from tests.small import chat_pairs, export_model, make_tokenizer, random_groups, whole_texts


def class_of_the_folder(folder: Path) -> Any:
    """The class that plain transformers runs with trust_remote_code=True."""
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    reference = json.loads((folder / "config.json").read_text())["auto_map"]["AutoModelForSequenceClassification"]
    return get_class_from_dynamic_module(reference, folder)


@pytest.mark.parametrize(("kind", "values"), [
    ("granite", {"residual_multiplier": 0.22}), pytest.param("olmoe", {}, marks=pytest.mark.slow),
    pytest.param("llama4_text", {}, marks=pytest.mark.slow),
])  # fmt: skip
def test_a_type_without_a_class_is_exported_with_one(kind: str, values: Any, tmp_path: Path) -> None:
    with quiet_transformers():
        source = save_language_model(kind, tmp_path / "model", **values)
    loaded = load_reward_model(str(source))
    assert not loaded.has_own_head and loaded.new_parts == ("score.weight",)
    folder = export_model(tmp_path / "out", loaded.model, make_tokenizer(), InputRecord("chat"))
    values = json.loads((folder / "config.json").read_text())
    assert values["architectures"][0].endswith("ForSequenceClassification") and (folder / CODE_FILE).is_file()
    groups = random_groups(0)
    with torch.no_grad():
        wanted = loaded.model.eval()(collate(groups))
        plain = class_of_the_folder(folder).from_pretrained(folder, dtype=torch.float32).eval()
        found = torch.cat([plain(input_ids=torch.tensor([text])).logits[:, 0] for text in whole_texts(groups)])
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert type(plain).__module__.startswith("transformers_modules") and wanted.std() > 0.01
    for trusts in (False, True):  # our class is used, and training from the folder writes it again
        assert not hasattr(read_model_config(str(folder), key="model", trust_remote_code=trusts), "auto_map")
        again = load_reward_model(str(folder), trust_remote_code=trusts)
        torch.testing.assert_close(again.model.eval()(collate(groups)), wanted, atol=1e-5, rtol=1e-5)


def test_a_type_of_no_text_decoder_has_no_class() -> None:
    from transformers import AutoConfig

    with pytest.raises(UserError, match=r"'vit' is not supported: transformers .* has neither a sequence"):
        check_class(AutoConfig.for_model("vit"), what="model")
    with pytest.raises(UserError, match=r"'pegasus' is not supported: transformers .* has neither a sequence"):
        check_class(AutoConfig.for_model("pegasus"), what="model")


@pytest.mark.slow
def test_a_trained_checkpoint_loads_in_plain_transformers(in_tmp: Path) -> None:
    from rm_gallery import train

    source = save_language_model("granitemoe", in_tmp / "model")
    make_tokenizer().save_pretrained(source)
    result = train(source, chat_pairs(24), **{
        "data.max_length": 128, "data.num_workers": 0, "trainer.total_training_steps": 2, "trainer.logger": [],
        "data.train_batch_size": 8, "model.fsdp_config.model_dtype": "fp32",
    })  # fmt: skip
    log = Path(result.checkpoint).parent.joinpath("train.log")
    assert not log.is_file() or "has no sequence classification class for this type" in log.read_text()
    card = (result.checkpoint / "README.md").read_text()
    assert CODE_FILE in card
    ours, plain = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert "RewardScorer" in ours
    code = plain.replace("PATH_OR_NAME", str(result.checkpoint)) + "\nprint(reward)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    messages = [{"role": "user", "content": "Why is the sky blue?"},
                {"role": "assistant", "content": "Air scatters short waves of light more."}]  # fmt: skip
    [reward] = RewardScorer.from_folder(result.checkpoint, device="cpu").score_messages([messages])
    assert float(out.stdout.split()[-1]) == pytest.approx(reward, abs=1e-4), out.stderr
