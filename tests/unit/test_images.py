"""What the images promise, read out of their Containerfiles and the compose file; tests/flows/test_images.py builds and runs them."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml

from artifact import cli

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("registry", "runtime")
LABELS = {"title", "description", "licenses", "version", "revision"}
UTILITIES = {
    "list-model-profiles": "list-model-profiles",
    "nim_list_model_profiles": "list-model-profiles",
    "download-to-cache": "download-to-cache",
    "nim_download_to_cache": "download-to-cache",
    "create-model-store": "create-model-store",
    "nim-llm-check-cache-env": "check-cache-env",
}


def instructions(part: str) -> list[tuple[str, str]]:
    """The instructions of a Containerfile in their order, continued lines joined, comments left out."""
    text = (ROOT / "images" / f"{part}.Containerfile").read_text(encoding="utf-8")
    joined = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE))
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line.strip())]


def final(part: str) -> list[tuple[str, str]]:
    """The instructions of the last stage: what becomes the image."""
    found = instructions(part)
    return found[max(i for i, (word, _) in enumerate(found) if word == "FROM") :]


@pytest.mark.parametrize("part", PARTS)
def test_an_image_runs_without_rights_under_any_uid_of_group_0(part: str) -> None:
    users = [rest for word, rest in final(part) if word == "USER"]
    assert users[-1] == "1000:0"
    folders = [rest for word, rest in final(part) if word == "RUN" and "install -d -o 1000 -g 0" in rest]
    assert len(folders) == 1
    mode = re.search(r"-m (\d+)", folders[0])
    assert mode and int(mode[1], 8) & 0o070 == 0o070, "group 0 cannot write"


@pytest.mark.parametrize("part", PARTS)
def test_labels_are_complete_and_of_this_version(part: str) -> None:
    label = " ".join(rest for word, rest in final(part) if word == "LABEL")
    assert set(re.findall(r"org\.opencontainers\.image\.([a-z]+)=", label)) == LABELS
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert ("ARG", f"VERSION={project['version']}") in final(part)
    assert 'licenses="Apache-2.0"' in label


@pytest.mark.parametrize("part", PARTS)
def test_the_build_asks_no_index_and_takes_nothing_but_wheels(part: str) -> None:
    found = instructions(part)
    assert [rest for word, rest in found if word in ("COPY", "ADD")] == [f"build/wheels/{part} /wheels", "--from=build /opt/airlock /opt/airlock"]
    runs = " ".join(rest for word, rest in found if word == "RUN")
    assert "--no-index" in runs and not re.search(r"https?://|apt|curl|wget", runs)
    rules = [line for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    assert rules == ["*", "!build/wheels"], "site data or keys that lie in a checkout would be sent to the builder"


@pytest.mark.parametrize("part", PARTS)
def test_no_secret_is_built_in(part: str) -> None:
    kept = " ".join(rest for word, rest in instructions(part) if word in ("ARG", "ENV", "LABEL", "RUN"))
    assert not re.search(r"(?i)key|token|secret|password|nvapi-", kept)


def test_words_of_a_nim_are_linked_and_known() -> None:
    run = " ".join(rest for word, rest in final("runtime") if word == "RUN")
    words = re.search(r"for word in airlock ([^;]+);", run)
    assert words and set(words[1].split()) == set(UTILITIES)
    commands = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["entry-points"]["airlock.commands"]
    for word, command in UTILITIES.items():
        assert cli._called(commands, word) == ["runtime", command]


def test_an_image_runs_what_it_is_told_as_a_nim_does() -> None:
    """A base's entry point would take `list-model-profiles` for an argument of its own program."""
    for part in PARTS:
        assert dict(final(part))["ENTRYPOINT"] == "[]"
    assert dict(final("runtime"))["CMD"] == '["airlock", "runtime", "serve"]'
    assert not [rest for word, rest in final("runtime") if word == "VOLUME"], "weights in an unnamed volume would pass pre-flight and be lost"


def test_the_compose_file_starts_the_registry_alone_and_gives_no_rights() -> None:
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))["services"]
    assert [name for name, service in services.items() if not service.get("profiles")] == ["registry"]
    assert services["runtime"]["profiles"] == ["gpu"]
    for part in PARTS:
        service = services[part]
        assert service["read_only"] and service["cap_drop"] == ["ALL"] and service["security_opt"] == ["no-new-privileges:true"]
        assert service["user"].endswith("1000:0}") and service["build"]["dockerfile"] == f"images/{part}.Containerfile"
        assert all(":-127.0.0.1:" in port for port in service["ports"]), "open to every network unless told otherwise"
        default = re.fullmatch(r"\$\{\w+:-(.+)\}", service["build"]["args"]["BASE"])
        assert default and ("ARG", f"BASE={default[1]}") in instructions(part)
