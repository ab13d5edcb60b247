"""Shared by all tests: no network, few threads, and small models and data made on the spot."""

from __future__ import annotations

import logging
import os

# Set before any library reads them: no test may ask a hub, and for models this small a second thread only waits.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("SWANLAB_MODE", "disabled")

import gc
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rm_gallery.log import setup_logging

# A shell's background jobs ignore Ctrl-C, and so would the tests of it: they would wait for ever.
signal.signal(signal.SIGINT, signal.default_int_handler)

# As after the first command of a test, so that caplog sees messages whichever test comes first.
setup_logging()
logging.getLogger("rm_gallery").propagate = True
logging.getLogger("rm_gallery").setLevel(logging.NOTSET)
gc.disable()  # until all tests are collected: it took half of the time to load libraries and tests

NUM_DESELECTED = pytest.StashKey[int]()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect GPU tests where there is no CUDA device: 300 skipped tests would hide the others that are skipped."""
    gpu_tests = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_tests:
        return
    import torch

    if not torch.cuda.is_available():
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]
        config.hook.pytest_deselected(items=gpu_tests)
        config.stash[NUM_DESELECTED] = len(gpu_tests)
        if hasattr(config, "workeroutput"):  # in a worker of pytest-xdist
            config.workeroutput["deselected_gpu_tests"] = len(gpu_tests)


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take over the number from a worker of pytest-xdist; each collects the same tests."""
    node.config.stash[NUM_DESELECTED] = getattr(node, "workeroutput", {}).get("deselected_gpu_tests", 0)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if number := config.stash.get(NUM_DESELECTED, 0):
        terminalreporter.write_line(f"{number} GPU tests deselected: no CUDA device")


@pytest.fixture(scope="session", autouse=True)
def token_cache() -> Iterator[Path]:
    """Tokenized data of all tests, away from the user's own cache."""
    with tempfile.TemporaryDirectory(prefix="rm-gallery-tests-") as folder:
        os.environ["RM_GALLERY_CACHE"] = folder
        yield Path(folder)


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer with a ChatML template, on disk."""
    from tests.small import make_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    from tests.small import make_tokenizer

    return make_tokenizer()


@pytest.fixture(scope="session")
def qwen2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Qwen2 causal language model with its tokenizer, as training starts from."""
    from tests.small import make_model

    return make_model("qwen2", tmp_path_factory.mktemp("qwen2"))


@pytest.fixture(autouse=True)
def free_gpu_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """Workers share the GPU: what a test's allocator keeps would be missing in the others."""
    yield
    if request.node.get_closest_marker("gpu"):
        import torch

        gc.collect()
        torch.cuda.empty_cache()


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
