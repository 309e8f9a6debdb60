"""Downloads end to end: the commands against a Hub on the loopback address."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from contained import ROOT, Contained, Outcome
from helpers import Make, contents, loads_clean, stored
from hub import RESOLVE, STORAGE, TOKEN, Hub
from safetensors.torch import save_file

import main

if not sys.platform.startswith("linux"):
    pytest.skip("needs fork and pidfd of Linux", allow_module_level=True)

JUNK = {
    "original/consolidated.00.pth": b"original",
    "original/params.json": b"{}",
    "onnx/model.onnx": b"onnx",
    "model-q4.gguf": b"gguf",
    "tf_model.h5": b"tensorflow",
    "training_args.bin": b"pickle",
    "flax_model.msgpack": b"flax",
}
SIZES = ["--max-shard-size", "30KB"]


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[Hub, Contained]]:
    """Give a Hub and processes that have it for theirs; huggingface_hub reads it when imported."""
    hub = Hub()
    environment = {
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_TOKEN": "",
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "0",
        "no_proxy": "127.0.0.1,localhost",
        "NO_PROXY": "127.0.0.1,localhost",
    }
    with hub.serving() as url, Contained({**environment, "HF_ENDPOINT": url}) as contained:
        yield hub, contained


@pytest.fixture
def hub(served: tuple[Hub, Contained]) -> Iterator[Hub]:
    hub = served[0]
    hub.repositories.clear()
    hub.mend()
    yield hub
    assert all(request.host == "127.0.0.1" for request in hub.requests if request.token)


class Run:
    """Run main.py in a folder of the test's, with a cache of the test's."""

    def __init__(self, contained: Contained, folder: Path, home: Path) -> None:
        self.contained, self.folder, self.cache = contained, folder, folder / "cache"
        self.environment = {"HF_HOME": str(home), "HF_TOKEN_PATH": str(home / "token")}

    def __call__(
        self,
        *arguments: str,
        script: str = "main",
        token: str = "",
        offline: bool = False,
        cache: Path | None = None,
        seconds: float = 60,
    ) -> Outcome:
        return self.contained.run(
            script,
            [*arguments, "--cache-dir", str(cache or self.cache)],
            self.folder,
            seconds=seconds,
            environment={**self.environment, "HF_TOKEN": token},
            settings={
                "huggingface_hub.constants.HF_HUB_OFFLINE": offline,
                "huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE": 1000,  # of 10 MB, else
            },
        )

    @property
    def files(self) -> set[str]:
        """The files of all snapshots in the cache."""
        return {
            path.relative_to(self.cache).as_posix().partition("snapshots/")[2][41:]
            for path in self.cache.glob("models--*/snapshots/**/*")
            if path.is_file()
        }


@pytest.fixture
def run(served: tuple[Hub, Contained], tmp_path: Path) -> Run:
    folder = tmp_path / "work"
    folder.mkdir()
    return Run(served[1], folder, tmp_path / "home")


def copy_of(model: str, *options: str) -> list[str]:
    return ["out", "--method", "linear", "--weight", "1", "--merge", model, *options]


def same_tensors(output: Path, source: Path) -> bool:
    written, expected = stored(output), stored(source)
    return written.keys() == expected.keys() and all(
        torch.equal(tensor, expected[name]) for name, tensor in written.items()
    )


def refused(outcome: Outcome, *parts: str) -> None:
    """Assert that a run was refused with one message, which has these parts."""
    assert outcome.status == 2, outcome
    assert not outcome.traceback, outcome
    assert outcome.out == ""
    for part in parts:
        assert part in outcome.err


@pytest.fixture(scope="module")
def sharded(make: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("sharded") / "model"
    merge = ["--method", "linear", "--weight", "1", "--merge", str(make("llama", 3))]
    assert main.main([str(output), *merge, *SIZES, "--quiet", "--no-model-card"]) == 0
    return output


# -------------------------------------------------------------------- what is downloaded


def test_a_single_file(make: Make, hub: Hub, run: Run) -> None:
    commit = hub.add("org/model", contents(make("llama", 1)) | JUNK)
    outcome = run(*copy_of("org/model"))
    assert outcome.status == 0, outcome
    assert outcome.out == "out\n"
    assert same_tensors(run.folder / "out", make("llama", 1))
    loads_clean(run.folder / "out")
    assert commit in (run.folder / "out" / "README.md").read_text()
    assert "base_model:\n- org/model\n" in (run.folder / "out" / "README.md").read_text()
    assert hub.downloaded("org/model") == contents(make("llama", 1)).keys()
    assert run.files == contents(make("llama", 1)).keys()


def test_shards(make: Make, sharded: Path, hub: Hub, run: Run) -> None:
    hub.add("org/sharded", contents(sharded) | JUNK)
    assert len(list(sharded.glob("*.safetensors"))) > 3
    outcome = run(*copy_of("org/sharded"))
    assert outcome.status == 0, outcome
    assert same_tensors(run.folder / "out", make("llama", 3))
    assert hub.downloaded("org/sharded") == contents(sharded).keys()


def test_pages_of_a_tree(make: Make, hub: Hub, run: Run) -> None:
    """The Hub lists many files in pages."""
    files = contents(make("llama", 1))
    many = {f"notes/{number}.txt": b"%d" % number for number in range(30)}
    hub.add("org/model", {**many, **files})
    assert run(*copy_of("org/model")).status == 0
    assert hub.downloaded("org/model") == {*many, *files}
    assert not (run.folder / "out" / "notes").exists()  # a model's own files only are copied
    assert sum("/tree/" in request.path for request in hub.requests) > 5


@pytest.mark.parametrize("revision", ["v2", "refs/pr/1", "commit"])
def test_a_revision(revision: str, make: Make, hub: Hub, run: Run) -> None:
    hub.add("org/model", contents(make("llama", 1)))
    named = "v2" if revision == "commit" else revision
    commit = hub.add("org/model", contents(make("llama", 2)), named)
    asked = commit if revision == "commit" else revision
    outcome = run(*copy_of(f"org/model@{asked}"))
    assert outcome.status == 0, outcome
    assert same_tensors(run.folder / "out", make("llama", 2))
    assert commit in (run.folder / "out" / "README.md").read_text()


def test_two_revisions_of_one_model(make: Make, hub: Hub, run: Run) -> None:
    hub.add("org/model", contents(make("llama", 1)))
    hub.add("org/model", contents(make("llama", 2)), "v2")
    merge = ["--method", "linear", "--weight", "0.5", "--no-model-card"]
    outcome = run("out", *merge, "--merge", "org/model", "--merge", "org/model@v2")
    assert outcome.status == 0, outcome
    local = [word for seed in (1, 2) for word in ("--merge", str(make("llama", seed)))]
    assert run("local", *merge, *local).status == 0
    assert stored(run.folder / "out").keys() == stored(run.folder / "local").keys()
    assert same_tensors(run.folder / "out", run.folder / "local")


def test_one_of_two_formats(make: Make, hub: Hub, run: Run) -> None:
    files = contents(make("llama", 1))
    hub.add("org/both", {**files, "pytorch_model.bin": b"a pickle, which nobody reads"})
    assert run(*copy_of("org/both")).status == 0
    assert hub.downloaded("org/both") == files.keys()


def test_one_of_two_sharded_formats(sharded: Path, hub: Hub, run: Run) -> None:
    shard = "pytorch_model-00001-of-00001.bin"
    index = json.dumps({"weight_map": {"x": shard}}).encode()
    pickles = {shard: b"a pickle, which nobody reads", "pytorch_model.bin.index.json": index}
    hub.add("org/both", {**contents(sharded), **pickles})
    assert run(*copy_of("org/both")).status == 0
    assert shard not in hub.downloaded("org/both")


def test_pickles_where_there_is_nothing_else(
    make: Make, hub: Hub, run: Run, tmp_path: Path
) -> None:
    files = contents(make("llama", 1))
    torch.save(stored(make("llama", 1)), tmp_path / "pytorch_model.bin")
    del files["model.safetensors"]
    hub.add(
        "org/old", {**files, "pytorch_model.bin": (tmp_path / "pytorch_model.bin").read_bytes()}
    )
    outcome = run(*copy_of("org/old"))
    assert outcome.status == 0, outcome
    assert same_tensors(run.folder / "out", make("llama", 1))


def test_a_stack_of_downloaded_layers(make: Make, hub: Hub, run: Run) -> None:
    for seed in (1, 2):
        hub.add(f"org/m{seed}", contents(make("llama", seed)))
    slices = [f"{{model: org/m{seed}, start: 0, end: 2}}" for seed in (1, 2)]
    (run.folder / "stack.yml").write_text(f"layer_slices: [{', '.join(slices)}]")
    outcome = run("stack.yml", "out", script="bakllama")
    assert outcome.status == 0, outcome
    expected = stored(make("llama", 2))["model.layers.1.mlp.up_proj.weight"]
    assert torch.equal(stored(run.folder / "out")["model.layers.3.mlp.up_proj.weight"], expected)


def test_an_adapter(make: Make, hub: Hub, run: Run, tmp_path: Path) -> None:
    hub.add("org/model", contents(make("llama", 1)))
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    a, b = torch.ones(2, 32), torch.ones(32, 2)
    save_file({key.format("A"): a, key.format("B"): b}, tmp_path / "a.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    files = {
        "adapter_config.json": json.dumps(config).encode(),
        "adapter_model.safetensors": (tmp_path / "a.safetensors").read_bytes(),
        "tokenizer.json": b"{}",
        "optimizer.pt": b"optimizer",
        "checkpoint-5/adapter_model.safetensors": b"earlier",
        "checkpoint-5/tokenizer.json": b"{}",
    }
    hub.add("org/lora", files)
    outcome = run(*copy_of("org/model+org/lora"))
    assert outcome.status == 0, outcome
    name = "model.layers.0.self_attn.q_proj.weight"
    expected = (stored(make("llama", 1))[name].double() + 2).bfloat16()
    assert torch.equal(stored(run.folder / "out")[name], expected)
    expected = {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"}
    assert hub.downloaded("org/lora") == expected


def test_configs_are_compared_before_weights_come(make: Make, hub: Hub, run: Run) -> None:
    hub.add("org/a", contents(make("llama", 1)))
    hub.add("org/b", contents(make("llama", 2, hidden_size=64)))
    outcome = run("out", "--base-model", "org/a", "--merge", "org/b")
    refused(outcome, "org/b: hidden_size is 64, expected the 32 of org/a")
    assert not any(request.path.endswith(".safetensors") for request in hub.requests)
    assert not any(STORAGE.match(request.path) for request in hub.requests)


def test_options_are_checked_before_anything_comes(make: Make, hub: Hub, run: Run) -> None:
    hub.add("org/model", contents(make("llama", 1)))
    refused(run(*copy_of("org/model", "--density", "0.5")), "--density")
    assert hub.requests == []


# -------------------------------------------------------------------- who may see what


def test_a_token_is_for_the_hub_alone(make: Make, hub: Hub, run: Run) -> None:
    """Private and gated models come with a token, which the host of large files does not get."""
    hub.add("org/private", contents(make("llama", 1)), private=True)
    hub.add("org/gated", contents(make("llama", 2)), gated=True)
    outcome = run(
        *["out", "--method", "slerp", "--weight", "0.5"],
        *["--merge", "org/private", "--merge", "org/gated"],
        token=TOKEN,
    )
    assert outcome.status == 0, outcome
    assert any(request.token for request in hub.requests)
    stored_requests = [request for request in hub.requests if STORAGE.match(request.path)]
    assert len(stored_requests) >= 2
    assert not any(request.token for request in stored_requests)
    assert TOKEN not in outcome.err
    text = "".join(map(str, contents(run.folder / "out").values()))
    assert TOKEN not in text


def test_a_gated_model(make: Make, hub: Hub, run: Run) -> None:
    hub.add("org/gated", contents(make("llama", 1)), gated=True)
    refused(run(*copy_of("org/gated")), "org/gated", "a gated model", "hf auth login")


@pytest.mark.parametrize("name", ["org/private", "org/missing"])
def test_a_private_or_missing_model(name: str, make: Make, hub: Hub, run: Run) -> None:
    hub.add("org/private", contents(make("llama", 1)), private=True)
    refused(run(*copy_of(name)), name, "or a private one", "hf auth login")
    assert run.files == set()


@pytest.mark.parametrize("revision", ["nope", "0" * 40])
def test_a_missing_revision(revision: str, make: Make, hub: Hub, run: Run) -> None:
    hub.add("org/model", contents(make("llama", 1)))
    outcome = run(*copy_of(f"org/model@{revision}"))
    refused(outcome, f"org/model@{revision}", "revision")
    assert "no such model" not in outcome.err


def test_a_model_without_weights(make: Make, hub: Hub, run: Run) -> None:
    files = contents(make("llama", 1))
    del files["model.safetensors"]
    hub.add("org/bare", files)
    refused(run(*copy_of("org/bare")), "org/bare", "no weights")


def test_an_index_that_names_a_missing_shard(sharded: Path, hub: Hub, run: Run) -> None:
    files = contents(sharded)
    lost = sorted(name for name in files if name.endswith(".safetensors"))[1]
    del files[lost]
    hub.add("org/broken", files)
    refused(run(*copy_of("org/broken")), "org/broken", lost)


# -------------------------------------------------------------------- a bad connection


def test_a_cut_connection_is_resumed(make: Make, hub: Hub, run: Run) -> None:
    hub.add("org/model", contents(make("llama", 1)))
    hub.cut("^/storage/", after=30_000)
    outcome = run(*copy_of("org/model"))
    assert outcome.status == 0, outcome
    assert same_tensors(run.folder / "out", make("llama", 1))
    parts = [request for request in hub.requests if STORAGE.match(request.path)]
    assert [(part.status, part.range) for part in parts if part.method == "GET"] == [
        (200, None),
        (206, "bytes=30000-"),
    ]


def test_a_cut_connection_leaves_no_half_model(make: Make, hub: Hub, run: Run) -> None:
    """Another run, with a better connection, ends well."""
    hub.add("org/model", contents(make("llama", 1)))
    hub.cut("^/storage/", after=30_000)
    hub.fail("^/storage/", 403, times=100, skip=1)
    outcome = run(*copy_of("org/model"))
    refused(outcome, "org/model", "403")
    assert not (run.folder / "out").exists()
    assert "model.safetensors" not in run.files
    hub.mend()
    outcome = run(*copy_of("org/model"))
    assert outcome.status == 0, outcome
    assert same_tensors(run.folder / "out", make("llama", 1))


@pytest.mark.parametrize("status", [503, 429])
def test_a_hub_that_is_busy_once(status: int, make: Make, hub: Hub, run: Run) -> None:
    """Files are asked for again."""
    hub.add("org/model", contents(make("llama", 1)))
    hub.fail("/resolve/", status, method="HEAD")
    outcome = run(*copy_of("org/model"))
    assert outcome.status == 0, outcome
    assert same_tensors(run.folder / "out", make("llama", 1))
    assert [request.status for request in hub.requests].count(status) == 1


@pytest.mark.parametrize(("status", "words"), [(503, "503"), (429, "429"), (500, "500")])
def test_a_hub_that_is_down(status: int, words: str, make: Make, hub: Hub, run: Run) -> None:
    """That is called by its name, not a model that does not exist."""
    hub.add("org/model", contents(make("llama", 1)))
    hub.fail("^/api/", status, times=1000)
    outcome = run(*copy_of("org/model"))
    refused(outcome, "org/model", words)
    assert "no such model" not in outcome.err


def test_a_hub_that_cannot_be_reached(make: Make, run: Run) -> None:
    """In a plain process, whose Hub is a port that nobody listens on."""
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    environment |= {"HF_HOME": str(run.folder / "home"), "HF_HUB_DISABLE_XET": "1"}
    environment |= {"no_proxy": "127.0.0.1"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "main.py"), *copy_of("org/model")],
        cwd=run.folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 2
    assert "org/model" in done.stderr
    assert "Traceback" not in done.stderr
    assert "no such model" not in done.stderr
    assert not (run.folder / "out").exists()


# -------------------------------------------------------------------- the cache


def test_offline_after_online(make: Make, hub: Hub, run: Run) -> None:
    hub.add("org/model", contents(make("llama", 1)))
    refused(run(*copy_of("org/model"), offline=True), "org/model", "HF_HUB_OFFLINE")
    assert run(*copy_of("org/model", "--no-model-card")).status == 0
    expected = contents(run.folder / "out")
    hub.mend()
    arguments = copy_of("org/model", "--no-model-card", "--overwrite")
    assert run(*arguments, offline=True).status == 0
    assert hub.requests == []
    assert contents(run.folder / "out") == expected


def test_a_hub_that_is_down_after_a_download(make: Make, hub: Hub, run: Run) -> None:
    hub.add("org/model", contents(make("llama", 1)))
    assert run(*copy_of("org/model")).status == 0
    hub.mend()
    hub.fail("^/", 503, times=1000)
    assert run(*copy_of("org/model", "--overwrite")).status == 0
    assert same_tensors(run.folder / "out", make("llama", 1))


def test_a_cached_model_is_not_downloaded_again(make: Make, hub: Hub, run: Run) -> None:
    hub.add("org/model", contents(make("llama", 1)))
    assert run(*copy_of("org/model")).status == 0
    hub.mend()
    assert run(*copy_of("org/model", "--overwrite")).status == 0
    assert hub.downloaded("org/model") == set()


def test_a_branch_that_moved(make: Make, hub: Hub, run: Run) -> None:
    hub.add("org/model", contents(make("llama", 1)))
    assert run(*copy_of("org/model")).status == 0
    commit = hub.add("org/model", contents(make("llama", 2)))
    assert run(*copy_of("org/model", "--overwrite")).status == 0
    assert same_tensors(run.folder / "out", make("llama", 2))
    assert commit in (run.folder / "out" / "README.md").read_text()


def test_a_cache_on_another_disk(make: Make, hub: Hub, run: Run) -> None:
    disks = [Path(name) for name in ("/dev/shm", "/run", "/var/tmp") if os.access(name, os.W_OK)]
    other = next((d for d in disks if d.stat().st_dev != run.folder.stat().st_dev), None)
    if other is None:
        pytest.skip("there is one disk only")
    cache = other / f"cache-of-a-test-{os.getpid()}"
    hub.add("org/model", contents(make("llama", 1)))
    try:
        outcome = run(*copy_of("org/model"), cache=cache)
        assert outcome.status == 0, outcome
        assert same_tensors(run.folder / "out", make("llama", 1))
        assert list(cache.glob("models--org--model/snapshots/*/model.safetensors"))
        assert not any(path.is_symlink() for path in (run.folder / "out").iterdir())
    finally:
        shutil.rmtree(cache, ignore_errors=True)


def test_a_local_folder_comes_before_the_hub(make: Make, hub: Hub, run: Run) -> None:
    hub.add("org/model", contents(make("llama", 1)))
    shutil.copytree(make("llama", 2), run.folder / "org" / "model")
    assert run(*copy_of("org/model")).status == 0
    assert same_tensors(run.folder / "out", make("llama", 2))
    assert hub.requests == []


def test_the_server_speaks_the_protocol(make: Make, hub: Hub, run: Run) -> None:
    """Every answer that a download needs was asked for."""
    hub.add("org/model", contents(make("llama", 1)))
    assert run(*copy_of("org/model")).status == 0
    asked = {(request.method, request.status) for request in hub.requests}
    assert {("GET", 200), ("HEAD", 200), ("HEAD", 302)} <= asked
    assert any(RESOLVE.match(request.path) for request in hub.requests)
