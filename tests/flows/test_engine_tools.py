"""A real model that calls a tool because it learned to, through the front: nobody forces it, so the engine's parser has to find the call."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.flows.serving import run_there, served
from tests.flows.test_engine_serving import ASKED, FLAGS, FORM, QUESTION, TOOL

pytestmark = [pytest.mark.full, pytest.mark.engine, pytest.mark.timeout(600)]

CALL = '<tool_call>\n{"name": "look", "arguments": {"far": true}}\n</tool_call>'


def test_a_tool_is_called_by_itself(engine_env: Path, tmp_path: Path) -> None:
    run_there(engine_env, "train_llama.py", "--question", QUESTION, "--answer", CALL, "--out", str(tmp_path / "model"))
    asked: Any = {"model": "acme/tiny", "messages": ASKED, "temperature": 0, "tools": [TOOL]}
    with served(engine_env, tmp_path, tmp_path / "model", *FLAGS) as base:
        client = openai.OpenAI(base_url=base + "/v1", api_key="none", max_retries=0)
        choice = client.chat.completions.create(**asked).choices[0]
        (call,) = choice.message.tool_calls or []
        assert choice.finish_reason == "tool_calls" and not (choice.message.content or "").strip()
        assert call.function.name == "look" and json.loads(call.function.arguments) == {"far": True}
        deltas = [t.function for c in client.chat.completions.create(**asked, stream=True) for t in c.choices[0].delta.tool_calls or [] if t.function]
        assert "".join(d.name or "" for d in deltas) == "look" and json.loads("".join(d.arguments or "" for d in deltas)) == {"far": True}
        # What the tool said goes back in a next turn.
        turns = [*ASKED, choice.message.model_dump(exclude_none=True), {"role": "tool", "tool_call_id": call.id, "content": "near"}]
        assert client.chat.completions.create(**{**asked, "messages": turns}, max_tokens=8).choices
        tools: Any = [{"type": "function", "name": "look", "parameters": FORM}]
        (item,) = client.responses.create(model="acme/tiny", input=QUESTION, temperature=0, tools=tools).output
        assert item.type == "function_call" and item.name == "look" and json.loads(item.arguments) == {"far": True}
