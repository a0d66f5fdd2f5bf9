"""`msconv verify`: exit 0 only if proven."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from msconv_runtime.artifact import Artifact
from msconv_runtime.artifact.consistency import MOST_LED
from msconv_runtime.errors import VerificationFailed
from msconv_runtime.targets import target_named

from .command import Command
from .console import find_artifact, import_torch_alone, say
from .here import machine_kind, quoted, serve_command, usual_target
from .interrupts import leaving_at_once
from .options import Finite, artifact_argument, complete_targets, memory_option, reference_option
from .phases import phases
from .report import refresh
from .result import Result, json_option, show

if TYPE_CHECKING:
    from ..verify.by_layer.driver import ByLayer
    from ..verify.result import Proof


@click.command("verify", cls=Command)
@artifact_argument
@click.option(
    "--target",
    shell_complete=complete_targets,
    help="Which target's graphs to prove.  [default: the one there is, or this machine's device]",
)
@reference_option
@click.option("--layers", default=0, type=click.IntRange(0), help="Only the first N layers: for large models.")
@click.option("--max-kl", type=Finite(0), help="int8: fail above this divergence from the source.")
@click.option(
    "--text",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="int8: measure the divergence on this text.  [default: the source's evaluation.txt, or msconv's own]",
)
@memory_option
@click.option(
    "--ray",
    metavar="ADDRESS",
    help="Have the nodes of a Ray cluster prove the layers, each from the reference's input: HOST:PORT, auto, or "
    "local, which starts one here.  --max-memory is that of each node.",
)
@json_option
def command(
    artifact: Path | None,
    target: str | None,
    reference: str | None,
    layers: int,
    max_kl: float | None,
    text: Path | None,
    max_memory: int | None,
    ray: str | None,
) -> None:
    """Prove an artifact numerically against the source checkpoint.

    Runs the artifact's own graphs on its own bytes and compares logits with transformers in float32:
    ragged prefill, decode, prefill on a cached prefix, decode.  Exit 0 if proven, 3 if not.
    Ascend graphs and several ranks run in an interpreter, all ranks together.
    Of int8 artifacts, codes are compared too, and how far they are from the source is measured.
    Ended before its time, the proof of a large model goes on where it was.

    \b
    msconv verify artifacts/Qwen3-0.6B-tp1 --reference models/Qwen3-0.6B
    """
    import_torch_alone()
    root = find_artifact(artifact)
    target = target_named(target or usual_target(Artifact(root))).name
    try:
        with (
            workers(ray) as by_layer,
            phases(f"comparing {root} ({target}) with transformers") as tell,
            leaving_at_once(),
        ):
            from ..verify.packages import require_reference

            require_reference()
            from ..verify.prove import prove

            proof = prove(root, target, reference, layers, tell, max_kl, text, max_memory, by_layer)
    except VerificationFailed:
        refresh(root)  # an earlier proof is gone
        raise
    refresh(root)
    lines = [f"  {phase}: largest logit error {e:.2e}" for phase, e in proof.comparison.by_phase.items()]
    data = _data(proof)
    if not proof.ok:
        show(Result(data, lines=lines, failure=_failure(root, proof)))
    elif proof.layers:
        again = f"msconv verify {quoted(root)} --target {target}  # compares the whole"
        show(Result(data, lines=[*lines, _first_layers(proof)], next=again))
    else:
        show(Result(data, lines=[*lines, *_proven(proof)], next=_following(root, target)))


@contextmanager
def workers(ray: str | None) -> Iterator[ByLayer | None]:
    """Those of a cluster, while they are needed.  Raises MsconvError."""
    if ray is None:
        yield None
        return
    from ..stream.movers.ray import connected, refuse_address

    refuse_address(ray)
    threads = os.cpu_count() or 1
    with connected(ray, threads) as cluster:
        from ..verify.by_layer.driver import ByLayer

        found = ByLayer.of(cluster, threads, say)
        try:
            yield found
        finally:
            found.end()


def _following(root: Path, target: str) -> str:
    """What comes after a proof: to serve where that can be, else to rehearse it; "" where others serve."""
    kind = target_named(target).kind
    if target_named(target).device.served_by:
        return ""
    if Artifact(root).is_draft:
        return f"msconv compile TARGET --target {target} --draft {quoted(root)}  # TARGET: the model it drafts for"
    if kind == machine_kind():
        return serve_command(root, "--device", kind)
    return f"msconv rehearse {quoted(root)} --target {target}  # or on a host with NPUs: msconv serve"


def _data(proof: Proof) -> dict[str, Any]:
    c = proof.comparison
    return {
        "ok": proof.ok,
        "target": proof.target,
        "ranks": proof.ranks,
        "max_abs_logit_error": c.max_abs_logit_error,
        "argmax_agreement": c.argmax_agreement,
        "coverage": {"missing": proof.missing, "unused": proof.unused},
        "bound": c.bound,
        "rows": c.rows,
        "ties": c.ties,
        "undecided": c.undecided,
        "closest_routing": c.closest_routing if c.closest_routing < float("inf") else None,
        "seconds": round(proof.seconds, 3),
        "seconds_per_gb": round(proof.seconds_per_gb, 3) if proof.seconds_per_gb is not None else None,
        "weights_bytes": proof.weights_bytes,
        "resumed": proof.is_resumed,
        "by_phase": c.by_phase,
        "layers": proof.layers or None,
        "norms": c.probes,
        "place": proof.place,
        "own_errors": c.own_errors or None,
        "own_deviations": c.own_deviations or None,
        "deviation_sum": c.deviation_sum if c.own_deviations else None,
        **proof.half_precision,
        "int8": proof.int8 or None,
    }


def _failure(root: Path, proof: Proof) -> VerificationFailed:
    from ..verify.reference import ROUTER_TIE

    c = proof.comparison
    if c.ok_but_for_ties:
        return VerificationFailed(
            f"{root}: not proven for {proof.target}: {c.undecided} of {c.rows + c.undecided} rows hang on how a "
            f"router's tie is broken (scores closer than {ROUTER_TIE:.0e}); only the rest, which agrees, could be "
            "judged.",
            "A router whose scores tie so often is most likely damaged: two of its rows may be the same.",
        )
    names = ", ".join((proof.missing + proof.unused)[:5])
    if not names and c.deviation_sum >= c.bound and replace(c, own_deviations={}).ok:
        return VerificationFailed(
            f"{root}: not proven for {proof.target} layer by layer: each of {len(c.own_deviations)} layers "
            f"agrees, but their deviations add up to {c.deviation_sum:.1e} (bound {c.bound:.0e}).",
            "In a very deep model rounding alone may do that: verify without --ray, which sees what errors come "
            "to.",
        )
    if proof.not_finite:
        return VerificationFailed(
            f"{root}: not proven for {proof.target}: the graphs agree with the reference, but {proof.not_finite}.",
            "Scales or values of the source are most likely damaged: `msconv lint CHECKPOINT` names them.",
        )
    return VerificationFailed(
        f"{root}: not proven for {proof.target}: largest logit error {c.max_abs_logit_error:.3e} "
        f"(bound {c.bound:.0e}) at {c.worst or 'no row'}; argmax agrees in {c.argmax_agreement:.2%}"
        + (f"; first apart: {proof.place}" if proof.place else "")
        + _of_int8(proof)
        + (f"; ranks differ by {c.apart:.1e} where they must agree" if c.apart >= c.bound else "")
        + (f"; tensors missing or unused: {names}" if names else "")
        + ".",
        "Check that --reference is what was converted; then convert and compile again with --force."
        if not _is_only_adrift(proof)
        else "All else agrees: give a larger --max-kl, another --text, or serve the unquantised weights.",
    )


def _is_only_adrift(proof: Proof) -> bool:
    """Nothing is wrong but the distance to the source, for which somebody set a bound."""
    return proof.is_adrift and replace(proof, max_kl=None).ok


def _of_int8(proof: Proof) -> str:
    """What else is wrong with a proof of int8."""
    led, drift = proof.led, proof.drift
    if led is None:
        return ""
    found = f"; {led.unexplained} of {led.compared} codes are not explained by a tie" if led.unexplained else ""
    if led.share >= MOST_LED:
        found += f"; {led.share:.1e} of all codes had to be led, {MOST_LED:.0e} is too many"
    if proof.is_adrift and drift is not None:
        found += f"; KL divergence {drift.kl:.2e} from {drift.against}, --max-kl is {proof.max_kl:.2e}"
    return found


def _first_layers(proof: Proof) -> str:
    c = proof.comparison
    worst = max(c.probes.values(), default=0.0)
    return (
        f"The first {proof.layers} layers agree for {proof.target}: {len(c.probes)} norms, largest relative error "
        f"{worst:.2e} (bound {c.bound:.0e}), {proof.seconds:.1f} s.  The whole is not proven by this."
    )


def _codes(proof: Proof) -> Iterator[str]:
    led, drift = proof.led, proof.drift
    assert led is not None
    yield (
        f"  int8: {proof.tensors} tensors are the source's bit for bit; of {led.compared:,} codes of activations "
        f"{led.led} were led at ties ({led.share:.1e}), none is unexplained"
    )
    for name, session in led.sessions.items():
        yield (
            f"  the server's own run{f' ({name})' if name else ''} against the interpreter's: KL {session.kl:.1e} "
            f"(bound {session.bound:.0e}), argmax agrees in {session.argmax_agreement:.2%}, largest logit error "
            f"{session.max_abs_logit_error:.2e}"
        )
    if drift is not None:
        yield (
            f"  drift from {drift.against}, {drift.tokens} tokens of {drift.text}: KL {drift.kl:.2e}"
            + (f" (bound {proof.max_kl:.2e})" if proof.max_kl is not None else "")
            + f", argmax agrees in {drift.argmax_agreement:.2%}, perplexity {drift.perplexity_before:.4g} -> "
            f"{drift.perplexity:.4g}"
        )


def _proven(proof: Proof) -> Iterator[str]:
    c = proof.comparison
    if half := proof.half_precision:
        expected = f"other {'experts are chosen' if proof.led is None else 'codes are taken'} here and there"
        if "half_precision_bound" in half:
            expected = f"expected below {half['half_precision_bound']:.2e}"
        error = half["half_precision_max_abs_logit_error"]
        yield f"  in the target's own precision: largest logit error {error:.2e}, {expected}"
    if proof.led is not None:
        yield from _codes(proof)
    if c.own_errors:
        worst = max(c.own_errors, key=c.own_errors.__getitem__)
        yield (
            f"  each of {len(c.own_errors)} layers from the reference's input: largest own error "
            f"{c.own_errors[worst]:.1e} ({worst}), all deviations together {c.deviation_sum:.1e} (bound "
            f"{c.bound:.0e})"
        )
    if c.closest_routing < float("inf"):
        left = f"; {c.undecided} rows behind closer calls were left out" if c.undecided else ""
        yield f"  routing: closest call among what was judged {c.closest_routing:.1e}{left}"
    # Of a small model the time is the start's, not the weights'.
    rate = proof.seconds_per_gb if proof.weights_bytes >= 1e9 else None
    yield (
        f"Proven for {proof.target}: {c.rows} rows of logits, largest error {c.max_abs_logit_error:.2e} "
        f"(bound {c.bound:.0e}), argmax agrees in {c.argmax_agreement:.0%}, {proof.seconds:.1f} s"
        + (f" ({rate:.1f} s per GB of weights)" if rate is not None else "")
        + (", the rest of what an earlier run had begun" if proof.is_resumed else "")
    )
