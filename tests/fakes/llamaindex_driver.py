"""LlamaIndex's NVIDIA connectors, against a chat and an embedding server: `llamaindex_driver.py CHAT EMBED QUESTION`, one JSON object out.

Run by an environment of its own; imports no project code.
"""

from __future__ import annotations

import json
import sys

from llama_index.core.llms import ChatMessage
from llama_index.core.schema import NodeWithScore, TextNode
from llama_index.embeddings.nvidia import NVIDIAEmbedding
from llama_index.llms.nvidia import NVIDIA
from llama_index.postprocessor.nvidia_rerank import NVIDIARerank

chat, embed, question = sys.argv[1:]
TEXTS = ["GPUs multiply matrices.", "The cat sleeps on the sofa.", "A registry holds models."]
llm = NVIDIA(base_url=chat, model="acme/tiny", nvidia_api_key="nvapi-none", temperature=0, max_tokens=60)
asked = [ChatMessage(role="user", content=question)]
found: dict[str, object] = {"answer": llm.chat(asked).message.content, "stream": "".join(c.delta or "" for c in llm.stream_chat(asked))}
embeddings = NVIDIAEmbedding(base_url=embed, model="acme/tiny", nvidia_api_key="nvapi-none", truncate="END")
found["documents"] = [len(v) for v in embeddings.get_text_embedding_batch(TEXTS)]
found["query"] = embeddings.get_query_embedding("cat")[:3]
reranker = NVIDIARerank(base_url=embed, model="acme/tiny", nvidia_api_key="nvapi-none", top_n=2)
ranked = reranker.postprocess_nodes([NodeWithScore(node=TextNode(text=t)) for t in TEXTS], query_str="Where does the cat sleep?")
found["ranked"] = [n.node.get_content() for n in ranked]
print(json.dumps(found))
