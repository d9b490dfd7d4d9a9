"""What a run has made, put on a hub: weights, tokenizer and model card, and nothing else of the machine."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Literal

from luthier.errors import UserError
from luthier.models.catalogue import CATALOGUE

What = Literal["adapter", "merged", "model"]
# Weights as safetensors, what is read beside them, and texts; no pickles, and none of a run's own files.
_FILES = re.compile(
    r"((adapter_)?model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json|(generation_|adapter_)?config\.json"
    r"|(tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|preprocessor_config)\.json"
    r"|luthier_(base|merge)\.json|(tokenizer|spiece|sentencepiece\.bpe)\.model|(vocab|merges)\.txt"
    r"|(chat_template|additional_chat_templates/.+)\.jinja|README\.md|LICENSE(\.md|\.txt)?)"
)
_RUN = ("manifest.json", "recipe.yaml")


def push(
    path: str | Path, repository: str, *, what: What | None = None, base: str | None = None, private: bool = False
) -> str:
    """Upload a tuned model to the hub, in one commit.

    The token is that of ``HF_TOKEN`` or of ``hf auth login``; ``HF_ENDPOINT`` names another hub.

    Args:
        path: a run folder, or the folder of an adapter or a model.
        repository: OWNER/NAME; made where it is not there.
        what: of a run; None: what it has trained, its adapter or its model.
        base: OWNER/NAME of the adapter's base, where this machine knows it as a folder.
        private: whether a new repository is.

    Returns:
        the commit's address.

    Raises:
        UserError: there is nothing to upload, a file names a folder of this machine, the name is no good, there is no
            token or no right to write, or the hub cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    folder = folder_of(path, what)
    files = files_of(folder, base)
    try:
        validate_repo_id(repository)
    except HFValidationError:
        repository = ""
    if repository.count("/") != 1:
        raise UserError("that is no repository's name", where="OWNER/NAME", remedy="write it as in alice/orders")
    if get_token() is None:
        raise UserError("there is no token to write to the hub with", remedy="set HF_TOKEN, or run `hf auth login`")
    api = HfApi()
    with _explained(repository):
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.create_commit(
            repository,
            [CommitOperationAdd(name, held if isinstance(held, bytes) else str(held)) for name, held in files.items()],
            commit_message="Upload what Luthier has tuned",
        )
    return str(commit.commit_url)


def folder_of(path: str | Path, what: What | None = None) -> Path:
    """The folder whose files are uploaded.

    Raises:
        UserError: there is none, or nothing in it.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise UserError(f"there is no folder {str(path)!r}", remedy="name a run, adapter or model folder")
    if any((folder / name).is_file() for name in _RUN):
        names = [what] if what else ["adapter", "model"]
        found = next((folder / name for name in names if (folder / name).is_dir()), None)
        if found is None:
            remedy = "run `luthier merge` first" if what == "merged" else "finish the run, or name another --what"
            raise UserError(f"the run holds no {' and no '.join(names)}", where=str(folder), remedy=remedy)
        folder = found
    elif what is not None:
        raise UserError("--what goes with a run folder", where=str(folder), remedy="leave it out")
    if not any(folder.rglob("*.safetensors")):
        raise UserError("no weights lie there as safetensors", where=str(folder), remedy="name the model's own folder")
    return folder


def files_of(folder: Path, base: str | None = None) -> dict[str, Path | bytes]:
    """What is uploaded of a folder, by the names it gets: files as they lie, or texts that no longer name this
    machine's folders.

    Args:
        folder: of an adapter or a model.
        base: OWNER/NAME that stands for the base's folder.

    Raises:
        UserError: a file names a folder of this machine, and nothing says what to write for it.
    """
    folder = folder.resolve()
    local, known = _local_base(folder)
    base = base or known
    files: dict[str, Path | bytes] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        # A mixture with a prefix has a folder for each part.
        if not (_FILES.fullmatch(name) or _FILES.fullmatch(path.name)) or any(p[0] == "." for p in Path(name).parts):
            continue
        files[name] = path
        if path.name == "tokenizer.json" or path.suffix not in (".json", ".md"):
            continue
        text = own = path.read_text(encoding="utf-8")
        if base is not None:
            for place in local:
                text = text.replace(json.dumps(place)[1:-1], base)
        for place in (*local, str(folder), f"{Path.home()}/"):
            if len(place) > 1 and place.startswith("/") and place in text:
                raise UserError(
                    f"{name} names a folder of this machine, {place!r}",
                    where=str(path),
                    remedy="say where others find the base, with --base OWNER/NAME, or take it out",
                )
        if text != own:
            files[name] = text.encode()
    return files


def _local_base(folder: Path) -> tuple[list[str], str | None]:
    """The names that an adapter has for its base on this machine alone, and the hub's where that is known."""
    names, known = set[str](), None
    for file, key in (("adapter_config.json", "base_model_name_or_path"), ("luthier_base.json", "base")):
        for path in folder.rglob(file):
            try:
                name = str(json.loads(path.read_text(encoding="utf-8")).get(key) or "")
            except (ValueError, AttributeError):
                continue
            if name in CATALOGUE:
                known = CATALOGUE[name].origin
            elif name.startswith((".", "/", "~")):
                names.add(name)
    return sorted(names, key=len, reverse=True), known


class _explained:
    """Turns the ways in which a hub refuses or is not reached into one clear message."""

    def __init__(self, repository: str) -> None:
        self.repository = repository

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        from huggingface_hub.constants import ENDPOINT
        from huggingface_hub.errors import HfHubHTTPError, HTTPError

        if not isinstance(error, HTTPError | OSError | ValueError):
            return
        said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(error, HfHubHTTPError) and status in (401, 403):
            what, remedy = "the hub does not let this token write there", "use a token with the right to write"
        elif isinstance(error, HfHubHTTPError):
            what, remedy = f"the hub refuses: {said}", "check the name, or try again later"
        else:
            what, remedy = f"{ENDPOINT} cannot be reached: {said}", "check the network, HF_HUB_OFFLINE and HF_ENDPOINT"
        raise UserError(what, where=self.repository, remedy=remedy) from None
