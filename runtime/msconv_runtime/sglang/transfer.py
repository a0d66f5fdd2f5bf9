"""Keys and values between two servers, from the inside of SGLang: they move between servers of one artifact only.

A prefill server tells what it serves where it tells its page size; a decode server compares it with its own before
it asks for a byte.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..artifact import Artifact, is_artifact
from ..serving.settings import Settings

logger = logging.getLogger(__name__)
_refused: dict[str, str] = {}  # why a prefill server, by its bootstrap address, is not asked for keys and values


@functools.cache
def identity(path: str, target: str) -> str:
    """What two servers must have in common: weights, configuration, and the target, whose graphs lay out the
    cache."""
    manifest = Artifact(Path(path)).manifest
    weights = manifest.weights.digest if manifest.weights else "none"
    return f"msconv {weights} {manifest.model.config_digest} {target}"


def own_identity() -> str:
    """Of the artifact that this process serves; "" if it serves another model."""
    from sglang.srt.runtime_context import get_model

    path = get_model().model_path
    return identity(path, Settings.read().target) if is_artifact(path) else ""


def tell_identity(args: Any, mode: Any, server_args: Any) -> None:
    """Of a prefill server, in the field for layouts of keys and values, which no artifact's pool uses."""
    from sglang.srt.disaggregation.mooncake.conn import MooncakeKVSender
    from sglang.srt.disaggregation.utils import DisaggregationMode

    mine = own_identity()
    if not mine:
        return
    if server_args.device == "cpu":
        MooncakeKVSender.supports_host_tensor_indices = False  # else page numbers go through CUDA's pinned memory
    if mode == DisaggregationMode.PREFILL:
        args.kv_layout = mine


def ask_of_prefill(original: Callable[..., bool], manager: Any, address: str) -> bool:
    """Whether keys and values may come from the prefill server at `address`.  SGLang ends a decode server that
    finds another page size there; here the requests fail, and the server goes on."""
    mine = own_identity()
    if not mine:
        return original(manager, address)
    try:
        known = original(manager, address)
    except RuntimeError as e:
        return _refuse(address, str(e))
    theirs = manager.prefill_info_table[address].kv_layout if known else None
    if known and theirs != mine:
        del manager.prefill_info_table[address]
        return _refuse(address, _difference(mine, theirs))
    if known:
        _refused.pop(address, None)
    return bool(known)


def fail_refused(original: Callable[..., Any], queue: Any, requests: dict[str, list[Any]]) -> Any:
    """Requests whose prefill server is refused fail at once, with the reason."""
    ready, waiting = original(queue, requests)
    for address, of_address in requests.items():
        if address not in ready and (why := _refused.get(address)):
            for request in of_address:
                if request.kv_receiver is not None:
                    request.kv_receiver.abort()
                    queue.kv_manager.record_failure(request.req.bootstrap_room, why)
            waiting = [request for request in waiting if all(request is not other for other in of_address)]
    return ready, waiting


def _refuse(address: str, why: str) -> bool:
    found = f"msconv: no keys and values are taken from the prefill server at {address}: {why}"
    if _refused.get(address) != found:
        logger.error(found)
    _refused[address] = found
    return False


def _difference(mine: str, theirs: str | None) -> str:
    if not (theirs or "").startswith("msconv "):
        return "it serves no artifact.  Serve the same one on both sides"
    names = ("weights (or their layout over ranks)", "config.json", "target")
    pairs = zip(names, mine.split()[1:], str(theirs).split()[1:], strict=False)
    told = "; ".join(f"{name} {other} there, {own} here" for name, own, other in pairs if own != other)
    return f"it serves another artifact: {told}.  Serve the same one on both sides"
