"""A nested state as tensors with names and one JSON document, and back; nothing is ever pickled.

A tensor's name is the path to it: keys and list indices joined with dots (`model.layers.0.weight`,
`optimizer.state.3.exp_avg`). Keys are not escaped in names, so two places may get the same one; the later one then ends
in `~2`, `~3`, and so on. Names are for people and other programs: the document alone says what is where.

The document is the state with these objects in it (a dictionary whose own keys begin with `$` is written as `$dict`):

    {"$tensor": name, "form": "torch"}      a tensor; forms: torch numpy scalar buffer bytes bytearray
    {"$dict": [[key, value], …]}            a dictionary with keys that are not all plain texts; `$counter` alike
    {"$tuple": [value, …]}                  a tuple
    {"$float": "nan" | "inf" | "-inf"}      what JSON has no number for

Named tuples, ordered and default dictionaries come back as tuples and dictionaries. Anything else is refused, by path.
"""

from __future__ import annotations

import collections
import hashlib
import json
import math
from typing import Any, Callable, Mapping

from .safetensors import Leaf, leaf

DEPTH_MAX = 100
STATE_FORMAT = 1


def flatten(state: Any) -> tuple[Any, dict[str, Leaf]]:
    """The document of a state, and its tensors by name."""
    leaves: dict[str, Leaf] = {}
    return _encode(state, (), leaves), leaves


def is_flat(state: Any, leaves: Mapping[str, Leaf]) -> bool:
    """Whether the tensors by name are all of the state, so that it needs no document."""
    forms = {one.form for one in leaves.values()}
    plain = isinstance(state, dict) and len(state) > 0 and list(map(str, state)) == list(leaves) == list(state)
    return plain and len(forms) == 1 and forms <= {"torch", "numpy", "buffer"}


def to_json(document: Any) -> bytes:
    """The text of `state.json`."""
    return json.dumps({"format": STATE_FORMAT, "state": document}, allow_nan=False).encode()


def from_json(text: bytes) -> Any:
    """The document of a `state.json`; raises ValueError."""
    try:
        value = json.loads(text.decode("utf-8"))
    except RecursionError:
        raise ValueError("nested too deep") from None
    if not isinstance(value, dict) or "state" not in value:
        raise ValueError("it has no `state`")
    if value.get("format") != STATE_FORMAT:
        raise ValueError(f"it has format {value.get('format')}, this build reads format {STATE_FORMAT}")
    return value["state"]


def unflatten(document: Any, tensor: Callable[[str, str], Any]) -> Any:
    """The state of a document. `tensor(name, form)` answers a tensor; raises ValueError for what is not a document."""
    if isinstance(document, list):
        return [unflatten(one, tensor) for one in document]
    if not isinstance(document, dict):
        return document
    special = next(iter(document), "")
    if not special.startswith("$"):
        return {key: unflatten(value, tensor) for key, value in document.items()}
    value = document[special]
    if special == "$tensor" and isinstance(value, str):
        return tensor(value, str(document.get("form", "torch")))
    if special == "$tuple" and isinstance(value, list):
        return tuple(unflatten(one, tensor) for one in value)
    if special == "$float" and value in ("nan", "inf", "-inf"):
        return float(value)
    if special in ("$dict", "$counter") and isinstance(value, list):
        pairs = {unflatten(key, tensor): unflatten(one, tensor) for key, one in value}
        return pairs if special == "$dict" else collections.Counter(pairs)
    raise ValueError(f"`{special}` is not known")


def fingerprint(leaves: Mapping[str, Leaf]) -> int:
    """63 bits over names, kinds and shapes, in order: whether the ranks save alike."""
    about = json.dumps([[name, one.dtype, one.shape] for name, one in leaves.items()])
    return int.from_bytes(hashlib.sha256(about.encode()).digest()[:8], "little") >> 1


def _encode(value: Any, path: tuple[Any, ...], leaves: dict[str, Leaf]) -> Any:
    where = ".".join(map(str, path)) or "the state"
    if len(path) > DEPTH_MAX:
        raise TypeError(f"{where}: nested deeper than {DEPTH_MAX}")
    if value is None or type(value) in (bool, str):
        return value
    try:
        one = leaf(value)
    except TypeError as error:
        raise TypeError(f"{where}: {error}") from None
    if one is not None:
        name = _free_name(where if path else "value", leaves)
        leaves[name] = one
        return {"$tensor": name, "form": one.form}
    if type(value) is int or type(value) is float:
        return value if math.isfinite(value) else {"$float": str(value)}
    if isinstance(value, dict):
        return _encode_dict(value, path, leaves)
    if isinstance(value, (list, tuple)):
        parts = [_encode(one, (*path, index), leaves) for index, one in enumerate(value)]
        return parts if isinstance(value, list) else {"$tuple": parts}
    raise TypeError(f"{where} is a {type(value).__module__}.{type(value).__qualname__}, which can not be saved without pickle")


def _encode_dict(value: dict[Any, Any], path: tuple[Any, ...], leaves: dict[str, Leaf]) -> Any:
    counter = isinstance(value, collections.Counter)
    if not counter and all(type(key) is str and not key.startswith("$") for key in value):
        return {key: _encode(one, (*path, key), leaves) for key, one in value.items()}
    pairs = []
    for key, one in value.items():
        if not _is_key(key):
            raise TypeError(f"{'.'.join(map(str, path))} has a key of type {type(key).__qualname__}, which can not be saved")
        pairs.append([_encode(key, (*path, key), leaves), _encode(one, (*path, key), leaves)])
    return {"$counter" if counter else "$dict": pairs}


def _is_key(key: Any) -> bool:
    return key is None or type(key) in (bool, int, float, str) or (type(key) is tuple and all(map(_is_key, key)))


def _free_name(name: str, leaves: Mapping[str, Leaf]) -> str:
    # The header's own entry for notes has this name.
    taken = name in leaves or name == "__metadata__"
    number = 2
    while taken and f"{name}~{number}" in leaves:
        number += 1
    return f"{name}~{number}" if taken else name
