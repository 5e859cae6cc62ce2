"""NIM's variables for the engine itself (nim-container.md section 2.3) as one frozen value; pure. What an engine can do is its adapter's to say."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from artifact.errors import Invalid

WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:-]{0,63}\Z")
_NUMBER = re.compile(r"-\d+(\.\d+)?\Z")
_SWITCH = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


@dataclass(frozen=True)
class Tuning:
    """What the operator asked of the engine; None, 0 and "" mean that nothing was said."""

    peft_source: Path | None = None
    max_lora_rank: int = 0
    max_gpu_loras: int = 0
    max_cpu_loras: int = 0
    kv_cache_reuse: bool | None = None
    guided_backend: str = ""
    tool_parser: str = ""
    auto_tool_choice: bool = False
    chat_template: str = ""
    disable_cuda_graph: bool = False
    tokenizer_mode: str = ""
    draft_model: Path | None = None
    trust_code: bool | None = None
    passthrough: tuple[str, ...] = ()


def from_environment(environ: Mapping[str, str]) -> Tuning:
    """The tuning of an environment; raises Invalid naming the variable."""
    return Tuning(
        peft_source=_path(environ, "NIM_PEFT_SOURCE"),
        max_lora_rank=_whole(environ, "NIM_MAX_LORA_RANK"),
        max_gpu_loras=_whole(environ, "NIM_MAX_GPU_LORAS"),
        max_cpu_loras=_whole(environ, "NIM_MAX_CPU_LORAS"),
        kv_cache_reuse=switch(environ, "NIM_ENABLE_KV_CACHE_REUSE"),
        guided_backend=_word(environ, "NIM_GUIDED_DECODING_BACKEND"),
        tool_parser=_word(environ, "NIM_TOOL_CALL_PARSER"),
        auto_tool_choice=switch(environ, "NIM_ENABLE_AUTO_TOOL_CHOICE") is True,
        chat_template=environ.get("NIM_CHAT_TEMPLATE", "").strip(),
        disable_cuda_graph=switch(environ, "NIM_DISABLE_CUDA_GRAPH") is True,
        tokenizer_mode=_word(environ, "NIM_TOKENIZER_MODE"),
        draft_model=_path(environ, "NIM_DRAFT_MODEL_PATH"),
        trust_code=switch(environ, "NIM_TRUST_CUSTOM_CODE"),
        passthrough=_arguments(environ, "NIM_PASSTHROUGH_ARGS"),
    )


def parse_selector(text: str, variable: str) -> tuple[tuple[str, str], ...]:
    """The pairs of KEY=VALUE,KEY=VALUE; raises Invalid naming the variable."""
    pairs = []
    for part in filter(None, (p.strip() for p in text.split(","))):
        key, sign, value = part.partition("=")
        if not sign or not key.strip() or not value.strip():
            raise Invalid(
                f"{variable} holds {part[:60]!r}", expected="KEY=VALUE,KEY=VALUE, such as precision=fp8,tp=2", do=f"correct or unset {variable}"
            )
        pairs.append((key.strip(), value.strip()))
    return tuple(pairs)


def allowed(arguments: tuple[str, ...], table: Mapping[str, bool], engine: str) -> list[str]:
    """Pass-through arguments as they may be given to an engine; raises Invalid for any that its table lacks.

    `table` says for each flag whether it takes a value. Only whole names count: an abbreviation or an underscore that the engine would take for a
    refused flag is refused too, and so is a word that would become the engine's positional argument.
    """
    out: list[str] = []
    words = list(arguments)
    while words:
        flag, sep, value = words.pop(0).partition("=")
        if flag not in table:
            raise Invalid(
                f"NIM_PASSTHROUGH_ARGS holds {flag[:60]!r}, which may not be passed to {engine}",
                expected="of " + ", ".join(sorted(table)),
                do="put what the model needs into its profile and promote it",
            )
        if not table[flag]:
            if sep:
                raise Invalid(f"NIM_PASSTHROUGH_ARGS gives {flag} a value", expected=f"{flag} alone")
            out.append(flag)
            continue
        if not sep:
            value = words.pop(0) if words else ""
        if not value or (value.startswith("-") and not _NUMBER.match(value)):
            raise Invalid(f"NIM_PASSTHROUGH_ARGS gives {flag} no value", expected=f"{flag} VALUE")
        out += [flag, value]
    return out


def _arguments(environ: Mapping[str, str], name: str) -> tuple[str, ...]:
    try:
        return tuple(shlex.split(environ.get(name, "")))
    except ValueError as e:
        raise Invalid(f"{name} cannot be split into arguments: {e}", expected="arguments as a shell would read them") from e


def _path(environ: Mapping[str, str], name: str) -> Path | None:
    text = environ.get(name, "").strip()
    if text and not text.startswith("/"):
        raise Invalid(f"{name} is {text[:80]!r}", expected="an absolute path of a local directory: nothing is fetched from elsewhere")
    return Path(text) if text else None


def _word(environ: Mapping[str, str], name: str) -> str:
    text = environ.get(name, "").strip()
    if text and not WORD.match(text):
        raise Invalid(f"{name} is {text[:40]!r}", expected="one word of letters, digits and _ . : -")
    return text


def switch(environ: Mapping[str, str], name: str) -> bool | None:
    """Yes, no, or nothing said; raises Invalid for any other word: a misspelt yes must not mean no."""
    text = environ.get(name, "").strip().lower()
    if text and text not in _SWITCH:
        raise Invalid(f"{name} is {text[:40]!r}", expected="1 or 0")
    return _SWITCH.get(text)


def _whole(environ: Mapping[str, str], name: str) -> int:
    text = environ.get(name, "").strip()
    if text and not (text.isascii() and text.isdigit() and len(text) < 6 and int(text)):
        raise Invalid(f"{name} is {text[:40]!r}", expected="a whole number from 1 to 99999")
    return int(text or 0)
