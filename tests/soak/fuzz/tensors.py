"""Damage to files of tensors: headers that claim too much, other types and shapes, hostile pickles.

Files that are unpacked, changed and packed again have valid sizes and checksums, so that the change reaches the code
that uses it.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import zipfile
from pathlib import Path
from typing import Any

from tests.soak.fuzz import mutate
from tests.soak.fuzz.tables import mutate_npy

OPENED = "a pickle of this file was run"
"""Content of the file that a hostile pickle writes when it is run."""
DTYPES = ("F32", "F64", "F16", "BF16", "I64", "I32", "I8", "U8", "BOOL", "F8_E4M3", "U64", "C64", "F4", "", "float")
ITEM_BYTES = {"F64": 8, "I64": 8, "U64": 8, "C64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2}
SIZES = (0, 1, 2, -1, 2**31, 2**40, 2**63, 2**64)


class _Bomb:
    """An object whose pickle, run, leaves a file in the working directory."""

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"echo '{OPENED}' > pickled",)


def mutate_safetensors(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """A safetensors file with a header that does not fit its bytes, or with values that are no weights."""
    length = int.from_bytes(data[:8], "little")
    kind = rng.random()
    if kind < 0.2:
        return mutate.mutate_bytes(data, rng)
    if kind < 0.3:
        length = rng.choice((0, 1, 2**31, 2**63, 2**64 - 1, length - 1, length + 1))
        return length.to_bytes(8, "little") + data[8:], f"the header has {length} bytes"
    text, body = data[8 : 8 + length], data[8 + length :]
    header = json.loads(text)
    names = sorted(name for name in header if name != "__metadata__")
    if kind < 0.5 or not names:
        text, what = mutate.mutate_json(text, rng)
    else:
        name = rng.choice(names)
        header, body, what = _mutate_tensor(header, body, name, rng)
        text = json.dumps(header).encode("utf-8", "surrogatepass")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + body, f"header: {what}"


def _mutate_tensor(
    header: dict[str, Any], body: bytes, name: str, rng: random.Random
) -> tuple[dict[str, Any], bytes, str]:
    """A nearly consistent header after one tensor is replaced."""
    tensor = header[name]
    start, end = tensor["data_offsets"]
    change = rng.choice(
        ("dtype", "dtype", "same bytes", "shape", "flat", "empty", "huge", "nan", "gone", "name", "metadata")
    )
    if change == "dtype":
        tensor["dtype"] = rng.choice(DTYPES)
    elif change == "same bytes":
        alike = [
            d for d, size in ITEM_BYTES.items() if size == ITEM_BYTES.get(tensor["dtype"]) and d != tensor["dtype"]
        ]
        tensor["dtype"] = rng.choice(alike or ["F32"])
    elif change == "shape" and tensor["shape"]:
        tensor["shape"][rng.randrange(len(tensor["shape"]))] = rng.choice(SIZES)
    elif change == "flat":
        total = 1
        for size in tensor["shape"]:
            total *= size
        tensor["shape"] = rng.choice(([total], [1, total], [total, 1], [total] + [1] * 70))
    elif change == "empty":
        tensor["shape"] = rng.choice(([0], [2**40, 0], [2**62, 2**62, 0]))
        tensor["data_offsets"] = [start, start]
    elif change == "huge":
        tensor["shape"] = rng.choice(([2**62, 4], [2**32, 2**32], [2**63 - 1]))
    elif change == "nan":
        body = body[:start] + b"\xff" * (end - start) + body[end:]
    elif change == "gone":
        del header[name]
    elif change == "name":
        header[rng.choice(("", "a\nb", "\x1b[31m", "\ud800", name + ".x", "a" * 5000))] = header.pop(name)
    else:
        header["__metadata__"] = rng.choice(({"format": "tf"}, {"format": 1}, {}, None, {"a": "b" * 100_000}, {"": ""}))
    return header, body, f"{name[-60:]!r}: {change} {json.dumps(header.get(name))[:80]}"


def mutate_zip(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """A zip (.npz, torch.save) with one member changed, gone, compressed, or a pickle that runs code."""
    kind = rng.random()
    if kind < 0.25:
        return mutate.mutate_bytes(data, rng)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    is_torch = any(name.endswith(".pkl") for name in members)
    if is_torch and kind < 0.65:
        return mutate_saved(data, rng)
    name = rng.choice([name for name in members if members[name]] or list(members))
    compression, what = zipfile.ZIP_STORED, ""
    if name.endswith(".pkl"):
        members[name], what = mutate_pickle(members[name], rng)
    elif (change := rng.random()) < 0.15:
        del members[name]
        what = "gone"
    elif change < 0.3:
        members[name], what, compression = bytes(300 << 20), "unpacks to 300 MiB", zipfile.ZIP_DEFLATED
    elif change < 0.4:
        members["../../canary/" + name] = members.pop(name)
        what = "called ../../canary/..."
    else:
        members[name], what = (mutate_npy if name.endswith(".npy") else mutate.mutate_bytes)(members[name], rng)
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression, compresslevel=1) as archive:
        for member, content in members.items():
            archive.writestr(member, content)
    return stream.getvalue(), f"{name}: {what}"


def mutate_saved(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """A file of torch.save with one value changed, perhaps to an unexpected tensor."""
    import torch

    tree = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    if isinstance(tree, torch.Tensor):
        tree, what = other_tensor(tree, rng)
    else:
        tree, what = _mutate_saved_tree(tree, rng)
    stream = io.BytesIO()
    torch.save(tree, stream)
    return stream.getvalue(), what


def _mutate_saved_tree(tree: Any, rng: random.Random) -> tuple[Any, str]:
    import torch

    found = list(mutate.places(tree))
    tensors = [(container, key) for container, key in found if isinstance(container[key], torch.Tensor)]
    if tensors and rng.random() < 0.7:
        container, key = rng.choice(tensors)
        container[key], what = other_tensor(container[key], rng)
        return tree, f"{str(key)[-60:]!r}: {what}"
    return mutate.mutate_tree(tree, rng)


def other_tensor(tensor: Any, rng: random.Random) -> tuple[Any, str]:
    """A wrong tensor: of another type, shape, layout or absurd size."""
    import torch

    shape = tuple(tensor.shape)
    makers = {
        "float64": lambda: tensor.to(torch.float64) if not tensor.is_complex() else tensor,
        "int64": lambda: torch.zeros(shape, dtype=torch.int64),
        "bool": lambda: torch.zeros(shape, dtype=torch.bool),
        "complex": lambda: torch.zeros(shape, dtype=torch.complex64),
        "float8": lambda: torch.zeros(shape).to(torch.float8_e4m3fn),
        "not a number": lambda: torch.full(shape, float("nan")),
        "infinite": lambda: torch.full(shape, float("inf")),
        "a terabyte, of one stored number": lambda: torch.zeros(1).expand(2**38),
        "its shape, of one stored number": lambda: torch.zeros(1).expand(shape),
        "flat": lambda: tensor.flatten().clone(),
        "a dimension more": lambda: tensor[None].clone(),
        "a row more": lambda: torch.cat([tensor, tensor[:1]]) if shape else torch.zeros(2),
        "empty": lambda: torch.zeros(0),
        "without any storage": lambda: torch.empty(shape, device="meta"),
        "sparse": lambda: torch.zeros(shape).to_sparse(),
        "text": lambda: "abc",
        "nothing": lambda: None,
    }
    what = rng.choice(list(makers))
    return makers[what](), f"is {what}"


def _read_index(data: bytes) -> Any:
    """The index of a torch_dist checkpoint; a hostile one, from earlier damage, is not run."""
    from ross_mcore.checkpoint.safe_load import _Unpickler

    return _Unpickler(io.BytesIO(data)).load()


def mutate_metadata(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """The index of a torch_dist checkpoint with a changed description of one tensor."""
    import torch

    if rng.random() < 0.45:
        return mutate_pickle(data, rng)
    metadata = _read_index(data)
    name = rng.choice([n for n, item in metadata.state_dict_metadata.items() if hasattr(item, "chunks")])
    item = metadata.state_dict_metadata[name]
    place = rng.choice([place for where, place in metadata.storage_data.items() if where.fqn == name])
    chunk = item.chunks[0]
    big = rng.choice((0, -1, 1, 2**31, 2**40, 2**63, 2**70))
    elsewhere = ("../../canary/secret.txt", "/etc/hostname", "", ".", 5, "a\nb")
    items = metadata.state_dict_metadata
    changes: dict[str, tuple[Any, str, Any]] = {
        "size": (item, "size", torch.Size([big if -(2**63) <= big < 2**63 else 5, *item.size[1:]])),
        "size in words": (item, "size", "abc"),
        "more dimensions": (item, "size", torch.Size([*item.size, 1])),
        "flat": (item, "size", torch.Size([item.size.numel()])),
        "dtype": (item.properties, "dtype", rng.choice((torch.int64, torch.float64, torch.bool, torch.complex64))),
        "no dtype": (item.properties, "dtype", None),
        "offsets": (chunk, "offsets", torch.Size([1] * len(chunk.offsets))),
        "chunk sizes": (chunk, "sizes", torch.Size([7] * len(chunk.sizes))),
        "no chunks": (item, "chunks", []),
        "chunks twice": (item, "chunks", item.chunks * 2),
        "a million chunks": (item, "chunks", item.chunks * 1_000_000),
        "offset": (place, "offset", big),
        "length": (place, "length", big),
        "offset in words": (place, "offset", "0"),
        "another file": (
            place,
            "relative_path",
            rng.choice(elsewhere),
        ),
        "its neighbour's place": (place, "offset", rng.choice(list(metadata.storage_data.values())).offset),
        "no places": (metadata, "storage_data", {}),
        "places in a list": (metadata, "storage_data", []),
        "no tensors": (metadata, "state_dict_metadata", {}),
        "tensors in a list": (metadata, "state_dict_metadata", [1]),
        "one tensor gone": (
            metadata,
            "state_dict_metadata",
            {n: i for n, i in items.items() if n != name},
        ),
        "a tensor more": (
            metadata,
            "state_dict_metadata",
            {**items, rng.choice(("a\nb", "", 5)): item},
        ),
    }
    what = rng.choice(list(changes))
    owner, attribute, value = changes[what]
    object.__setattr__(owner, attribute, value)
    return pickle.dumps(metadata), f"{name}: {what} {str(value)[:40]}"


def mutate_piece(path: Path, rng: random.Random) -> str:
    """Replaces a tensor in a torch_dist file, and its offsets in the index beside it."""
    import torch

    index = path.with_name(".metadata")
    metadata = _read_index(index.read_bytes())
    where, place = rng.choice([(w, p) for w, p in metadata.storage_data.items() if p.relative_path == path.name])
    data = path.read_bytes()
    piece = io.BytesIO(data[place.offset : place.offset + place.length])
    stream = io.BytesIO()
    old = torch.load(piece, map_location="cpu", weights_only=True)
    if isinstance(old, torch.Tensor):
        new, what = other_tensor(old, rng)
    else:
        new, what = mutate.any_value(rng), "is another value"
    torch.save(new, stream)
    object.__setattr__(place, "offset", len(data))
    object.__setattr__(place, "length", stream.tell())
    path.write_bytes(data + stream.getvalue())
    index.write_bytes(pickle.dumps(metadata))
    return f"{where.fqn}: {what}"


def mutate_pickle(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """A pickle that runs code, nests endlessly, claims too much, or is damaged."""
    hostile = {
        "code": pickle.dumps({"a": _Bomb()}),
        "old code": b"cos\nsystem\n(S'echo pickled > pickled'\ntR.",
        "eval": b"c__builtin__\neval\n(S'1'\ntR.",
        "a deep list": b"(" * 50_000 + b"l" * 50_000 + b".",
        "promised bytes": b"\x80\x04\x8e" + (2**62).to_bytes(8, "little") + b".",
        "a huge memo": b"\x80\x04Nr\xff\xff\xff\x7f.",
        "a list": pickle.dumps([1, 2]),
        "a dict": pickle.dumps({"a": 1, 2: "b"}),
        "a huge number": b"\x80\x02\x8b\xff\xff\xff\x7f.",
        "doubled without end": b"\x80\x04](" + b"]" + b"h\x00" * 0 + b"e" + b"2" * 100_000 + b".",
        "a tuple of itself": b"\x80\x04" + b"N" + b"2\x86" * 3_000 + b".",
        "a dictionary of dictionaries": pickle.dumps({(): {}}),
    }
    if rng.random() < 0.4:
        return mutate.mutate_bytes(data, rng)
    name = rng.choice(list(hostile))
    return hostile[name], f"is {name}"
