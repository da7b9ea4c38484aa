"""The Hugging Face hub: names of checkpoints -> local folders, and files that are pushed to a repository."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from esd_jax.inputs import expanded
from esd_jax.io.safetensors import refuse_pickle

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
NO_FOLDER = "there is no folder {}; give a diffusers folder, or a hub id such as org/name"
STEMS = ("diffusion_pytorch_model", "model")


def resolve(
    source: str | Path,
    *,
    variant: str | None = None,
    revision: str | None = None,
    weights: bool = True,
    components: Sequence[str] = ("*",),
) -> Path:
    """The local folder of a checkpoint, downloaded into the hub's cache if need be.

    Args:
      source: a folder, or the id of a model on the hub ("org/name"). A folder that exists comes first.
      variant: which weights to download ("fp16"); None, those whose file names carry no variant.
      revision: a branch, tag or commit of the hub's repository.
      weights: whether weights are needed, or the small files alone.
      components: those whose weights are needed.

    With `HF_HUB_OFFLINE=1`, or without a network, only the hub's cache is searched.

    Raises:
      FileNotFoundError: no such folder; or the hub has no such model or revision, or cannot be reached.
      ValueError: a single file; or a model that the hub gives only to those who accepted its licence.
    """
    path = expanded(source)
    if path.is_dir():
        if revision:
            raise ValueError(f"revision={revision!r} is for models on the hub, but {path} is a local folder")
        return path
    if path.suffix.lower() == ".gguf":
        raise ValueError(
            f"{path} is quantised as GGUF, which is not implemented: erase from the file in bfloat16 from which it was "
            "made; a LoRA of that also fits this file in ComfyUI"
        )
    if path.suffix.lower() == ".safetensors":
        raise ValueError(f"{path} is a single .safetensors file; here a diffusers folder or a hub id is needed")
    if path.is_file():
        refuse_pickle(path)
        raise ValueError(f"{path} is a file; give the diffusers folder that holds model_index.json")
    if isinstance(source, Path) or not HUB_ID.fullmatch(source):
        raise FileNotFoundError(NO_FOLDER.format(source))
    return _download(source, variant, revision, weights, components)


def weight_patterns(variant: str | None) -> list[str]:
    """What the safetensors files and shard indices of a variant are called, in every component."""
    v, n = (f".{variant}" if variant else ""), "-?????-of-?????"
    names = [f"{v}.safetensors", f"{v}{n}.safetensors", f"{n}{v}.safetensors", f".safetensors.index{v}.json"]
    return [f"*/{stem}{name}" for stem in STEMS for name in dict.fromkeys(names)]


def _plain_patterns(folder: Path) -> list[str]:
    """What the plain weights are called of those components that lack the variant which others have."""
    components = [path.parent for path in sorted(folder.glob("*/config.json"))]
    lacking = [path for path in components if not any(path.glob("*.safetensors"))]
    if len(lacking) == len(components):
        return []
    return [f"{path.name}/{pattern.removeprefix('*/')}" for path in lacking for pattern in weight_patterns(None)]


def _download(repo: str, variant: str | None, revision: str | None, weights: bool, components: Sequence[str]) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    where = f"{repo!r}" + (f" (revision {revision!r})" if revision else "")
    small = ["model_index.json", "*/config.json", "*/*_config.json", "*/tokenizer.json", "*/special_tokens_map.json"]
    small += ["*/added_tokens.json", "*/vocab.json", "*/merges.txt", "*/chat_template.jinja", "LICENSE*", "NOTICE*"]
    try:
        files = [pattern.removeprefix("*/") for pattern in (weight_patterns(variant) if weights else [])]
        patterns = [*small, *(f"{component}/{file}" for component in components for file in files)]
        folder = huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=patterns)
        if weights and variant and (more := _plain_patterns(Path(folder))):
            huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=more)
    except errors.LocalEntryNotFoundError as error:
        # Raised (by recent versions) where the cache lacks a file that was asked for, whether it is needed or not:
        # a licence, say. The reader knows; it names what is missing.
        if isinstance(error, getattr(errors, "IncompleteSnapshotError", ())):
            wanted = {"allow_patterns": ["model_index.json"], "local_files_only": True}
            return Path(huggingface_hub.snapshot_download(repo, revision=revision, **wanted))
        raise FileNotFoundError(
            f"{where} is no folder here, is not in the hub's cache, and the hub cannot be reached: "
            "connect (and unset HF_HUB_OFFLINE), or give a local diffusers folder"
        ) from error
    except errors.GatedRepoError as error:
        raise ValueError(
            f"the hub gives {where} only to those who accepted its licence: accept it at "
            f"https://huggingface.co/{repo}, then run `hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(f"the hub has no {where}: check the revision at huggingface.co/{repo}") from error
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{where} is neither a folder here nor a model on the hub: check the spelling (a private model needs "
            "`hf auth login`)"
        ) from error
    except Exception as error:  # its HTTP library's errors have no common base, and it has changed before
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise FileNotFoundError(f"cannot download {where} from the hub: {reason[0]}") from error
    return Path(folder)


def license_of(card: Path) -> str | None:
    """The licence that a model card's front matter names; None without a card, or one that names none."""
    import huggingface_hub

    try:
        license_id = (huggingface_hub.metadata_load(card) or {}).get("license") if card.is_file() else None
    except Exception:  # whatever its YAML parser refuses: a card is for people
        return None
    return license_id if isinstance(license_id, str) else None


def check_push(repo: str) -> None:
    """Raises ValueError, in one line, where nothing can be pushed to a repository: its name, no network, no token."""
    import huggingface_hub

    if not HUB_ID.fullmatch(repo):
        raise ValueError(f"{repo!r} is no repository of the hub: give ORG/NAME")
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise ValueError(f"cannot push to {repo}: HF_HUB_OFFLINE is set; unset it, and run the command again")
    if not huggingface_hub.get_token():
        raise ValueError(f"cannot push to {repo}: there is no token; run `hf auth login`, or set HF_TOKEN")


def push(
    repo: str, paths: Mapping[Path, str], card: str, *, private: bool = True, message: str = "Upload with esd_jax"
) -> str:
    """Uploads files and folders to a repository of the hub, which is made if there is none. Returns its address.

    Args:
      repo: "ORG/NAME".
      paths: what is uploaded -> where it comes to lie in the repository; of a folder also "", its root.
      card: the repository's README.md.
      private: make a private repository; one that exists and is public is then refused.

    Raises ValueError, in one line: see `check_push`; the hub refuses it, or cannot be reached.
    """
    import huggingface_hub

    check_push(repo)
    try:
        huggingface_hub.create_repo(repo, repo_type="model", private=private, exist_ok=True)
        hidden = huggingface_hub.HfApi().repo_info(repo, repo_type="model").private
    except Exception as error:  # its HTTP library's errors have no common base, and it has changed before
        raise ValueError(_refused(repo, error)) from error
    if private and not hidden:
        raise ValueError(f"{repo} exists and is public: give --public, or another repository")
    contents: list[tuple[Path | bytes, str]] = [*paths.items(), (card.encode(), "README.md")]
    try:
        for content, place in contents:
            if isinstance(content, Path) and content.is_dir():
                huggingface_hub.upload_folder(
                    repo_id=repo,
                    repo_type="model",
                    folder_path=content,
                    path_in_repo=place or None,
                    ignore_patterns=["README.md", ".*"],
                    commit_message=message,
                )
            else:
                huggingface_hub.upload_file(
                    repo_id=repo,
                    repo_type="model",
                    path_or_fileobj=content,
                    path_in_repo=place,
                    commit_message=message,
                )
    except Exception as error:
        raise ValueError(_refused(repo, error)) from error
    return f"https://huggingface.co/{repo}"


def _refused(repo: str, error: Exception) -> str:
    reason = str(error).strip().splitlines() or [type(error).__name__]
    return f"cannot push to {repo}: {reason[0]}"
