"""What retention lets go of in one repository, as a pure function over its tags, its manifests, one rule and the clock.

It reads no database and removes nothing: registry/holdings.py brings the facts and registry/sweep.py acts on the plan, so that a dry run and a run
are the same decision. Not sure means kept.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from artifact.errors import Invalid
from artifact.grant import matches

DAY_S = 86400.0
MAX_DAYS = 36500
MAX_KEEP = 1_000_000
MAX_GLOBS = 50
_COMPANION = re.compile(r"(sha256|sha512)-([0-9a-f]{64}|[0-9a-f]{128})(?:\.[a-z]+)?\Z")
_GLOB = re.compile(r"[^\s,\x00-\x1f]{1,128}\Z")


@dataclass(frozen=True)
class Rule:
    """What repositories of a pattern may lose; a zero keeps everything. `keep_tags` are globs of tags that never go."""

    pattern: str
    keep_last: int = 0
    keep_days: int = 0
    untagged_days: int = 0
    keep_tags: tuple[str, ...] = ()

    def as_json(self) -> dict[str, object]:
        """The rule as a JSON object."""
        facts: dict[str, object] = {"pattern": self.pattern, "keep_last": self.keep_last, "keep_days": self.keep_days}
        return facts | {"untagged_days": self.untagged_days, "keep_tags": list(self.keep_tags)}


@dataclass(frozen=True)
class Tag:
    """A ref of the repository: where it points, and since when."""

    name: str
    digest: str
    at: float
    kind: str = "tag"


@dataclass(frozen=True)
class Version:
    """A manifest of the repository: since when it is as it is, its children, its subject, and what outside of the repository's tags holds it."""

    digest: str
    since: float = 0.0
    children: tuple[str, ...] = ()
    subject: str = ""
    kept: str = ""


@dataclass(frozen=True)
class Goes:
    """One tag (with the digest it names) or, without a tag, one manifest that goes, and why."""

    digest: str
    why: str
    tag: str = ""


@dataclass(frozen=True)
class Plan:
    """What goes, and the referrers whose subject is not there and that no rule takes."""

    goes: tuple[Goes, ...] = ()
    orphans: tuple[str, ...] = ()


def check_rule(rule: Rule) -> Rule:
    """The rule; raises Invalid."""
    runs = "**" in f"/{rule.pattern}".removesuffix("/**")  # `a/**/b` and `***` read like more than they cover
    if runs or not 0 < len(rule.pattern) <= 255 or not re.fullmatch(r"[a-z0-9*][a-z0-9._*/-]*", rule.pattern):
        raise Invalid(f"{rule.pattern[:80]!r} is no pattern of names", expected="a name, * for a segment, ** at the end", reason="pattern")
    for field, value, most in (("keep_last", rule.keep_last, MAX_KEEP), ("keep_days", rule.keep_days, MAX_DAYS)):
        _check_whole(field, value, most)
    _check_whole("untagged_days", rule.untagged_days, MAX_DAYS)
    if len(rule.keep_tags) > MAX_GLOBS or not all(_GLOB.match(glob) for glob in rule.keep_tags):
        raise Invalid("keep_tags are no globs", expected=f"at most {MAX_GLOBS}, without spaces and commas", reason="keep_tags")
    return rule


def _check_whole(field: str, value: object, most: int) -> None:
    if type(value) is not int or not 0 <= value <= most:
        raise Invalid(f"{field} is {str(value)[:40]}", expected=f"a whole number from 0 to {most}", reason=field)


def rule_for(rules: Iterable[Rule], name: str) -> Rule | None:
    """The most specific rule whose pattern covers the name, that is the one with the longest part before its first `*`, then the longest."""
    covering = [rule for rule in rules if matches(rule.pattern, name)]
    return max(covering, key=lambda r: (len(r.pattern.split("*", 1)[0]), len(r.pattern), r.pattern), default=None)


def subject_of_tag(name: str) -> str:
    """The digest that a signature's or fallback tag (`sha256-<hex>.sig`, `sha256-<hex>`) is about; empty for another tag."""
    found = _COMPANION.match(name)
    return f"{found[1]}:{found[2]}" if found and len(found[2]) == (64 if found[1] == "sha256" else 128) else ""


def plan(tags: Sequence[Tag], versions: Sequence[Version], rule: Rule | None, now: float, *, immutable: bool = False) -> Plan:
    """What the rule takes from a repository at this time. In an immutable one no tag goes."""
    here = {v.digest: v for v in versions}
    about = {tag.name: subject_of_tag(tag.name) for tag in tags if subject_of_tag(tag.name)}
    going = {} if rule is None or immutable else _tags_over(tags, about, here, rule, now)
    roots = {tag.digest for tag in tags if tag.name not in going and here.get(about.get(tag.name, "")) is None}
    roots |= {v.digest for v in versions if v.kept}
    if immutable:
        roots |= {tag.digest for tag in tags}
    why = {tag.digest: going[tag.name] for tag in tags if tag.name in going}
    tagged = {tag.digest for tag in tags}
    parents: dict[str, list[str]] = {}
    for version in versions:
        for child in version.children:
            parents.setdefault(child, []).append(version.digest)
    orphans = []
    for version in versions:
        if version.digest in tagged or parents.get(version.digest) or version.subject in here:
            continue  # held by what names it, or not at all
        days = (now - version.since) / DAY_S
        if rule is not None and rule.untagged_days and days > rule.untagged_days:
            why[version.digest] = f"its subject is gone, for {int(days)} days" if version.subject else f"without a tag for {int(days)} days"
            continue
        roots.add(version.digest)
        if version.subject:
            orphans.append(version.digest)
    held = _reach(roots, tags, about, here)
    out = [Goes(t.digest, going[t.name], t.name) for t in tags if t.name in going]
    if not immutable:
        out += [Goes(t.digest, f"{about[t.name]} goes", t.name) for t in tags if about.get(t.name, "") in here and about[t.name] not in held]
    out += [Goes(digest, why.get(digest) or _follows(here[digest], parents), "") for digest in _parents_first(here.keys() - held, here)]
    return Plan(tuple(out), tuple(orphans))


def _parents_first(gone: Collection[str], here: Mapping[str, Version]) -> list[str]:
    """What goes, an index before what it names: an immutable repository lets nothing go that an index in it still names."""
    below = {digest: sorted({child for child in here[digest].children if child in gone}) for digest in sorted(gone)}
    above = Counter(child for children in below.values() for child in children)
    out = [digest for digest in below if not above[digest]]
    for digest in out:
        for child in below[digest]:
            above[child] -= 1
            if not above[child]:
                out.append(child)
    return out


def _follows(version: Version, parents: Mapping[str, list[str]]) -> str:
    above = parents.get(version.digest)
    return f"part of {above[0]}, which goes" if above else f"refers to {version.subject}, which goes"


def _tags_over(tags: Sequence[Tag], about: Mapping[str, str], here: Mapping[str, Version], rule: Rule, now: float) -> dict[str, str]:
    """The tags that the rule takes, each with the reason."""
    out: dict[str, str] = {}
    for tag in tags:  # a companion goes with its subject; one that never had it, as something untagged does
        age = (now - tag.at) / DAY_S
        if tag.name in about and about[tag.name] not in here and rule.untagged_days and age > rule.untagged_days:
            out[tag.name] = f"its subject {about[tag.name]} is not here, for {int(age)} days"
    if not rule.keep_last and not rule.keep_days:
        return out
    own = [tag for tag in tags if tag.kind == "tag" and tag.name not in about and not any(fnmatchcase(tag.name, g) for g in rule.keep_tags)]
    for rank, tag in enumerate(sorted(own, key=lambda t: (-t.at, t.name))):
        age = (now - tag.at) / DAY_S
        version = here.get(tag.digest)
        if (rule.keep_last and rank < rule.keep_last) or (rule.keep_days and age <= rule.keep_days) or (version is not None and version.kept):
            continue
        words = [f"not among the {rule.keep_last} newest tags"] if rule.keep_last else []
        words += [f"older than {rule.keep_days} days"] if rule.keep_days else []
        out[tag.name] = ", ".join(words)
    return out


def _reach(roots: Collection[str], tags: Sequence[Tag], about: Mapping[str, str], here: Mapping[str, Version]) -> set[str]:
    """What is held when the roots are: their children, what refers to them, and so on."""
    beside: dict[str, list[str]] = {}
    for version in here.values():
        if version.subject:
            beside.setdefault(version.subject, []).append(version.digest)
    for tag in tags:
        if tag.name in about:
            beside.setdefault(about[tag.name], []).append(tag.digest)
    held: set[str] = set()
    waiting = [d for d in roots if d in here]
    while waiting:
        digest = waiting.pop()
        if digest in held or digest not in here:
            continue
        held.add(digest)
        waiting += [*here[digest].children, *beside.get(digest, ())]
    return held


def parts(goes: Sequence[Goes], versions: Sequence[Version], most: int) -> list[list[Goes]]:
    """The plan in parts of about `most`, none of which leaves a parent without its children or a referrer without its subject."""
    leader: dict[str, str] = {}

    def find(digest: str) -> str:
        while leader.setdefault(digest, digest) != digest:
            leader[digest] = leader[leader[digest]]
            digest = leader[digest]
        return digest

    gone = {g.digest for g in goes if not g.tag}
    for version in versions:
        if version.digest in gone:
            for other in (*version.children, version.subject):
                if other in gone:
                    leader[find(version.digest)] = find(other)
    for item in goes:
        if subject := subject_of_tag(item.tag):
            leader[find(item.digest)] = find(subject)
    groups: dict[str, list[Goes]] = {}
    for item in goes:
        groups.setdefault(find(item.digest), []).append(item)
    out: list[list[Goes]] = []
    for group in groups.values():
        if out and len(out[-1]) + len(group) <= most:
            out[-1] += group
        else:
            out.append(list(group))
    return out


@dataclass(frozen=True)
class Removal:
    """What a person's wish removes: tags, manifests, and the referrers that stay behind or go along."""

    tags: tuple[str, ...]
    versions: tuple[str, ...]
    referrers: tuple[str, ...] = ()
    holders: tuple[str, ...] = ()  # manifests of this repository that stay and name one that would go


def removal(tags: Sequence[Tag], versions: Sequence[Version], ref: str, *, referrers: bool = False) -> Removal:
    """What goes with a tag, a digest, or with an empty `ref` the whole repository; children go along unless something else names them."""
    here = {v.digest: v for v in versions}
    if not ref:
        return Removal(tuple(t.name for t in tags), tuple(_parents_first(here.keys(), here)))
    target = ref if ref in here else next((t.digest for t in tags if t.name == ref), "")
    parents: dict[str, set[str]] = {}
    for version in versions:
        for child in version.children:
            parents.setdefault(child, set()).add(version.digest)
    names: dict[str, set[str]] = {}
    for tag in tags:
        names.setdefault(tag.digest, set()).add(tag.name)
    if target != ref and (names[target] != {ref} or parents.get(target)):
        return Removal((ref,), ())  # another tag or an index still names the manifest
    gone = {target}
    waiting = [target]
    left: set[str] = set()
    while waiting:
        version = here[waiting.pop()]
        for child in version.children:
            if child in here and child not in gone and not names.get(child) and parents[child] <= gone:
                gone.add(child)
                waiting.append(child)
        beside = {v.digest for v in versions if v.subject == version.digest} | {t.digest for t in tags if subject_of_tag(t.name) == version.digest}
        for digest in beside - gone:
            free = parents.get(digest, set()) <= gone and all(subject_of_tag(n) for n in names.get(digest, ()))
            if referrers and digest in here and free:
                gone.add(digest)
                waiting.append(digest)
            else:
                left.add(digest)
    removed = tuple(t.name for t in tags if t.digest in gone)
    return Removal(removed, tuple(_parents_first(gone, here)), tuple(sorted(left - gone)), tuple(sorted(parents.get(target, set()) - gone)))
