"""Models of the Hub, from its cache, and the code that they bring."""

import json
import shutil
import socket
from pathlib import Path

import pytest
import torch
from helpers import Make, cached, stored, ties_command

import main


@pytest.fixture
def no_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*arguments: object, **options: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", forbidden)
    monkeypatch.setattr(socket, "getaddrinfo", forbidden)


def test_local_inputs_open_no_socket(inputs: list[str], output: Path, no_sockets: None) -> None:
    assert main.main(ties_command(output, inputs)) == 0


def test_cached_hub_models_work_offline(
    make: Make,
    tmp_path: Path,
    output: Path,
    monkeypatch: pytest.MonkeyPatch,
    no_sockets: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cache = tmp_path / "cache"
    cached(make("llama", 1), cache, "org/model", "a" * 40)
    cached(make("llama", 2), cache, "org/model", "b" * 40, revision="v2")
    sharded = tmp_path / "sharded"
    arguments = ["--method", "linear", "--weight", "1", "--merge", str(make("llama", 3))]
    assert main.main([str(sharded), *arguments, "--max-shard-size", "20KB"]) == 0
    cached(sharded, cache, "org/sharded", "c" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    models = ["org/model", "org/model@v2", f"org/model@{'b' * 40}", "org/sharded"]
    arguments = ["--method", "linear", "--cache-dir", str(cache), "--overwrite", "--weight", "1"]
    for model, seed in zip(models, (1, 2, 2, 3), strict=True):
        assert main.main([str(output), *arguments, "--merge", model]) == 0
        expected = stored(make("llama", seed))
        assert all(torch.equal(t, expected[n]) for n, t in stored(output).items())
    capsys.readouterr()
    assert main.main([str(output), *arguments, "--merge", "org/model@v3"]) == 2
    assert "in the cache (HF_HUB_OFFLINE is set)" in capsys.readouterr().err
    assert main.main([str(output), *arguments, "--merge", "./model"]) == 2
    assert "looked for a local directory, there is none" in capsys.readouterr().err


def test_sizes_are_compared_before_weights_are_downloaded(
    make: Make, tmp_path: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the configs are in the cache: the weights cannot be what the message is about."""
    cache = tmp_path / "cache"
    for repo, source in (("org/a", make("llama")), ("org/b", make("llama", hidden_size=64))):
        bare = tmp_path / repo
        bare.mkdir(parents=True)
        shutil.copyfile(source / "config.json", bare / "config.json")
        cached(bare, cache, repo, "d" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    arguments = [str(output), "--base-model", "org/a", "--cache-dir", str(cache)]
    with pytest.MonkeyPatch.context() as patch:
        messages: list[str] = []
        patch.setattr("builtins.print", lambda *text, **options: messages.append(str(text)))
        assert main.main([*arguments, "--merge", "org/b"]) == 2
        assert "hidden_size is 64" in messages[-1]
        assert main.main([*arguments, "--merge", "org/a"]) == 2
        assert "no weights" in messages[-1]


def test_remote_code_runs_only_when_trusted(
    make: Make, tmp_path: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "own"
    shutil.copytree(make("llama", 1), own)
    config = json.loads((own / "config.json").read_text())
    config |= {
        "model_type": "own-llama",
        "architectures": ["OwnForCausalLM"],
        "auto_map": {
            "AutoConfig": "modeling_own.OwnConfig",
            "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
        },
    }
    (own / "config.json").write_text(json.dumps(config))
    (own / "modeling_own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own-llama'\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    arguments = [str(output), "--method", "linear", "--weight", "1", "--merge", str(own)]
    assert main.main(arguments) == 2
    assert "--trust-remote-code" in capsys.readouterr().err
    assert main.main([*arguments, "--trust-remote-code"]) == 0
    written = json.loads((output / "config.json").read_text())
    assert written["auto_map"] == config["auto_map"]
    assert written["architectures"] == ["OwnForCausalLM"]
    assert (output / "modeling_own.py").read_bytes() == (own / "modeling_own.py").read_bytes()
    expected = stored(own)
    assert all(torch.equal(t, expected[n]) for n, t in stored(output).items())
