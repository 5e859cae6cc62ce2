"""LangChain's NVIDIA endpoints, unmodified, against a chat and an embedding server: `langchain_driver.py CHAT EMBED QUESTION`, one JSON object out.

Run by an environment of its own; imports no project code.
"""

from __future__ import annotations

import json
import sys

from langchain_core.documents import Document
from langchain_nvidia_ai_endpoints import ChatNVIDIA, NVIDIAEmbeddings, NVIDIARerank

chat, embed, question = sys.argv[1:]
SCHEMA = {"title": "Place", "type": "object", "properties": {"far": {"type": "boolean"}}, "required": ["far"], "additionalProperties": False}
TEXTS = ["GPUs multiply matrices.", "The cat sleeps on the sofa.", "A registry holds models."]

llm = ChatNVIDIA(base_url=chat, model="acme/tiny", nvidia_api_key="nvapi-none", temperature=0, max_tokens=60)
found: dict[str, object] = {"models": [m.id for m in llm.available_models], "answer": llm.invoke(question).content}
found["stream"] = "".join(str(c.content) for c in llm.stream(question))
found["structured"] = llm.with_structured_output(SCHEMA).invoke(question)
try:
    ChatNVIDIA(base_url=chat, model="acme/none", nvidia_api_key="nvapi-none").invoke("x")
except Exception as e:
    found["unknown"] = f"{type(e).__name__}: {e}"[:300]
embeddings = NVIDIAEmbeddings(base_url=embed, model="acme/tiny", nvidia_api_key="nvapi-none", truncate="END")
found["documents"] = [len(v) for v in embeddings.embed_documents(TEXTS)]
found["query"] = embeddings.embed_query("cat")[:3]
reranker = NVIDIARerank(base_url=embed, model="acme/tiny", nvidia_api_key="nvapi-none", top_n=2)
ranked = reranker.compress_documents(query="Where does the cat sleep?", documents=[Document(page_content=t) for t in TEXTS])
found["ranked"] = [d.page_content for d in ranked]
print(json.dumps(found))
