"""Where Hugging Face keeps tensors: a file, shards of it, a repository of the hub."""

import reprlib
from pathlib import Path

from tljax.types import BadInput
from tljax.weights.files import MAX_TENSORS, Tensor, open_safetensors, read_json

ONE, INDEX, ADAPTER = "model.safetensors", "model.safetensors.index.json", "adapter_config.json"
PICKLES = (".bin", ".pth", ".pt", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack")
WANTED = (
    "config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
    "processor_config.json", ADAPTER, "adapter_model.safetensors", ONE, INDEX,
    "model-*-of-*.safetensors",
)  # fmt: skip
"""What is fetched from the hub; never a pickle, never code."""


def refuse_pickle(path: Path) -> None:
    """Raise BadInput: opening a pickle runs what is in it."""
    raise BadInput(
        f"{path} is no safetensors file; pickles and the like can run code and are never opened\n"
        "convert it where it is trusted, in torch: safetensors.torch.save_file(state_dict, "
        f"{ONE!r}),\nor in transformers: AutoModel.from_pretrained(..).save_pretrained(folder)"
    )


def weights_files(folder: Path) -> tuple[Path, ...]:
    """Return the files of tensors in a folder.

    Raises: BadInput for a folder without them, or with an index that is damaged or incomplete.
    """
    names = sorted(path.name for path in folder.iterdir())
    if ONE in names:
        return (folder / ONE,)
    if INDEX not in names:
        if unsafe := [name for name in names if name.endswith(PICKLES)]:
            refuse_pickle(folder / unsafe[0])
        raise BadInput(
            f"{folder} has no {ONE}; it holds: {', '.join(names[:8]) or 'nothing'}\n"
            f"expected a Hugging Face folder: config.json and {ONE}, or {INDEX} and its shards"
        )
    return tuple(folder / name for name in sorted(set(_shard_of(folder / INDEX).values())))


def _shard_of(index: Path) -> dict[str, str]:
    """Read which file holds which tensor."""
    told = read_json(index).get("weight_map")
    if not isinstance(told, dict) or not told or len(told) > MAX_TENSORS:
        raise BadInput(f"{index}: weight_map={reprlib.repr(told)}; expected a file for each tensor")
    for name in set(map(repr, told.values())):
        plain = name[1:-1]
        if not plain.endswith(".safetensors") or Path(plain).name != plain or "\\" in plain:
            raise BadInput(
                f"{index}: {name[:80]} is no plain name of a .safetensors file beside it"
            )
    files = sorted(set(told.values()))
    if lacking := [name for name in files if not index.with_name(name).is_file()]:
        raise BadInput(
            f"{index} names {len(files)} files; missing: {', '.join(lacking[:3])} ({len(lacking)} "
            "in all)\ncopy or download them again"
        )
    return told


def read_files(paths: tuple[Path, ...]) -> dict[str, Tensor]:
    """Return the tensors of all files, not yet read.

    Raises: BadInput for one that stands in two files, or not where the index says.
    """
    if len(paths) == 1:
        return open_safetensors(paths[0])[0]
    index = paths[0].with_name(INDEX)
    told, found = _shard_of(index), dict[str, Tensor]()
    for path in paths:
        tensors, _ = open_safetensors(path)
        if twice := sorted(tensors.keys() & found.keys()):
            raise BadInput(f"{path}: tensor {twice[0]} stands in another shard as well")
        if odd := sorted(
            tensors.keys() ^ {name for name, file in told.items() if file == path.name}
        ):
            says = "has no" if odd[0] in told else "does not know"
            where = path if odd[0] in told else index
            raise BadInput(f"{where} {says} tensor {odd[0]}: the index is of another model")
        found |= tensors
    return found


def is_hub_name(name: str) -> bool:
    """Tell whether a name could be a repository, and no path somebody mistyped."""
    owner, slash, repository = name.partition("/")
    plain = all(part.replace("-", "").replace("_", "").replace(".", "").isalnum() and part.isascii()
                and not part.startswith(".") for part in (owner, repository))  # fmt: skip
    is_path = Path(owner).exists() or repository.endswith(
        (".safetensors", ".npz", ".onnx", *PICKLES)
    )
    return bool(slash) and plain and not is_path


def fetch(name: str) -> Path:
    """Return the folder of a repository: from the cache, or downloaded.

    Raises: BadInput if it is neither here nor to be had.
    """
    try:
        import huggingface_hub  # only hub names need it

        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(WANTED)))
    except ImportError:
        why = "the package huggingface_hub is not installed: pip install huggingface_hub"
    # Its errors have no common base; those of the network come from other packages.
    except Exception as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    raise BadInput(
        f"no folder {name!r} here, and the hub's repository of this name could not be had\n{why}\n"
        "without a network, download it elsewhere and give the folder; one that needs a login: "
        "hf auth login"
    )
