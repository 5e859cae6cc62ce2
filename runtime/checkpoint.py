"""What a model directory says of itself, read before an engine does: precision, code that it brings, adapters, templates; nothing in it is run.

A model directory is data. What an engine would take from outside the promoted files needs AIRLOCK_ALLOW_UNSIGNED, and no pickle is ever loaded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from artifact.errors import Invalid
from artifact.model_config import scheme, stated_scheme
from artifact.profile import Profile
from runtime.precision import named
from runtime.settings import Settings
from runtime.tuning import WORD

JSON_CAP = 16 << 20
NAMING_CODE = ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json")
LOW = ("fp8", "nvfp4", "mxfp4", "int4", "int8")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z")
_MODULE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter of NIM_PEFT_SOURCE: the name that clients use, its directory, its rank."""

    name: str
    path: Path
    rank: int


def read_json(path: Path) -> dict[str, object]:
    """The JSON object of a file, empty where there is none; raises Invalid for anything else, whatever its size or depth."""
    try:
        with path.open("rb") as file:
            raw = file.read(JSON_CAP + 1)
        found = json.loads(raw) if len(raw) <= JSON_CAP else None
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as e:
        raise Invalid(f"{path.name} of the model cannot be read as JSON: {str(e)[:120]}", expected="a JSON object", reason="model_content") from e
    if not isinstance(found, dict):
        raise Invalid(f"{path.name} of the model is no JSON object", expected=f"an object of at most {JSON_CAP} bytes", reason="model_content")
    return found


def precision(config: Mapping[str, object], modelopt: Mapping[str, object]) -> str:
    """The low precision that a checkpoint says it is stored in (config.json, hf_quant_config.json), empty for none: fp8, nvfp4, mxfp4, int4, int8."""
    stated = stated_scheme(config, modelopt)
    try:
        return scheme(stated)[1] if stated else ""
    except Invalid:
        return ""


def demand_precision(profile: Profile, model: Path) -> None:
    """Raises Invalid where a checkpoint is stored in another precision than the profile says: it would run larger, or less exact, than was told."""
    tag = profile.tags.get("precision", "").lower()
    wanted = named(tag)
    if not tag or profile.options.get("quantization"):
        return
    found = precision(read_json(model / "config.json"), read_json(model / "hf_quant_config.json"))
    if found != (wanted if wanted in LOW else ""):
        raise Invalid(
            f"profile {profile.id} says precision {tag}, but the checkpoint says {found or 'that it is not quantised'} (config.json)",
            expected="a quantization_config of that precision, or the profile's option quantization",
            do="correct the profile and promote it",
            reason="model_content",
        )


def trusted(profile: Profile, model: Path, settings: Settings) -> bool:
    """Whether the model's own code is run: only where the promoted profile says so and all of it is in the verified directory.

    Raises Invalid where the operator asks for it without the profile, forbids it against the profile, or the code lies elsewhere.
    """
    wanted = profile.options.get("trust_remote_code", "false").lower() == "true"
    if settings.tuning.trust_code is not None and settings.tuning.trust_code != wanted:
        does = "runs" if wanted else "does not run"
        raise Invalid(
            f"NIM_TRUST_CUSTOM_CODE is {int(settings.tuning.trust_code)}, but profile {profile.id} {does} the model's own code",
            expected="what the promoted profile says",
            do="choose another profile, or promote one that says otherwise (option trust_remote_code)",
        )
    if not wanted:
        return False
    for name in NAMING_CODE:
        for target in _classes(read_json(model / name).get("auto_map")):
            module, _, _ = target.rpartition(".")
            if "--" in target or not _MODULE.match(module) or not (model / f"{module}.py").is_file():
                raise Invalid(
                    f"{name} takes code from {target[:100]!r}, which is not in the model",
                    expected="a Python file beside it",
                    do="add the file to the model and promote it again",
                    reason="model_content",
                )
    return True


def _classes(auto_map: object) -> list[str]:
    if not isinstance(auto_map, dict):
        return []
    values = [v for value in auto_map.values() for v in (value if isinstance(value, list) else [value])]
    return [v for v in values if isinstance(v, str)]


def template(model: Path, settings: Settings) -> str:
    """The path of NIM_CHAT_TEMPLATE, empty without one: a file of the model, or one from outside with AIRLOCK_ALLOW_UNSIGNED; raises Invalid."""
    text = settings.tuning.chat_template
    if not text:
        return ""
    path = model / text  # an absolute one stays itself
    if not path.is_file():
        raise Invalid(f"NIM_CHAT_TEMPLATE is {text[:120]!r}, and there is no such file", expected="a file of the model, or an absolute path")
    if not _inside(path, model):
        _demand_reason("NIM_CHAT_TEMPLATE", path, settings)
    return str(path)


def draft(profile: Profile, model: Path, settings: Settings) -> tuple[str, int]:
    """The draft model of speculative decoding and how many tokens it proposes; ("", 0) for none; raises Invalid."""
    named = profile.options.get("draft_model", "")
    path = settings.tuning.draft_model or (model / named if named else None)
    if path is None:
        return "", 0
    if not (path / "config.json").is_file():
        raise Invalid(f"the draft model {path} has no config.json", expected="a directory with a model", reason="model_content")
    if not _inside(path, model):
        _demand_reason("NIM_DRAFT_MODEL_PATH" if settings.tuning.draft_model else "option draft_model", path, settings)
    _demand_safetensors(path, "the draft model")
    # An engine gives the draft model the permission of the model that it helps.
    if profile.options.get("trust_remote_code", "false").lower() == "true" and not _inside(path, model) and _brings_code(path):
        raise Invalid(
            f"the draft model {path} brings code of its own, which is not in the promoted model",
            expected="a draft model without auto_map, or one in the promoted model",
            reason="model_content",
        )
    return str(path), whole(profile, "draft_tokens") or 3


def adapters(profile: Profile, settings: Settings) -> tuple[Adapter, ...]:
    """The LoRA adapters of NIM_PEFT_SOURCE, one directory each, sorted by name; raises Invalid for what is no adapter in safetensors."""
    source = settings.tuning.peft_source
    if source is None:
        return ()
    if profile.tags.get("feat_lora", "false").lower() != "true":
        raise Invalid("NIM_PEFT_SOURCE is set, but the profile does not support LoRA", expected="a profile with feat_lora")
    if not source.is_dir():
        raise Invalid(f"NIM_PEFT_SOURCE is {source}, and there is no such directory", expected="a directory with one directory per adapter")
    _demand_reason("NIM_PEFT_SOURCE", source, settings)
    found = []
    for path in sorted(p for p in source.iterdir() if p.is_dir() and not p.name.startswith(".")):
        rank = read_json(path / "adapter_config.json").get("r")
        if not _NAME.match(path.name) or type(rank) is not int or not 0 < rank <= 4096:
            raise Invalid(f"{path} is no LoRA adapter", expected="a plain name and an adapter_config.json with its rank r")
        _demand_safetensors(path, f"adapter {path.name}")
        if path.name in settings.names:  # one of the two would answer for the other
            raise Invalid(f"adapter {path.name} has the name of the model itself", expected="a name of its own", do="rename its directory")
        found.append(Adapter(path.name, path, rank))
    most = lora_rank(profile, settings)
    for adapter in found:
        if adapter.rank > most:
            raise Invalid(f"adapter {adapter.name} has rank {adapter.rank}", expected=f"at most {most}", do="set NIM_MAX_LORA_RANK")
    return tuple(found)


def lora_rank(profile: Profile, settings: Settings) -> int:
    """The largest rank of an adapter: NIM_MAX_LORA_RANK, the profile's tag, or NIM's 32."""
    text = profile.tags.get("feat_lora_max_rank", "")
    return settings.tuning.max_lora_rank or (int(text) if text.isascii() and text.isdigit() and len(text) < 6 else 0) or 32


def whole(profile: Profile, name: str) -> int:
    """An option that is a number, 0 where it is not said; raises Invalid."""
    text = profile.options.get(name, "")
    if text and not (text.isascii() and text.isdigit() and len(text) < 10 and int(text)):
        raise Invalid(f"option {name} of profile {profile.id} is {text[:40]!r}", expected="a whole number above 0")
    return int(text or 0)


def word(profile: Profile, name: str) -> str:
    """An option that is one word, empty where it is not said; raises Invalid."""
    text = profile.options.get(name, "")
    if text and not WORD.match(text):
        raise Invalid(f"option {name} of profile {profile.id} is {text[:40]!r}", expected="one word")
    return text


def _brings_code(path: Path) -> bool:
    return any(read_json(path / name).get("auto_map") for name in NAMING_CODE)


def _inside(path: Path, model: Path) -> bool:
    return path.resolve().is_relative_to(model.resolve())


def _demand_reason(what: str, path: Path, settings: Settings) -> None:
    if not settings.unsigned:
        raise Invalid(
            f"{what} names {path}, which nobody signed",
            expected="files of the promoted model",
            do="add them to the model and promote it, or say in AIRLOCK_ALLOW_UNSIGNED why it is allowed",
            reason="unsigned",
        )


def _demand_safetensors(path: Path, what: str) -> None:
    if not any(path.glob("*.safetensors")):
        raise Invalid(f"{what} ({path}) has no safetensors file", expected="weights as safetensors: a pickle runs code", reason="model_content")
