"""How fast is the Mamba encoder on this CPU, against other implementations of the same mixer?

    python benchmarks/encoder.py

Forward and training step (forward and backward) are timed for the encoder of conf/config.yaml (12 layers, D = 256,
N = 16, L = 395, float32) and for the policy's stack (3 layers, 12 tokens). Every side is our residual stack with the
same parameters; only the mixer differs. It is ours with the C++ kernel or in plain PyTorch, mamba-ssm's module with
its `selective_scan_ref`, transformers' MambaMixer, or mambapy's block. Two more sides say where our own time goes. "no
scan" has an elementwise product in the place of scan, softplus and gate: it is what a scan that costs nothing would
leave. "at CLS" spares the last layer the outputs that nobody reads, as the model does. Before anything is timed, the
outputs of all sides are compared.

A training step of mamba-ssm's reference or of transformers grows with the square of L (minutes for 12 layers), so where
they take part every side runs ONE of the twelve equal layers; the row says so. Ratios are taken within a round.
"""

import json
import subprocess
import sys

import torch
from measure import (
    NO_FORESIGHT,
    REPO,
    arguments,
    compared,
    interleaved,
    peak_memory_gb,
    print_table,
    ratio_text,
    write_results,
)
from peers import PEERS, with_mixer

from config import load_config
from jepa import mamba
from jepa.mamba import MambaStack
from observation import CAMERAS
from statevla_model import build_trainer
from training.optimizer import make_optimizer

OURS, PLAIN, FREE, AT_CLS = "ours, C++", "ours, PyTorch", "ours, no scan", "ours, at CLS"
REFERENCE, TRANSFORMERS, MAMBAPY = PEERS
ALONE, QUADRATIC = [OURS, PLAIN, FREE, AT_CLS], [OURS, PLAIN, REFERENCE, TRANSFORMERS]

# what, batch, layers, tokens, sides, rounds
ENCODER = [
    ("forward", 1, 12, 395, [*ALONE, *PEERS], 5),
    ("forward", 4, 12, 395, [*ALONE, *PEERS], 3),
    ("forward", 8, 12, 395, ALONE, 3),
    ("training step", 1, 12, 395, [*ALONE, MAMBAPY], 5),
    ("training step", 1, 1, 395, QUADRATIC, 5),
    ("training step", 4, 12, 395, [*ALONE, MAMBAPY], 3),
    ("training step", 4, 1, 395, QUADRATIC, 3),
    ("training step", 8, 12, 395, ALONE, 2),
    ("training step", 8, 1, 395, [OURS, PLAIN, MAMBAPY], 3),
]
POLICY = [
    ("forward", 256, 3, 12, [*ALONE, *PEERS], 7),
    ("training step", 256, 3, 12, [*ALONE, *PEERS], 5),
]


def main() -> None:
    settings = arguments(__doc__, memory={"type": int, "help": "only: peak memory of one phase-1 step at this batch"})
    torch.manual_seed(0)
    compiled = mamba.choose_mamba_backend("auto", torch.device("cpu")) == "cpp"
    if settings.memory:
        print(json.dumps(phase1_step(settings.memory, settings.quick)))
        return
    baseline = OURS if compiled else PLAIN
    width, rows, notes = 256, [], [f"ratio: time of the side over the time of '{baseline}', within a round"]
    encoder_cases, policy_cases = ENCODER, POLICY
    if settings.quick:
        width = 32
        encoder_cases = policy_cases = [(what, 2, 2, 20, [*ALONE, *PEERS], 1) for what in ("forward", "training step")]
    for stack, with_mlp, cases in (("encoder", True, encoder_cases), ("policy", False, policy_cases)):
        for what, batch, depth, tokens, wanted, rounds in cases:
            case = {"stack": stack, "what": what, "batch": batch, "layers": depth, "tokens": tokens}
            ours = MambaStack(depth, width, 16, 4, 2, with_mlp)
            sides, missing = {}, []
            for side in wanted if compiled else [side for side in wanted if side != OURS]:
                try:
                    sides[side] = with_mixer(ours, side) if side in PEERS else ours
                except ImportError:
                    missing.append(side)
            rows += [{**case, "side": side, "missing": "not installed"} for side in missing]
            rows += measured(case, sides, torch.randn(batch, tokens, width), baseline, rounds)
    rows.append(memory_in_a_fresh_process(4 if settings.quick else 32, settings.quick))

    print_table("Time of each side over ours, within a round: median (quartiles)", *by_case(rows))
    shares = [[r["stack"], r["what"], r["batch"], f"{r['scan_share']:.1%}"] for r in rows if "scan_share" in r]
    print_table("Share of our time that the scan takes", ["stack", "what", "batch", "share"], shares)
    print(f"\npeak memory of a phase-1 step at batch {rows[-1]['batch']}: {rows[-1]['peak_gb']:.2f} GB")
    write_results("encoder", rows, notes, settings.quick)


def measured(case: dict, sides: dict[str, MambaStack], x: torch.Tensor, baseline: str, rounds: int) -> list[dict]:
    """One row a side."""

    def forward(side):
        use_scan(side, baseline)
        return sides[side](x, last=1 if side == AT_CLS else None)

    def inference(side):
        with torch.no_grad():
            return forward(side)

    def training_step(side):
        forward(side).square().mean().backward()
        for parameter in sides[side].parameters():
            parameter.grad = None

    right = inference(baseline)
    difference = {side: (inference(side) - right)[:, -1].abs().max().item() for side in sides if side != FREE}
    print(f"{case}: outputs differ by at most {max(difference.values()):.1e}", flush=True)
    work = {"forward": inference, "training step": training_step}[case["what"]]
    times = interleaved({side: (lambda s=side: work(s)) for side in sides}, rounds, warm_up=0 if rounds == 1 else 1)
    rows = []
    for side, found in compared(times, baseline).items():
        rows.append({**case, "side": side, **found})
        if side in difference:
            rows[-1]["largest_difference"] = difference[side]
        else:
            rows[0]["scan_share"] = 1 - found["ratio"]["median"]
    return rows


SCAN = mamba.gated_scan


def use_scan(side: str, baseline: str) -> None:
    """Which kernels our mixers run from now on."""
    mamba.backend.name = "cpp" if baseline == OURS and side != PLAIN else "torch"
    mamba.gated_scan = elementwise if side == FREE else SCAN


def elementwise(u, dt, dt_bias, A, B, C, D, gate):  # noqa: ARG001, it stands in for the scan
    """Reads what the scan reads and writes what it writes: the least that any scan could take."""
    return (u + (B + C).sum(-1, keepdim=True)) * (dt + dt_bias) * gate


def by_case(rows: list[dict]) -> tuple[list[str], list[list]]:
    """The rows as a table: a line a case, a column a side."""
    cases: dict[tuple, dict[str, str]] = {}
    for row in rows:
        if "side" in row:
            case = (row["stack"], row["what"], row["batch"], row["layers"])
            cases.setdefault(case, {})[row["side"]] = row.get("missing") or ratio_text(row["ratio"])
    sides = [PLAIN, FREE, AT_CLS, *PEERS]
    lines = [[*case, *(of_case.get(side, "") for side in sides)] for case, of_case in cases.items()]
    return ["stack", "what", "batch", "layers", *sides], lines


def memory_in_a_fresh_process(batch: int, quick: bool) -> dict:
    command = [sys.executable, __file__, "--memory", str(batch), *(["--quick"] if quick else [])]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=REPO).stdout
    return {"stack": "model", "what": "peak memory of a phase-1 step", **json.loads(printed.splitlines()[-1])}


def phase1_step(batch: int, quick: bool) -> dict:
    """One whole step of phase 1 on made-up observations: losses, backward, AdamW, target."""
    config = load_config(
        REPO / "conf/config.yaml", [*(["model.encoder_depth=2", "model.image_size=32"] if quick else []), NO_FORESIGHT]
    )
    trainer = build_trainer(config, phase=1)
    optimizer = make_optimizer(trainer, 1e-4, 0.05)
    before = peak_memory_gb()
    obs, next_obs = (made_up_observation(batch, config.model.image_size, config.model.lang_emb_dim) for _ in range(2))
    actions = torch.rand(batch, config.model.prediction_gap, config.model.action_dim)
    trainer({"obs": obs, "actions": actions, "next_obs": next_obs})["loss"].backward()
    optimizer.step()
    trainer.update_target(0.996)
    return {"batch": batch, "peak_gb": peak_memory_gb(), "before_gb": before}


def made_up_observation(batch: int, size: int, lang_emb_dim: int) -> dict[str, torch.Tensor]:
    cameras = {name: torch.randint(0, 256, (batch, size, size, 3), dtype=torch.uint8) for name in CAMERAS}
    low_dimensional = {"joint_states": torch.randn(batch, 7), "gripper_states": torch.rand(batch, 2) / 25}
    return cameras | low_dimensional | {"language": torch.randn(batch, lang_emb_dim)}


if __name__ == "__main__":
    main()
