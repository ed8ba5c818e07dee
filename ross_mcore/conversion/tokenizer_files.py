"""The files of an exported tokenizer, for every version of transformers, slow tokenizers of 4.43 included."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ross_mcore import checked
from ross_mcore.conversion.huggingface import copy_tokenizer, read_json
from ross_mcore.errors import ConversionError

SETTINGS = "tokenizer_config.json"
CHAT_TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
SLOW_FILES = ("vocab.json", "merges.txt")


def write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def write_tokenizer(source: Path, target: Path) -> None:
    """Copies a tokenizer, and adds what transformers 4.43 needs and later versions no longer write.

    Merges become strings (its tokenizers cannot read pairs), and a Qwen2 tokenizer gets the files of the slow class:
    vocab.json, merges.txt, added_tokens_decoder, additional_special_tokens. Raises ConversionError.
    """
    copy_tokenizer(source, target)
    whole, settings_file = target / "tokenizer.json", target / SETTINGS
    if not whole.exists():
        return
    content = read_tokenizer_json(whole)
    if with_old_merges(content):
        whole.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    settings = read_json(settings_file) if settings_file.exists() else {}
    changed = _for_old_versions(settings, content)
    is_byte_level = content["model"].get("type") == "BPE" and (content.get("decoder") or {}).get("type") == "ByteLevel"
    if is_byte_level and str(changed.get("tokenizer_class")).startswith("Qwen2"):
        _write_slow_files(target, content)
    if changed != settings:
        write_json(settings_file, changed)


def read_tokenizer_json(path: Path) -> dict[str, Any]:
    """The contents of a tokenizer.json, which has the sections used here. Raises ConversionError."""
    try:
        content = checked.mapping(checked.read_json(path, checked.MOST_TOKENIZER_FILE_BYTES), "it")
        checked.mapping(content.get("model"), "model")
        for token in content.setdefault("added_tokens", []):
            checked.count(checked.mapping(token, "a token of added_tokens"), "id", least=0)
        return content
    except ValueError as error:
        raise ConversionError(f"{path} cannot be used: {error}; copy it again") from None


def with_old_merges(content: dict[str, Any]) -> bool:
    """Writes merges as strings where no token contains a space; returns whether any was a pair."""
    merges = content["model"].get("merges", [])
    pairs = [merge for merge in merges if not isinstance(merge, str)]
    if not pairs or any(" " in half for pair in pairs for half in pair):
        return False
    content["model"]["merges"] = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
    return True


def added_tokens_decoder(content: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """`added_tokens_decoder` of a tokenizer_config.json, from the contents of a tokenizer.json."""
    keys = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    return {str(token["id"]): {key: token.get(key, False) for key in keys} for token in content["added_tokens"]}


def set_chat_template(folder: Path, template: str | None) -> None:
    """Makes `template` the tokenizer's chat template; None: it has none. transformers 4.43 reads it in the settings."""
    for name in CHAT_TEMPLATE_FILES:
        (folder / name).unlink(missing_ok=True)
    file = folder / SETTINGS
    settings = read_json(file) if file.exists() else {}
    settings.pop("chat_template", None)
    write_json(file, settings if template is None else {**settings, "chat_template": template})


def has_chat_template(folder: Path) -> bool:
    file = folder / SETTINGS
    own = file.exists() and bool(read_json(file).get("chat_template"))
    return own or any((folder / name).exists() for name in CHAT_TEMPLATE_FILES)


def _for_old_versions(settings: dict[str, Any], content: dict[str, Any]) -> dict[str, Any]:
    """The settings with the names that transformers 4 knows, which 5 reads too."""
    changed = {key: value for key, value in settings.items() if key not in ("backend", "is_local")}
    if changed.get("tokenizer_class", "TokenizersBackend") == "TokenizersBackend":
        changed["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(changed.get("extra_special_tokens"), list):
        extra = changed.pop("extra_special_tokens")
        changed.setdefault("additional_special_tokens", extra)
    changed.setdefault("added_tokens_decoder", added_tokens_decoder(content))
    return changed


def _write_slow_files(target: Path, content: dict[str, Any]) -> None:
    """vocab.json and merges.txt, unless they came with the tokenizer; added tokens are in the settings."""
    if all((target / name).exists() for name in SLOW_FILES):
        return
    added = {token["content"] for token in content["added_tokens"]}
    vocabulary = {token: number for token, number in content["model"]["vocab"].items() if token not in added}
    (target / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"].get("merges", [])]
    (target / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
