"""hf://owner/name: a folder of export_policy.py on the Hugging Face hub, downloaded once and kept in its cache."""

import functools
import http.client
import re
import urllib.error
import urllib.request
from pathlib import Path

from errors import BadInput
from published import FACTS, WEIGHTS

SCHEME = "hf://"
ADDRESS = re.compile(r"hf://(?P<name>[\w.-]+/[\w.-]+?)(?:@(?P<revision>[\w./-]+))?")
SECONDS = 5  # that a server has for a first answer


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
        from huggingface_hub import constants, errors, hf_hub_download
    except ImportError as problem:
        raise BadInput(
            f"{address}: huggingface_hub is missing ({problem}); `pip install -r requirements-interop.txt`"
        ) from None
    hub = constants.ENDPOINT  # HF_ENDPOINT, where it is set
    name, revision = match["name"], match["revision"]
    question = f"{hub}/{name}/resolve/{revision or 'main'}/{FACTS}"
    silence = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else no_answer(question)
    is_cached = silence is not None
    try:
        facts = Path(hf_hub_download(name, FACTS, revision=revision, local_files_only=is_cached))
        commit = facts.parent.name
        hf_hub_download(name, WEIGHTS, revision=commit, local_files_only=is_cached)
    except errors.LocalEntryNotFoundError as problem:
        reason = silence or one_line(problem)
        raise BadInput(f"{address}: neither in the local cache nor to be had from {hub} ({reason})") from None
    except errors.RepositoryNotFoundError:
        raise BadInput(
            f"{address}: {hub} has no such repository, or it is private (`hf auth login` says who you are)"
        ) from None
    except errors.RevisionNotFoundError:
        raise BadInput(f"{address}: {hub}/{name} has no revision {revision}") from None
    except errors.EntryNotFoundError:
        raise BadInput(f"{address}: is no folder of export_policy.py, it lacks {FACTS} or {WEIGHTS}") from None
    except (errors.HTTPError, OSError, ValueError) as problem:
        raise BadInput(f"{address}: cannot be had from {hub} ({one_line(problem)})") from None
    from_cache = f" (from the cache alone: {silence})" if silence else ""
    print(f"{address}: commit {commit}, in {facts.parent}{from_cache}", flush=True)
    return facts.parent


def no_answer(address: str) -> str | None:
    """Why a server does not answer, None where it does, be it with a refusal. One short question: the hub's own client
    retries for most of a minute where there is no network."""
    try:
        urllib.request.urlopen(address, timeout=SECONDS).close()
    except urllib.error.HTTPError as answer:
        return None if answer.code < 500 else one_line(answer)
    except (OSError, ValueError, http.client.HTTPException) as problem:
        return one_line(problem)
    return None


def one_line(problem: BaseException) -> str:
    return (str(problem).strip() or type(problem).__name__).splitlines()[0]
