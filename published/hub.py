"""hf://owner/name: a folder of export_policy.py on the Hugging Face hub, downloaded once and kept in its cache."""

import functools
import re
from pathlib import Path

from errors import BadInput
from published import FACTS, WEIGHTS

SCHEME = "hf://"
ADDRESS = re.compile(r"hf://(?P<name>[\w.-]+/[\w.-]+?)(?:@(?P<revision>[\w./-]+))?")
SECONDS = 10  # that the hub has for a first answer


def is_address(source: object) -> bool:
    return isinstance(source, str) and source.startswith(SCHEME)


@functools.cache
def downloaded(address: str) -> Path:
    """hf://owner/name[@revision] -> the local folder of one commit; a process asks once, and plays one commit.

    Without a network the newest commit in the cache is taken. Raises BadInput where neither has it.
    """
    match = ADDRESS.fullmatch(address)
    if match is None:
        raise BadInput(f"{address}: expected hf://owner/name, or hf://owner/name@revision")
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as problem:
        raise BadInput(f"{address}: huggingface_hub is missing ({problem}); `pip install huggingface_hub`") from None
    hub = huggingface_hub.constants.ENDPOINT  # HF_ENDPOINT, where it is set
    name, revision = match["name"], match["revision"]
    try:
        facts = Path(huggingface_hub.hf_hub_download(name, FACTS, revision=revision, etag_timeout=SECONDS))
        commit = facts.parent.name
        huggingface_hub.hf_hub_download(name, WEIGHTS, revision=commit, etag_timeout=SECONDS)
    except errors.LocalEntryNotFoundError:
        raise BadInput(f"{address}: neither in the local cache nor to be had, {hub} does not answer") from None
    except errors.RepositoryNotFoundError:
        raise BadInput(
            f"{address}: {hub} has no such repository, or it is private (`hf auth login` says who you are)"
        ) from None
    except errors.RevisionNotFoundError:
        raise BadInput(f"{address}: {hub}/{name} has no revision {revision}") from None
    except errors.EntryNotFoundError:
        raise BadInput(f"{address}: is no folder of export_policy.py, it lacks {FACTS} or {WEIGHTS}") from None
    except (errors.HTTPError, OSError, ValueError) as problem:
        reason = (str(problem).strip() or type(problem).__name__).splitlines()[0]
        raise BadInput(f"{address}: cannot be had from {hub} ({reason})") from None
    print(f"{address}: commit {commit}, in {facts.parent}", flush=True)
    return facts.parent
