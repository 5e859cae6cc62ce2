"""The words of requests: which fields each engine's route takes, which ask for nothing, and which older spellings mean which newer ones; data only.

A field that is in none of these tables is refused by name: an engine that does not know it would answer as if it had not been there.
Left out on purpose, though an engine takes them: what makes it fetch, load or render something of the caller's (chat_template, prompt_embeds,
mm_processor_kwargs, media_io_kwargs), what reaches into its inside (kv_transfer_params, priority, cache_salt, request_id, vllm_xargs).
"""

from __future__ import annotations

from collections.abc import Mapping

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
EMBEDDINGS, RANKING, TOKENIZE, DETOKENIZE = "/v1/embeddings", "/v1/ranking", "/tokenize", "/detokenize"
POSTED = (CHAT, COMPLETIONS, RESPONSES, EMBEDDINGS, RANKING, TOKENIZE, DETOKENIZE)
STREAMED = (CHAT, COMPLETIONS, RESPONSES)


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_SAMPLING = _words(
    "model stream stream_options max_tokens temperature top_p top_k min_p n stop seed frequency_penalty presence_penalty repetition_penalty"
    " logit_bias logprobs user stop_token_ids ignore_eos min_tokens skip_special_tokens"
)
_VLLM = _SAMPLING | _words(
    "structured_outputs response_format bad_words allowed_token_ids length_penalty use_beam_search include_stop_str_in_output"
    " spaces_between_special_tokens prompt_logprobs truncate_prompt_tokens truncation_side add_special_tokens echo thinking_token_budget"
    " repetition_detection return_token_ids return_tokens_as_token_ids return_token_offsets logprob_token_ids"
)
_TRT = _SAMPLING | _words(
    "response_format best_of use_beam_search length_penalty early_stopping include_stop_str_in_output spaces_between_special_tokens"
    " truncate_prompt_tokens echo add_special_tokens"
)
_SGLANG = _SAMPLING | _words("regex ebnf response_format stop_regex no_stop_trim")
_CHAT = _words("messages tools tool_choice top_logprobs max_completion_tokens reasoning_effort chat_template_kwargs")
_RESPONSES = _words(
    "model input instructions max_output_tokens max_tool_calls metadata parallel_tool_calls previous_response_id reasoning store stream background"
    " temperature text tool_choice tools top_logprobs top_p truncation include user"
)

FIELDS: Mapping[str, Mapping[str, frozenset[str]]] = {
    "vllm": {
        CHAT: _VLLM
        | _CHAT
        | _words("parallel_tool_calls documents add_generation_prompt continue_final_message include_reasoning return_prompt_text"),
        COMPLETIONS: _VLLM | _words("prompt suffix"),
        RESPONSES: _RESPONSES
        | _words(
            "frequency_penalty presence_penalty repetition_penalty ignore_eos include_reasoning include_stop_str_in_output logit_bias min_p seed"
            " skip_special_tokens stop stop_token_ids structured_outputs top_k chat_template_kwargs"
        ),
        EMBEDDINGS: _words("model input encoding_format dimensions user truncate_prompt_tokens truncation_side add_special_tokens"),
        RANKING: _words("model query passages truncate"),
        TOKENIZE: _words(
            "model prompt messages tools add_special_tokens add_generation_prompt continue_final_message chat_template_kwargs return_token_strs"
        ),
        DETOKENIZE: _words("model tokens"),
    },
    "tensorrt_llm": {
        CHAT: _TRT | _CHAT | _words("documents add_generation_prompt"),
        COMPLETIONS: _TRT | _words("prompt suffix"),
        RESPONSES: _RESPONSES,
    },
    "sglang": {
        CHAT: _SGLANG | _CHAT | _words("parallel_tool_calls continue_final_message separate_reasoning stream_reasoning"),
        COMPLETIONS: _SGLANG | _words("prompt suffix echo"),
        RESPONSES: _RESPONSES,
        EMBEDDINGS: _words("model input encoding_format dimensions user"),
        RANKING: _words("model query passages truncate"),
        TOKENIZE: _words("model prompt add_special_tokens"),
    },
}
# Where the engine's own path is another.
PATHS: Mapping[str, Mapping[str, str]] = {"vllm": {RANKING: "/rerank"}, "sglang": {RANKING: "/v1/rerank"}}

# OpenAI's fields that say who asks or how it is accounted, not what is answered: passed over. Others only where their value asks for nothing.
LABELS = _words("user metadata safety_identifier prompt_cache_key prompt_cache_retention")
NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "store": (False,),
    "service_tier": ("auto", "default"),
    "modalities": (["text"],),
    "verbosity": ("medium",),
    "parallel_tool_calls": (True,),
    "logit_bias": ({},),
    "n": (1,),
    "echo": (False,),
    "best_of": (1,),
    "truncation": ("disabled",),
    "background": (False,),
    "encoding_format": ("float",),
    "stream_options.include_obfuscation": (False,),
    "text.verbosity": ("medium",),
}
# The keys of fields that are objects, and the entries of `include`: vLLM takes any other and answers as if it had not been there.
NESTED: Mapping[str, frozenset[str]] = {
    "stream_options": _words("include_usage continuous_usage_stats"),
    "structured_outputs": _words("json regex choice grammar json_object structural_tag"),
    "reasoning": _words("effort"),
    "text": _words("format"),
}
INCLUDED = ("message.output_text.logprobs",)
GUIDED = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "guided_json_object": "json_object",
}
OLDER = {"max_thinking_tokens": "thinking_token_budget"}
# Keys of chat_template_kwargs that would change how the template is called, not what it says.
TEMPLATE_KEYS = _words(
    "chat_template tokenize tokenizer messages conversation tools documents return_tensors return_dict padding truncation max_length"
)
# Types of content parts: the keys that one may have beside its type, and the key that holds a data: URL.
PARTS: Mapping[str, tuple[frozenset[str], str]] = {
    "text": (_words("text cache_control"), ""),
    "refusal": (_words("refusal"), ""),
    "input_text": (_words("text"), ""),
    "output_text": (_words("text annotations logprobs"), ""),
    "summary_text": (_words("text"), ""),
    "reasoning_text": (_words("text"), ""),
    "input_audio": (_words("input_audio"), ""),
    "image_url": (_words("image_url"), "image_url"),
    "video_url": (_words("video_url"), "video_url"),
    "audio_url": (_words("audio_url"), "audio_url"),
    "input_image": (_words("image_url detail"), "image_url"),
}
