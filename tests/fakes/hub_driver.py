"""Plays one scene with whatever huggingface_hub it is run by: `python hub_driver.py SCENE JSON` prints RESULT and JSON. Imports no project code."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub as hub
from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi, HfFileSystem

api = HfApi()


def told(work: Callable[[], Any]) -> Any:
    """What a call gives, or the class of what it raises."""
    try:
        return work()
    except Exception as error:
        return type(error).__name__


def snapshot(repo: str, revision: str | None = None, **more: Any) -> str:
    """The folder of a whole repository in the client's cache."""
    return hub.snapshot_download(repo, revision=revision, **more)


def warm(repo: str) -> list[str]:
    """By branch, then by the commit that it was."""
    first = snapshot(repo)
    return [first, snapshot(repo, Path(first).name)]


def publish(repo: str, folder: str) -> dict[str, Any]:
    """A model's life by the library: made, filled, changed, branched, looked at, removed."""
    out: dict[str, Any] = {}
    url = api.create_repo(repo, private=True)
    out["repo"] = url.repo_id
    out["exists"] = told(lambda: api.create_repo(repo))
    api.create_repo(repo, exist_ok=True)
    first = api.upload_folder(repo_id=repo, folder_path=folder, commit_message="all of it")
    weights = Path(folder, "model.safetensors").read_bytes()
    second = api.create_commit(
        repo_id=repo,
        operations=[
            CommitOperationAdd("notes/a b.txt", b"words"),
            CommitOperationAdd("again.safetensors", weights[::-1]),
            CommitOperationCopy("model.safetensors", "copy.safetensors"),
            CommitOperationDelete("sub/"),
        ],
        commit_message="more",
        parent_commit=first.oid,
    )
    out["stale"] = told(
        lambda: api.create_commit(repo_id=repo, operations=[CommitOperationAdd("x", b"x")], commit_message="x", parent_commit=first.oid)
    )
    out["files"] = api.list_repo_files(repo)
    api.create_branch(repo, branch="dev/one")
    api.upload_file(path_or_fileobj=b"only here", path_in_repo="dev.txt", repo_id=repo, revision="dev/one")
    api.create_tag(repo, tag="v1", revision=first.oid)
    refs = api.list_repo_refs(repo)
    out["branches"], out["tags"] = sorted(b.name for b in refs.branches), [(t.name, t.target_commit == first.oid) for t in refs.tags]
    out["dev"] = Path(hub.hf_hub_download(repo, "dev.txt", revision="dev/one")).read_text()
    commits = api.list_repo_commits(repo)
    out["commits"], out["title"] = [c.commit_id in (second.oid, first.oid) for c in commits][:2], commits[0].title
    api.delete_file("notes/a b.txt", repo_id=repo)
    api.delete_branch(repo, branch="dev/one")
    api.delete_tag(repo, tag="v1")
    out["left"] = [b.name for b in api.list_repo_refs(repo).branches + api.list_repo_refs(repo).tags]
    out["safetensors"] = told(lambda: api.file_exists(repo, "copy.safetensors"))
    info = api.model_info(repo, files_metadata=True)
    out["sizes"] = {s.rfilename: s.size for s in info.siblings or []}
    out["paths"] = sorted(p.path for p in api.get_paths_info(repo, ["config.json", "none"], expand=True))
    out["ls"] = sorted(f["name"].split("/")[-1] for f in HfFileSystem().ls(repo, refresh=True))
    out["found"] = repo in [m.id for m in api.list_models(author=repo.split("/")[0], search=repo.split("/")[1])]
    out["me"] = api.whoami()["auth"]["accessToken"]["role"]
    api.auth_check(repo)
    api.delete_repo(repo)
    out["after"] = api.repo_exists(repo)
    return out


def failures(repo: str, gated: str) -> dict[str, str]:
    """The exception classes that a user sees."""
    return {
        "file": told(lambda: hub.hf_hub_download(repo, "none.json")),
        "revision": told(lambda: hub.hf_hub_download(repo, "config.json", revision="none")),
        "repo": told(lambda: hub.hf_hub_download("acme/absent", "config.json")),
        "gated": told(lambda: hub.hf_hub_download(gated, "config.json")),
        "gated info": told(lambda: api.model_info(gated)),
        "key": told(lambda: hub.hf_hub_download(repo, "config.json", token="nvapi-wrong")),
        "write": told(lambda: api.upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id=repo)),
    }


if __name__ == "__main__":
    scene = {"snapshot": snapshot, "warm": warm, "publish": publish, "failures": failures}[sys.argv[1]]
    print("RESULT " + json.dumps(scene(**json.loads(sys.argv[2]))))
