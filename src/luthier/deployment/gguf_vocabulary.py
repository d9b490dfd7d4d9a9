"""A tokenizer as llama.cpp reads it: its pieces, their kinds, merges, special tokens and chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.data.render import end_of_turn_ids
from luthier.errors import UserError

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PreTrainedTokenizerBase

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {
    (_GPT2,): "gpt-2",
    (r"\p{N}", _GPT2): "smollm",
    (_CL100K % "",): "qwen2",
    (_CL100K % "{1,3}",): "llama-bpe",
}
"""llama.cpp's name (``tokenizer.ggml.pre``) for each way to cut a text before pieces are merged: the patterns, in
order. The name decides which pieces come out, so it is taken from what the tokenizer does, not from a model's name."""


def put_vocabulary(writer: GGUFWriter, folder: Path, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Write a tokenizer.

    Args:
        writer: of the file.
        folder: holds ``tokenizer.json``.
        tokenizer: of the folder.
        rows: of the embeddings; those beyond the vocabulary become unused tokens.

    Raises:
        UserError: llama.cpp has no tokenizer that cuts texts as this one does, or a token has no row.
    """
    where = str(folder / "tokenizer.json")
    try:
        described = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"tokenizer.json cannot be read: {error}", where=str(folder), remedy="save the tokenizer with transformers"
        ) from None
    model = described["model"]
    if model.get("type") != "BPE":
        raise UserError(
            f"tokenizers of kind {model.get('type')} cannot be written as GGUF here",
            where=where,
            remedy="serve it as safetensors: `luthier export --format safetensors`",
        )
    by_pieces = bool(model.get("byte_fallback"))
    names, kinds = _tokens(described, rows, where, by_pieces=by_pieces)
    if by_pieces:
        _require_sentencepiece(described, where)
        writer.add_tokenizer_model("llama")
        writer.add_token_list(names)
        writer.add_token_scores(_scores(model, rows))
        writer.add_add_space_prefix(_prefixes_space(described))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_split_name(described, where))
        writer.add_token_list(names)
        writer.add_token_merges([_merge(pair) for pair in model["merges"]])
    writer.add_token_types(kinds)
    _put_special(writer, folder, tokenizer)


def _tokens(described: dict[str, Any], rows: int, where: str, *, by_pieces: bool) -> tuple[list[str], list[int]]:
    """The text and the kind of each token, ``rows`` of them."""
    from gguf import TokenType

    names = [f"[PAD{index}]" for index in range(rows)]
    kinds = [TokenType.UNUSED] * rows
    vocabulary = described["model"]["vocab"]
    added = {token["id"]: token for token in described.get("added_tokens", [])}
    most = max([*vocabulary.values(), *added])
    if most >= rows:
        raise UserError(
            f"the tokenizer has a token of number {most:,} and the embeddings have {rows:,} rows",
            where=where,
            remedy="tokenizer and weights are not of the same model; save them again",
        )
    for name, index in vocabulary.items():
        names[index] = name
        is_byte = by_pieces and len(name) == 6 and name.startswith("<0x") and name.endswith(">")
        kinds[index] = TokenType.BYTE if is_byte else TokenType.NORMAL
    for index, token in added.items():
        names[index] = token["content"]
        kinds[index] = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
        if by_pieces and not token["special"]:
            names[index] = names[index].replace("\u2581", " ")  # they are found in the text as it is
    unknown = described["model"].get("unk_token")
    if by_pieces and unknown in vocabulary:
        kinds[vocabulary[unknown]] = TokenType.UNKNOWN
    return names, [int(kind) for kind in kinds]


def _merge(pair: str | list[str]) -> str:
    # A space within a piece stands as the letter that GPT-2's alphabet has for it; one alone parts the two.
    return pair if isinstance(pair, str) else " ".join(piece.replace(" ", "\u0120") for piece in pair)


def _scores(model: dict[str, Any], rows: int) -> list[float]:
    """The earlier a piece is merged, the higher its score: llama.cpp merges the best of what stands side by side."""
    scores = [-1e9] * rows
    for rank, pair in enumerate(model["merges"]):
        left, right = pair.split(" ") if isinstance(pair, str) else pair
        made = model["vocab"].get(left + right)
        if made is not None and scores[made] == -1e9:
            scores[made] = -float(rank)
    return scores


def _steps(part: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """A normaliser's or pre-tokenizer's steps, one for one that has no others in it."""
    if part is None:
        return []
    return part[key] if part.get("type") == "Sequence" else [part]


def _split_name(described: dict[str, Any], where: str) -> str:
    patterns = []
    for step in _steps(described.get("pre_tokenizer"), "pretokenizers"):
        if step["type"] == "Digits" and step.get("individual_digits"):
            patterns.append(r"\p{N}")
        elif step["type"] == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
            patterns.append(step["pattern"].get("Regex", ""))
        elif step["type"] == "ByteLevel" and not step.get("add_prefix_space"):
            patterns += [_GPT2] if step.get("use_regex", True) else []
        else:
            patterns.append(step["type"])
    name = _SPLITS.get(tuple(patterns))
    if name is None:
        raise UserError(
            f"llama.cpp has no name that is known here for a tokenizer that cuts texts by {patterns}",
            where=where,
            remedy="serve it as safetensors: `luthier export --format safetensors`, or use llama.cpp's own converter",
        )
    return name


def _require_sentencepiece(described: dict[str, Any], where: str) -> None:
    """Refuse a tokenizer of pieces that does more to a text than to write its spaces as ▁.

    Raises:
        UserError: it does.
    """
    strange = [
        step["type"]
        for step in _steps(described.get("normalizer"), "normalizers")
        if step not in ({"type": "Prepend", "prepend": "▁"}, _SPACES)
    ]
    strange += [
        step["type"]
        for step in _steps(described.get("pre_tokenizer"), "pretokenizers")
        if step["type"] != "Metaspace" and not _splits_spaces_only(step)
    ]
    if strange:
        raise UserError(
            f"llama.cpp reads texts without {', '.join(strange)}, which this tokenizer applies",
            where=where,
            remedy="serve it as safetensors: `luthier export --format safetensors`",
        )


_SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}


def _splits_spaces_only(step: dict[str, Any]) -> bool:
    # After the normaliser no space is left, so Gemma's split at spaces does nothing.
    return step["type"] == "Split" and step.get("pattern") == {"String": " "}


def _prefixes_space(described: dict[str, Any]) -> bool:
    if any(step["type"] == "Prepend" for step in _steps(described.get("normalizer"), "normalizers")):
        return True
    return any(
        step.get("prepend_scheme", "never") != "never"
        for step in _steps(described.get("pre_tokenizer"), "pretokenizers")
        if step["type"] == "Metaspace"
    )


def _put_special(writer: GGUFWriter, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Special tokens, those that end a turn, what the tokenizer adds by itself, and the chat template."""
    for name in ("bos", "eos", "unk", "pad"):
        number = getattr(tokenizer, f"{name}_token_id")
        if number is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    writer.add_add_bos_token(adds(tokenizer, tokenizer.bos_token_id, 0))
    writer.add_add_eos_token(adds(tokenizer, tokenizer.eos_token_id, -1))
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    ends = _generation_ends(folder)
    if template:
        writer.add_chat_template(template)
        ends = end_of_turn_ids(tokenizer) + ends
    # llama.cpp has a place for the end of a turn and one for that of a turn which calls a tool; it knows usual ones
    # by their texts besides.
    others = [number for number in dict.fromkeys(ends) if number != tokenizer.eos_token_id]
    for add, number in zip((writer.add_eot_token_id, writer.add_eom_token_id), others, strict=False):
        add(number)


def adds(tokenizer: PreTrainedTokenizerBase, token: int | None, place: int) -> bool:
    """Whether a tokenizer puts a token before (place 0) or behind (-1) each text by itself."""
    return token is not None and tokenizer("a").input_ids[place] == token


def _generation_ends(folder: Path) -> list[int]:
    """Where generation ends by ``generation_config.json``, if there is one."""
    try:
        told = json.loads((folder / "generation_config.json").read_text(encoding="utf-8")).get("eos_token_id")
    except (OSError, ValueError):
        return []
    return [] if told is None else [told] if isinstance(told, int) else list(told)
