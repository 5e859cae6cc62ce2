"""What each engine is started with: argument vectors under golden files, what may never be in them, and what is refused before a start."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from artifact.errors import Invalid, NotFound
from artifact.profile import Pin, Profile
from runtime import engines, tuning
from runtime.engines import Installation, Launch, Start, tensorrt_llm
from runtime.node import Gpu
from runtime.settings import Settings, from_environment

PRIVATE = Path("/p")  # short, as a start makes it: a unix socket in it has at most 107 bytes
GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "engines"
SECRETS = {"NGC_API_KEY": "nvapi-secret", "HF_TOKEN": "hf_secret", "HTTPS_PROXY": "http://user:pw@proxy"}
ENV = {**SECRETS, "PATH": "/bin", "OMP_NUM_THREADS": "2", "NIM_CACHE_PATH": "/cache"}
FP8 = {"config.json": {"quantization_config": {"quant_method": "fp8"}}}
NVFP4 = {"hf_quant_config.json": {"quantization": {"quant_algo": "NVFP4"}}, "config.json": {}}
AWQ = {"config.json": {"quantization_config": {"quant_method": "awq", "bits": 4}}}
BUILT: dict[str, Any] = {
    "version": "1.2.1",
    "pretrained_config": {"mapping": {"world_size": 2, "tp_size": 2, "pp_size": 1}},
    "build_config": {"auto_parallel_config": {"cluster_key": "H100-SXM"}},
}
ENGINE = {"trtllm_engine/config.json": BUILT, "trtllm_engine/rank0.engine": "x", "trtllm_engine/rank1.engine": "x", "config.json": {}}
H100 = tuple(Gpu(i, f"GPU-{i}", "NVIDIA H100 80GB HBM3", "2330:10de", (9, 0)) for i in range(8))
WISHES = {"NIM_MAX_MODEL_LEN": "4096", "NIM_KVCACHE_PERCENT": "0.8", "NIM_ENABLE_KV_CACHE_REUSE": "1", "NIM_DISABLE_CUDA_GRAPH": "1"}
WISHES |= {"NIM_GUIDED_DECODING_BACKEND": "xgrammar", "NIM_TOOL_CALL_PARSER": "hermes", "NIM_ENABLE_AUTO_TOOL_CHOICE": "1"}
WISHES |= {"NIM_CHAT_TEMPLATE": "own.jinja", "NIM_SERVED_MODEL_NAME": "meta/llama:1, short", "NIM_LOG_LEVEL": "WARNING"}
LORA = {"NIM_PEFT_SOURCE": "{peft}", "NIM_MAX_GPU_LORAS": "4", "AIRLOCK_ALLOW_UNSIGNED": "our own adapters, checked by the owner"}
OPTIONS = {"max_model_len": "8192", "max_num_seqs": "64", "max_num_batched_tokens": "8192"}

# name -> tags, options, environment, files of the model. The tags are those of published profile lists (nim-container.md section 6).
CASES: dict[str, tuple[dict[str, str], dict[str, str], dict[str, str], dict[str, Any]]] = {
    "vllm-cpu": ({"llm_engine": "vllm", "precision": "bf16", "tp": "1", "device": "cpu"}, {"max_model_len": "512"}, {}, {}),
    "vllm-cpu-embed": ({"llm_engine": "vllm", "device": "cpu"}, {"task": "embed"}, {}, {}),
    "vllm-bf16-tp4": ({"llm_engine": "vllm", "precision": "bf16", "tp": "4", "pp": "1", "feat_lora": "false"}, {}, {}, {}),
    "vllm-fp8-tp2-pp2-throughput": ({"llm_engine": "vllm", "precision": "fp8", "tp": "2", "pp": "2", "profile": "throughput"}, OPTIONS, {}, FP8),
    "vllm-nvfp4-tp1": ({"llm_engine": "vllm", "precision": "nvfp4", "tp": "1"}, {"kv_cache_dtype": "fp8"}, {}, NVFP4),
    "vllm-int4-tp1": ({"llm_engine": "vllm", "precision": "int4", "tp": "1"}, {}, {}, AWQ),
    "vllm-fp8-online": ({"llm_engine": "vllm", "precision": "fp8", "tp": "1"}, {"quantization": "fp8"}, {}, {}),
    "vllm-lora": ({"llm_engine": "vllm", "precision": "fp16", "tp": "8", "feat_lora": "true", "feat_lora_max_rank": "24"}, {}, LORA, {}),
    "vllm-wishes": ({"llm_engine": "vllm", "precision": "bf16", "tp": "1"}, {}, {**WISHES, "NIM_TOKENIZER_MODE": "hf"}, {"own.jinja": "x"}),
    "vllm-passthrough": (
        {"llm_engine": "vllm", "precision": "bf16", "tp": "1"},
        {},
        {"NIM_PASSTHROUGH_ARGS": "--max-num-seqs=32 --enable-chunked-prefill --limit-mm-per-prompt '{\"image\": 1}'"},
        {},
    ),
    "vllm-draft-code": (
        {"llm_engine": "vllm", "precision": "bf16", "tp": "1"},
        {"draft_model": "draft", "draft_tokens": "5", "trust_remote_code": "true", "tool_call_parser": "hermes", "reasoning_parser": "qwen3"},
        {},
        {"draft/config.json": {}, "draft/m.safetensors": "", "config.json": {"auto_map": {"AutoConfig": "own.Config"}}, "own.py": "x = 1"},
    ),
    "tensorrt_llm-h100-fp8-tp2-throughput": (
        {"llm_engine": "tensorrt_llm", "gpu": "H100", "gpu_device": "2330:10de", "precision": "fp8", "tp": "2", "pp": "1", "profile": "throughput"},
        {},
        {},
        ENGINE,
    ),
    "tensorrt_llm-buildable-bf16-tp8": (
        {"llm_engine": "tensorrt_llm", "precision": "bf16", "tp": "8", "pp": "1", "trtllm_buildable": "true"},
        OPTIONS,
        {},
        {"config.json": {}},
    ),
    "tensorrt_llm-wishes": (
        {"llm_engine": "tensorrt_llm", "precision": "bf16", "tp": "1", "trtllm_buildable": "true"},
        {"draft_model": "draft"},
        WISHES,
        {"config.json": {}, "own.jinja": "x", "draft/config.json": {}, "draft/m.safetensors": ""},
    ),
    "tensorrt_llm-lora": (
        {"llm_engine": "tensorrt_llm", "precision": "bf16", "tp": "1", "trtllm_buildable": "true", "feat_lora": "true"},
        {},
        LORA,
        {"config.json": {}},
    ),
    "sglang-bf16-tp2": ({"llm_engine": "sglang", "precision": "bf16", "tp": "2", "pp": "1"}, OPTIONS, {}, {}),
    "sglang-fp8-embed": ({"llm_engine": "sglang", "precision": "fp8", "tp": "1"}, {"task": "embed"}, {}, FP8),
    "sglang-wishes": (
        {"llm_engine": "sglang", "precision": "bf16", "tp": "1"},
        {"draft_model": "draft"},
        {**WISHES, "NIM_TOKENIZER_MODE": "slow", "NIM_ENABLE_KV_CACHE_REUSE": "0", "NIM_PASSTHROUGH_ARGS": "--schedule-policy lpm"},
        {"own.jinja": "x", "draft/config.json": {}, "draft/m.safetensors": ""},
    ),
    "sglang-lora": ({"llm_engine": "sglang", "precision": "fp16", "tp": "1", "feat_lora": "true"}, {}, LORA, {}),
}


def start(folder: Path, tags: dict[str, str], options: dict[str, str], env: dict[str, str], files: dict[str, Any]) -> Start:
    """A start with real files: the model, two adapters, and an installation that is never executed."""
    for name, content in files.items():
        path = folder / "model" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    (folder / "model").mkdir(exist_ok=True)
    for name, rank in (("sql", 8), ("law", 24)):
        (folder / "peft" / name).mkdir(parents=True, exist_ok=True)
        (folder / "peft" / name / "adapter_config.json").write_text(json.dumps({"r": rank}))
        (folder / "peft" / name / "adapter_model.safetensors").write_text("")
    filled = {k: v.replace("{peft}", str(folder / "peft")) for k, v in env.items()}
    program = {"vllm": "vllm", "tensorrt_llm": "trtllm-serve", "sglang": "python3"}[tags["llm_engine"]]
    need = int(tags.get("tp", "1")) * int(tags.get("pp", "1"))
    gpus = () if tags.get("device") == "cpu" else H100[:need]
    profile = Profile("a" * 64, tags, Pin("acme/tiny", "sha256:" + "1" * 64), options=options)
    made = Installation(folder / "env" / "bin" / program, version="1.2.1")
    return Start(profile, folder / "model", PRIVATE, from_environment(ENV | filled, "acme/tiny:1"), made, gpus, key="KEY-" + "k" * 20)


def plan(made: Start) -> Launch:
    launch = engines.load(made.profile.tags["llm_engine"]).plan(made)
    assert isinstance(launch, Launch)
    return launch


def told(launch: Launch, folder: Path) -> dict[str, Any]:
    """A launch as JSON, without the folder of this run."""
    files = {str(k): json.loads(v) for k, v in launch.files.items()}
    links = {str(k): str(v) for k, v in launch.links.items()}
    shown = {"argv": launch.argv, "files": files, "links": links, "models": launch.models, "socket": str(launch.socket), "env": launch.env}
    shown |= {"ready": launch.health_path, "alive": launch.alive_path, "metrics": launch.metrics_path}
    found = json.loads(json.dumps(shown).replace(str(folder), "{folder}"))
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("name", CASES)
def test_the_start_is_exactly_the_recorded_one(name: str, tmp_path: Path) -> None:
    launch = plan(start(tmp_path, *CASES[name]))
    path, shown = GOLDEN / f"{name}.json", told(launch, tmp_path)
    if os.environ.get("AIRLOCK_WRITE_GOLDEN"):  # read the difference before it is committed
        path.write_text(json.dumps(shown, indent=1, sort_keys=True) + "\n")
    assert shown == json.loads(path.read_text())
    everything = json.dumps(shown)
    assert "secret" not in everything and "proxy" not in everything and "KEY-" not in json.dumps([shown["argv"], shown["env"]]) + repr(launch)
    assert ("trust" in json.dumps(shown["argv"])) == ("code" in name)
    assert "fp8" not in name or "online" in name or "--quantization" not in launch.argv


def test_every_engine_has_a_golden_start_and_each_golden_file_a_case() -> None:
    assert {p.stem for p in GOLDEN.glob("*.json")} == set(CASES)
    assert {c[0]["llm_engine"] for c in CASES.values()} == set(engines.names())


@pytest.mark.parametrize("engine", engines.names())
class TestContract:
    """What holds for each file of runtime/engines, also for one that is added."""

    def make(self, engine: str, folder: Path, env: dict[str, str] | None = None, options: dict[str, str] | None = None) -> Start:
        tags = {"llm_engine": engine, "precision": "bf16", "tp": "2", "trtllm_buildable": "true"}
        return start(folder, tags, options or {}, env or {}, {"config.json": {}})

    def test_an_absent_environment_is_told(self, engine: str, tmp_path: Path) -> None:
        adapter, variable = engines.load(engine), f"AIRLOCK_ENGINE_{engine.upper()}"
        with pytest.raises(NotFound, match=f"{variable} is not set") as caught:
            adapter.find(from_environment({}, "acme/tiny"))
        assert caught.value.reason == "engine_absent"
        settings = from_environment({variable: str(tmp_path)}, "acme/tiny")
        with pytest.raises(NotFound, match=f"there is no {engine} at") as caught:
            adapter.find(settings)
        program = Path(caught.value.what.rpartition(" ")[2])
        program.parent.mkdir(parents=True)
        program.write_text("#!/bin/sh\n")
        program.chmod(0o644)
        with pytest.raises(NotFound, match="not executable"):
            adapter.find(settings)
        program.chmod(0o755)
        (tmp_path / "lib" / "python3.12" / "dist-packages" / f"{engine}-9.8.7.dist-info").mkdir(parents=True)
        found = adapter.find(settings)
        assert found == Installation(program, version="9.8.7")
        assert not engines.installed(settings)[engine] and all(why for name, why in engines.installed(settings).items() if name != engine)

    def test_the_gpus_are_named_by_uuid_and_contradictions_refused(self, engine: str, tmp_path: Path) -> None:
        made = self.make(engine, tmp_path)
        launch = plan(made)
        assert launch.env["CUDA_VISIBLE_DEVICES"] == "GPU-0,GPU-1" and launch.env["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
        assert launch.env["HF_HUB_OFFLINE"] == "1" and launch.env["OMP_NUM_THREADS"] == "2" and not set(launch.env) & set(SECRETS)
        with pytest.raises(Invalid, match="2 x 1 GPUs, but 4 are given"):
            plan(replace(made, gpus=H100[:4]))

    def test_what_others_hold_of_the_gpu_is_left_to_them(self, engine: str, tmp_path: Path) -> None:
        """The share that the choice found free counts, also where NIM_KVCACHE_PERCENT asks for more."""
        flag = {"vllm": "--gpu-memory-utilization", "sglang": "--mem-fraction-static"}.get(engine)
        argv = plan(replace(self.make(engine, tmp_path, {"NIM_KVCACHE_PERCENT": "0.9"}), share=0.6)).argv
        assert flag is None or argv[argv.index(flag) + 1] == "0.600"

    def test_where_it_answers(self, engine: str, tmp_path: Path) -> None:
        launch = plan(self.make(engine, tmp_path))
        if launch.socket is None:
            moved = launch.moved(4711)
            assert moved.argv[moved.argv.index("--port") + 1] == "4711" and moved.url("/x") == "http://127.0.0.1:4711/x"
            assert launch.argv[launch.argv.index("--host") + 1] == "127.0.0.1"
        short = launch.shortened(77).shortened(78).argv
        assert short[short.index(launch.length_flag) + 1] == "78" and short.count(launch.length_flag) == 1

    @pytest.mark.parametrize(
        "text",
        [
            "--trust-remote-code",
            "--trust_remote_code",
            "--trust-remote",
            "--host 0.0.0.0",
            "--port=1",
            "--api-key x",
            "--config /tmp/x.yaml",
            "--extra_llm_api_options x",
            "--middleware os.system",
            "--custom_module_dirs /tmp",
            "/another/model",
            "--enable-chunked-prefill /another/model",
            "--max-num-seqs --host",
            "--max-num-seqs",
            "--model-loader-extra-config {}",
            "--uds /tmp/x",
            "-tp 2",
        ],
    )
    def test_pass_through_opens_no_host_and_runs_no_code(self, engine: str, text: str, tmp_path: Path) -> None:
        with pytest.raises(Invalid, match="NIM_PASSTHROUGH_ARGS"):
            plan(self.make(engine, tmp_path, {"NIM_PASSTHROUGH_ARGS": text}))

    def test_code_runs_only_where_the_promoted_profile_says_so_and_all_of_it_is_there(self, engine: str, tmp_path: Path) -> None:
        def code(env: dict[str, str], target: str = "own.Config", said: str = "true") -> bool:
            made = self.make(engine, tmp_path, env, {"trust_remote_code": said})
            (made.model / "config.json").write_text(json.dumps({"auto_map": {"AutoConfig": target, "AutoModel": ["own.A", None]}}))
            return any("trust" in a for a in plan(made).argv)

        with pytest.raises(Invalid, match="which is not in the model"):
            code({})
        (tmp_path / "model" / "own.py").write_text("x = 1\n")
        assert code({}) and code({"NIM_TRUST_CUSTOM_CODE": "1"}) and not code({}, said="false")
        for target in ("other/repo--own.Config", "../own.Config", "missing.Config", "sub/own.Config"):
            with pytest.raises(Invalid, match="which is not in the model"):
                code({}, target)
        with pytest.raises(Invalid, match="does not run the model's own code"):
            code({"NIM_TRUST_CUSTOM_CODE": "1"}, said="false")
        with pytest.raises(Invalid, match="runs the model's own code"):
            code({"NIM_TRUST_CUSTOM_CODE": "0"})

    def test_files_from_outside_need_a_reason(self, engine: str, tmp_path: Path) -> None:
        (tmp_path / "own.jinja").write_text("x")
        reason = {"AIRLOCK_ALLOW_UNSIGNED": "a template of the owner"}
        for text in (str(tmp_path / "own.jinja"), "../own.jinja"):
            with pytest.raises(Invalid, match="nobody signed") as caught:
                plan(self.make(engine, tmp_path, {"NIM_CHAT_TEMPLATE": text}))
            assert caught.value.reason == "unsigned"
            assert any(a.endswith("own.jinja") for a in plan(self.make(engine, tmp_path, {"NIM_CHAT_TEMPLATE": text, **reason})).argv)
        draft = tmp_path / "draft"
        draft.mkdir()
        (draft / "config.json").write_text("{}")
        with pytest.raises(Invalid, match="nobody signed"):
            plan(self.make(engine, tmp_path, {"NIM_DRAFT_MODEL_PATH": str(draft)}))
        (draft / "pytorch_model.bin").write_text("")
        with pytest.raises(Invalid, match="no safetensors"):
            plan(self.make(engine, tmp_path, {"NIM_DRAFT_MODEL_PATH": str(draft), **reason}))
        # The reason is for data: what the promoted model may run is no permission for code that lies elsewhere.
        (draft / "m.safetensors").write_text("")
        asked = {"NIM_DRAFT_MODEL_PATH": str(draft), **reason}
        assert plan(self.make(engine, tmp_path, asked, {"trust_remote_code": "true"}))
        (draft / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["own.T", null]}}')
        assert plan(self.make(engine, tmp_path, asked))
        with pytest.raises(Invalid, match="brings code of its own"):
            plan(self.make(engine, tmp_path, asked, {"trust_remote_code": "true"}))

    @pytest.mark.parametrize(
        "options",
        [{"task": "--x"}, {"max_model_len": "-1"}, {"max_model_len": "٣"}, {"max_num_seqs": "1 --x"}, {"tool_call_parser": "a b"}],
    )
    def test_options_outside_the_known_words_are_refused(self, engine: str, options: dict[str, str], tmp_path: Path) -> None:
        with pytest.raises(Invalid):
            plan(self.make(engine, tmp_path, options=options))

    def test_a_precision_that_the_checkpoint_lacks_is_refused(self, engine: str, tmp_path: Path) -> None:
        made = self.make(engine, tmp_path)
        with pytest.raises(Invalid, match="says precision fp8, but the checkpoint says that it is not quantised"):
            plan(replace(made, profile=replace(made.profile, tags=made.profile.tags | {"precision": "fp8"})))
        (made.model / "config.json").write_text(json.dumps(FP8["config.json"]))
        for tag, other in (("int4_awq", "fp8"), ("w4a16", "fp8"), ("bf16", "fp8"), ("fp16", "fp8")):
            with pytest.raises(Invalid, match=f"says precision {tag}, but the checkpoint says {other}"):
                plan(replace(made, profile=replace(made.profile, tags=made.profile.tags | {"precision": tag})))
        (made.model / "config.json").write_text("[" * 100_000)
        with pytest.raises(Invalid, match=r"config\.json of the model"):
            plan(replace(made, profile=replace(made.profile, tags=made.profile.tags | {"precision": "fp8"})))

    def test_an_adapter_does_not_take_the_models_name(self, engine: str, tmp_path: Path) -> None:
        tags = {"llm_engine": engine, "precision": "bf16", "tp": "1", "feat_lora": "true", "trtllm_buildable": "true"}
        for names in ("law", "tiny,sql"):
            with pytest.raises(Invalid, match="has the name of the model itself"):
                plan(start(tmp_path, tags, {}, LORA | {"NIM_SERVED_MODEL_NAME": names}, {"config.json": {}}))

    def test_adapters_are_data_of_a_rank_that_fits(self, engine: str, tmp_path: Path) -> None:
        tags = {"llm_engine": engine, "precision": "bf16", "tp": "1", "feat_lora": "true", "feat_lora_max_rank": "16"}
        with pytest.raises(Invalid, match="adapter law has rank 24"):
            plan(start(tmp_path, tags, {}, LORA, {"config.json": {}}))
        with pytest.raises(Invalid, match="nobody signed"):
            plan(start(tmp_path, tags, {}, {"NIM_PEFT_SOURCE": "{peft}"}, {}))
        (tmp_path / "peft" / "law" / "adapter_config.json").write_text('{"r": "x"}')
        with pytest.raises(Invalid, match="is no LoRA adapter"):
            plan(replace(start(tmp_path, tags, {}, LORA, {}), settings=_peft(tmp_path, "law", '{"r": true}')))


def _peft(folder: Path, name: str, config: str) -> Settings:
    (folder / "peft" / name / "adapter_config.json").write_text(config)
    return from_environment(ENV | {k: v.replace("{peft}", str(folder / "peft")) for k, v in LORA.items()}, "acme/tiny:1")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": "1.1.0"}, "TensorRT-LLM 1.1.0 built it, and 1.2.1 is installed"),
        ({"version": None}, r"\(not told\) built it"),
        ({"pretrained_config": {"mapping": {"world_size": 4}}}, r"built for 4 GPU\(s\), and the profile spreads over 2"),
        ({"pretrained_config": []}, "built for None"),
        ({"build_config": {"auto_parallel_config": {"cluster_key": "A100-SXM-80GB"}}}, "compute capability 8.0, and NVIDIA H100 80GB HBM3 has 9.0"),
    ],
)
def test_a_prebuilt_engine_is_checked_before_the_start(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    tags, options, env, files = CASES["tensorrt_llm-h100-fp8-tp2-throughput"]
    with pytest.raises(Invalid, match=words) as caught:
        plan(start(tmp_path, tags, options, env, files | {"trtllm_engine/config.json": BUILT | change}))
    assert caught.value.reason == "model_content"


def test_the_ranks_of_a_prebuilt_engine_are_there(tmp_path: Path) -> None:
    tags, options, env, files = CASES["tensorrt_llm-h100-fp8-tp2-throughput"]
    made = start(tmp_path, tags, options, env, files)
    (made.model / "trtllm_engine" / "rank1.engine").rename(made.model / "trtllm_engine" / "rank3.engine")
    with pytest.raises(Invalid, match=r"its ranks are \[0, 3\]"):
        plan(made)
    tagged = replace(made, profile=replace(made.profile, tags=tags | {"compute_capability": "8.9"}))
    (made.model / "trtllm_engine" / "rank3.engine").rename(made.model / "trtllm_engine" / "rank1.engine")
    with pytest.raises(Invalid, match=r"compute capability 8\.9, and"):
        plan(tagged)


def test_a_prebuilt_engine_takes_no_draft(tmp_path: Path) -> None:
    tags, _, env, files = CASES["tensorrt_llm-h100-fp8-tp2-throughput"]
    more = {"draft/config.json": {}, "draft/m.safetensors": ""}
    with pytest.raises(Invalid, match="a prebuilt engine takes none"):
        plan(start(tmp_path, tags, {"draft_model": "draft"}, env, files | more))


def test_a_name_becomes_the_last_part_of_a_path() -> None:
    assert [tensorrt_llm.engine_name(n) for n in ("meta/llama:1", "../..", "a b", "x")] == ["meta-llama-1", "-", "a-b", "x"]


def test_what_an_engine_cannot_is_told_and_never_dropped(tmp_path: Path) -> None:
    tags = {"llm_engine": "tensorrt_llm", "trtllm_buildable": "true"}
    for env, words in (({"NIM_TOKENIZER_MODE": "slow"}, "no such setting"), ({"NIM_GUIDED_DECODING_BACKEND": "outlines"}, "outlines")):
        with pytest.raises(Invalid, match=words):
            plan(start(tmp_path, tags, {}, env, {"config.json": {}}))
    with pytest.raises(Invalid, match="generate with tensorrt_llm"):
        plan(start(tmp_path, tags, {"task": "embed"}, {}, {"config.json": {}}))
    with pytest.raises(Invalid, match="without a parser"):
        plan(start(tmp_path, {"llm_engine": "vllm"}, {}, {"NIM_ENABLE_AUTO_TOOL_CHOICE": "1"}, {}))


def test_an_engine_is_only_loaded_by_the_name_of_its_file() -> None:
    for name in ("os", "../x", "", "__init__", "vllm.x"):
        with pytest.raises(NotFound, match="there is no engine"):
            engines.load(name)


def test_a_socket_path_that_linux_cannot_bind_is_refused(tmp_path: Path) -> None:
    made = start(tmp_path, {"llm_engine": "vllm", "device": "cpu"}, {}, {}, {})
    with pytest.raises(Invalid, match="too long"):
        plan(replace(made, folder=Path("/" + "s" * 70)))  # its own fits, the ones that vLLM names by UUIDs do not
    assert plan(replace(made, folder=Path("/" + "s" * 69))).env["VLLM_RPC_BASE_PATH"] == "/" + "s" * 69


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("NIM_SERVED_MODEL_NAME", "--trust-remote-code"),
        ("NIM_HTTP_API_PORT", "0"),
        ("NIM_HTTP_API_PORT", "٣"),
        ("NIM_MAX_MODEL_LEN", "-5"),
        ("NIM_KVCACHE_PERCENT", "nan"),
        ("AIRLOCK_OFFLINE", "enabled"),
        ("NIM_DISABLE_MODEL_DOWNLOAD", "ja"),
        ("NIM_RELAX_MEM_CONSTRAINTS", "2"),
        ("NIM_LOG_LEVEL", "LOUD"),
        ("NIM_PEFT_SOURCE", "hf://acme/lora"),
        ("NIM_MAX_LORA_RANK", "0"),
        ("NIM_ENABLE_KV_CACHE_REUSE", "perhaps"),
        ("NIM_GUIDED_DECODING_BACKEND", "-x"),
        ("NIM_TOOL_CALL_PARSER", "a b"),
        ("NIM_DRAFT_MODEL_PATH", "draft"),
        ("NIM_PASSTHROUGH_ARGS", "'open"),
    ],
)
def test_settings_that_make_no_sense_name_the_variable(name: str, value: str) -> None:
    with pytest.raises(Invalid, match=name):
        from_environment({name: value}, "acme/tiny")


def test_nothing_said_is_nothing_wished() -> None:
    assert tuning.from_environment({"NIM_PASSTHROUGH_ARGS": " ", "NIM_PEFT_SOURCE": ""}) == tuning.Tuning()
