"""`airlock nim env`: the environment, docker line or NIM Operator resource with which an unmodified NIM takes a profile from this registry."""

from __future__ import annotations

import argparse
import json

from artifact.commands.nim import add_site, open_site
from artifact.nim_env import FORMATS, SECRETS, WAYS, Start, docker_line, env_file, environment, nim_cache, nim_service
from artifact.presence import Models

EXAMPLE = "airlock nim env nvcr.io/nim/meta/llama-3.1-8b-instruct:1.8.4 vllm-bf16-tp1 --registry https://registry.site --ngc https://ngc.site:5443"


def main(argv: list[str]) -> int:
    """Prints what a container is started with; raises NotFound where the profile is not whole here, Invalid for an address that is missing."""
    parser = argparse.ArgumentParser(
        prog="airlock nim env",
        description="Print what an unmodified NIM container needs to take one profile from this registry. No secret is ever printed.",
        epilog=f"example: {EXAMPLE}; the key comes from AIRLOCK_KEY; exit 3: not everything of the profile is here",
    )
    parser.add_argument("image", metavar="IMAGE", help="NAME:TAG or NAME@DIGEST, as this registry has it")
    parser.add_argument("profile", metavar="PROFILE", help="its id or its description (airlock nim profiles)")
    parser.add_argument("--way", choices=WAYS, default="ngc", help="NGC listener (default), exported cache, S3 override, or Hub door")
    parser.add_argument("--format", choices=FORMATS, default="env", help="lines for --env-file (default), a docker line, or YAML of the NIM Operator")
    parser.add_argument("--ngc", default="", metavar="URL", help="the NGC listener as the container reaches it")
    parser.add_argument("--s3", default="", metavar="URL", help="the S3 listener as the container reaches it")
    parser.add_argument("--bucket", default=Start.bucket, help=f"the bucket of the S3 override ({Start.bucket})")
    parser.add_argument("--region", default=Start.region, help=f"the region of the S3 listener ({Start.region})")
    parser.add_argument("--ca", default="", metavar="FILE", help="the authority's file on the docker host, or the name of a config map with it")
    parser.add_argument("--cache", default="", metavar="DIR", help="the cache's directory on the docker host, or the name of a filled claim")
    parser.add_argument("--namespace", default=Start.namespace, help=f"of the Kubernetes resources ({Start.namespace})")
    parser.add_argument("--pull-secret", default=Start.pull_secret, metavar="NAME", help=f"the secret for the image ({Start.pull_secret})")
    parser.add_argument("--auth-secret", default=Start.auth_secret, metavar="NAME", help=f"the secret with the key ({Start.auth_secret})")
    add_site(parser)
    args = parser.parse_args(argv)
    remote, image, _, manifest = open_site(args)
    presence = Models(remote).of(manifest.find(args.profile))
    presence.check(str(image))
    start = Start(
        image,
        presence.profile,
        presence.size,
        args.way,
        args.registry,
        args.ngc,
        args.s3,
        args.bucket,
        args.region,
        args.ca,
        args.cache,
        args.namespace,
        args.pull_secret,
        args.auth_secret,
    )
    text = {"env": env_file, "docker": docker_line, "nimcache": nim_cache, "nimservice": nim_service}[args.format](start)
    if args.json:
        cluster = args.format.startswith("nim")
        facts = {"image": start.pulled, "profile": presence.profile.id, "way": args.way, "env": environment(start, cluster)}
        print(json.dumps(facts | {"secrets": SECRETS[args.way], "text": text}))
    else:
        print(text)
    return 0
