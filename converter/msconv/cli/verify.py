"""`msconv verify`: exit 0 only if proven."""

from __future__ import annotations

from pathlib import Path

import click

from msconv_runtime.errors import VerificationFailed

from .console import artifact_argument, emit, find_artifact, json_option, say, step


@click.command("verify")
@artifact_argument
@click.option("--target", default="cpu", show_default=True, help="Which target's graphs to prove.")
@click.option(
    "--reference",
    type=click.Path(path_type=Path),
    help="Directory of the source checkpoint.  [default: where it was converted from]",
)
@json_option
def command(artifact: Path | None, target: str, reference: Path | None, as_json: bool) -> None:
    """Prove an artifact numerically against the source checkpoint.

    Runs the artifact's own graphs on its own bytes and compares logits with transformers in float32:
    ragged prefill, decode, prefill on a cached prefix, decode.  Exit 0 if proven, 3 if not.

    \b
    msconv verify artifacts/Qwen3-0.6B-tp1 --reference models/Qwen3-0.6B
    """
    from ..verify.prove import prove

    root = find_artifact(artifact)
    with step(f"comparing {root} ({target}) with transformers"):
        proof = prove(root, target, reference)
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
                "seconds": round(proof.seconds, 3),
                "by_phase": c.by_phase,
            }
        )
    for phase, error in c.by_phase.items():
        say(f"  {phase}: largest logit error {error:.2e}")
    if not proof.ok and as_json:
        raise click.exceptions.Exit(VerificationFailed.exit_code)
    if not proof.ok:
        names = ", ".join((proof.missing + proof.unused)[:5])
        raise VerificationFailed(
            f"{root}: not proven for {target}: largest logit error {c.max_abs_logit_error:.3e} "
            f"(bound {c.bound:.0e}) at {c.worst}; argmax agrees in {c.argmax_agreement:.2%}"
            + (f"; tensors missing or unused: {names}" if names else "")
            + ".",
            "Check that --reference is what was converted; then convert and compile again with --force.",
        )
    say(
        f"Proven for {target}: {c.rows} rows of logits, largest error {c.max_abs_logit_error:.2e} "
        f"(bound {c.bound:.0e}), argmax agrees in {c.argmax_agreement:.0%}, {proof.seconds:.1f} s"
    )
    say(f"Next: msconv serve {root}")
