"""`msconv verify`: exit 0 only if proven."""

from __future__ import annotations

from pathlib import Path

import click

from msconv_runtime.errors import VerificationFailed
from msconv_runtime.targets import CPU

from .command import Command
from .console import (
    artifact_argument,
    complete_targets,
    emit,
    find_artifact,
    import_torch_alone,
    json_option,
    say,
    step,
)
from .report import refresh


@click.command("verify", cls=Command)
@artifact_argument
@click.option(
    "--target",
    default=CPU.name,
    show_default=True,
    shell_complete=complete_targets,
    help="Which target's graphs to prove.",
)
@click.option(
    "--reference",
    metavar="REF",
    help="The source checkpoint: a directory or owner/name[@revision].  [default: where it was converted from]",
)
@click.option("--layers", default=0, type=click.IntRange(0), help="Only the first N layers: for large models.")
@json_option
def command(artifact: Path | None, target: str, reference: str | None, layers: int, as_json: bool) -> None:
    """Prove an artifact numerically against the source checkpoint.

    Runs the artifact's own graphs on its own bytes and compares logits with transformers in float32:
    ragged prefill, decode, prefill on a cached prefix, decode.  Exit 0 if proven, 3 if not.
    Ascend graphs and several ranks run in an interpreter, all ranks together.

    \b
    msconv verify artifacts/Qwen3-0.6B-tp1 --reference models/Qwen3-0.6B
    """
    import_torch_alone()
    from ..verify.prove import prove
    from ..verify.reference import ROUTER_TIE

    root = find_artifact(artifact)
    try:
        with step(f"comparing {root} ({target}) with transformers"):
            proof = prove(root, target, reference, layers)
    except VerificationFailed:
        refresh(root)  # an earlier proof is gone
        raise
    refresh(root)
    c = proof.comparison
    if as_json:
        emit(
            {
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
                "by_phase": c.by_phase,
                "layers": proof.layers or None,
                "norms": c.probes,
                "place": c.first,
                **proof.half_precision,
            }
        )
    for phase, error in c.by_phase.items():
        say(f"  {phase}: largest logit error {error:.2e}")
    if not proof.ok and as_json:
        raise click.exceptions.Exit(VerificationFailed.exit_code)
    if not proof.ok and c.ok_but_for_ties:
        raise VerificationFailed(
            f"{root}: not proven for {proof.target}: {c.undecided} of {c.rows + c.undecided} rows hang on how a "
            f"router's tie is broken (scores closer than {ROUTER_TIE:.0e}); only the rest, which agrees, could be "
            "judged.",
            "A router whose scores tie so often is most likely damaged: two of its rows may be the same.",
        )
    if not proof.ok:
        names = ", ".join((proof.missing + proof.unused)[:5])
        raise VerificationFailed(
            f"{root}: not proven for {target}: largest logit error {c.max_abs_logit_error:.3e} "
            f"(bound {c.bound:.0e}) at {c.worst or 'no row'}; argmax agrees in {c.argmax_agreement:.2%}"
            + (f"; first apart: {c.first}" if c.first else "")
            + (f"; ranks differ by {c.apart:.1e} where they must agree" if c.apart >= c.bound else "")
            + (f"; tensors missing or unused: {names}" if names else "")
            + ".",
            "Check that --reference is what was converted; then convert and compile again with --force.",
        )
    if proof.layers:
        worst = max(c.probes.values(), default=0.0)
        say(
            f"The first {proof.layers} layers agree for {target}: {len(c.probes)} norms, largest relative error "
            f"{worst:.2e} (bound {c.bound:.0e}), {proof.seconds:.1f} s.  The whole is not proven by this."
        )
        say(f"Next: msconv verify {root} --target {target} compares the whole.")
        return
    if half := proof.half_precision:
        expected = "other experts are chosen here and there"
        if "half_precision_bound" in half:
            expected = f"expected below {half['half_precision_bound']:.2e}"
        say(
            f"  in the target's own precision: largest logit error "
            f"{half['half_precision_max_abs_logit_error']:.2e}, {expected}"
        )
    if c.closest_routing < float("inf"):
        left = f"; {c.undecided} rows behind closer calls were left out" if c.undecided else ""
        say(f"  routing: closest call among what was judged {c.closest_routing:.1e}{left}")
    say(
        f"Proven for {target}: {c.rows} rows of logits, largest error {c.max_abs_logit_error:.2e} "
        f"(bound {c.bound:.0e}), argmax agrees in {c.argmax_agreement:.0%}, {proof.seconds:.1f} s"
    )
    say(f"Next: msconv serve {root}")
